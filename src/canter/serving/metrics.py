"""What the service tells Prometheus."""

from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from canter.serving.scheduler import Scheduler

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class _EngineCounters(Collector):
    """The engine's own counters, read when they are asked for."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler

    def collect(self) -> Iterable[Metric]:
        counters = self._scheduler.engine.counters
        stages = CounterMetricFamily(
            "canter_stage_seconds", "Seconds that the engine spent in a stage.", labels=["stage"]
        )
        stages.add_metric(["features"], counters.feature_seconds)
        stages.add_metric(["encoder"], counters.encoder_seconds)
        stages.add_metric(["decoder"], counters.decoder_seconds)
        yield stages
        for name, text, value in (
            ("canter_tokens", "Tokens decoded.", counters.tokens),
            ("canter_decoder_steps", "Steps of the decoder.", counters.steps),
            ("canter_decoder_rows", "Rows computed, summed over decoder steps.", counters.row_steps),
            (
                "canter_decoder_useful_rows",
                "Those among them that had not ended.",
                counters.useful_row_steps,
            ),
        ):
            yield CounterMetricFamily(name, text, value=value)


class Metrics:
    """Counters of one service, in a registry of its own."""

    def __init__(self, scheduler: Scheduler, requests: Callable[[], float], audio_inside: Callable[[], float]):
        disable_created_metrics()  # a line more for each figure, which nobody draws
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("canter_requests", "Requests answered.", ["endpoint", "status"], registry=registry)
        self.latency = Histogram(
            "canter_request_seconds",
            "From a request's header to the end of its answer.",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.audio = Counter("canter_audio_seconds", "Seconds of audio transcribed.", registry=registry)
        self.refused = Counter("canter_refused", "Requests turned away before any work.", ["reason"], registry=registry)
        self.cancelled = Counter("canter_cancelled", "Requests given up half-way.", registry=registry)
        for name, text, value in (
            ("canter_requests_inside", "Requests in the service.", requests),
            ("canter_audio_seconds_inside", "Seconds of audio in the service.", audio_inside),
            ("canter_pieces_waiting", "Pieces of audio that wait for the engine.", lambda: scheduler.waiting),
            ("canter_pieces_inside", "Pieces of audio in the engine.", lambda: scheduler.inside),
        ):
            Gauge(name, text, registry=registry).set_function(value)
        registry.register(_EngineCounters(scheduler))
        ProcessCollector(registry=registry)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
