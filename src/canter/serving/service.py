"""Decode uploads, transcribe them with the models that all requests share, and count what happens."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import BinaryIO

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from canter.corpus.audio import audio_blocks, audio_info
from canter.corpus.manifest import Utterance
from canter.errors import AudioError
from canter.inference.engine.requests import Request
from canter.serving.audio import Audio, stored
from canter.serving.config import ServiceConfig
from canter.serving.model import ModelSource, ServedModel, TranscriptUpdate
from canter.serving.pool import CLOSING, ModelPool
from canter.serving.protocol import ApiError, AudioRequest
from canter.serving.scheduler import EngineFailure
from canter.serving.upload import path_of

MAX_DENSITY = 384_000  # values a second that the longest audio may have: eight channels at 48 kHz
BLOCK = 2**22  # values decoded between two checks that the client is still there
LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds


class _ModelMetrics(Collector):
    """Collector that reads what is known of each model, and the counters of its engines, when Prometheus asks."""

    def __init__(self, models: ModelPool):
        self._models = models

    def collect(self) -> Iterable[Metric]:
        offered = self._models.offered
        stages = CounterMetricFamily(
            "canter_stage_seconds", "Seconds that the engine spent in a stage.", labels=["model", "stage"]
        )
        for one in offered:
            for stage, name in (("features", "feature"), ("encoder", "encoder"), ("decoder", "decoder")):
                seconds = sum(getattr(counters, f"{name}_seconds") for counters in one.counters)
                stages.add_metric([one.name, stage], seconds)
        yield stages
        for name, text, counter in (
            ("canter_tokens", "Tokens decoded.", "tokens"),
            ("canter_decoder_steps", "Steps of the decoder.", "steps"),
            ("canter_decoder_rows", "Rows computed, summed over decoder steps.", "row_steps"),
            ("canter_decoder_useful_rows", "Computed rows that had not ended.", "useful_row_steps"),
            ("canter_drafted_tokens", "Drafted tokens that decoder steps have checked.", "drafted"),
            ("canter_accepted_tokens", "Drafted tokens that are text.", "accepted"),
        ):
            family = CounterMetricFamily(name, text, labels=["model"])
            for one in offered:
                family.add_metric([one.name], sum(getattr(counters, counter) for counters in one.counters))
            yield family
        for kind, name, text, value in (
            (GaugeMetricFamily, "canter_model_loaded", "1 while the model is loaded.", "loaded"),
            (GaugeMetricFamily, "canter_model_bytes", "Memory of the model while it is loaded.", "bytes_in_use"),
            (GaugeMetricFamily, "canter_model_requests_inside", "Requests that use the model.", "inside"),
            (
                GaugeMetricFamily,
                "canter_model_requests_waiting",
                "Requests that wait for the model.",
                "waiting_requests",
            ),
            (CounterMetricFamily, "canter_model_loads", "Number of times that the model was loaded.", "loads"),
            (CounterMetricFamily, "canter_model_unloads", "Number of times that it made room for another.", "unloads"),
        ):
            family = kind(name, text, labels=["model"])
            for one in offered:
                family.add_metric([one.name], float(getattr(one, value)))
            yield family


class Metrics:
    """Prometheus metrics of one service, in a registry of their own."""

    def __init__(self, service: "Service"):
        disable_created_metrics()  # one more line for each metric, of no use here
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "canter_requests", "Requests answered.", ["endpoint", "model", "status"], registry=registry
        )
        text = "Seconds from a request's header to the end of its answer."
        self.latency = Histogram(
            "canter_request_seconds", text, ["endpoint", "model"], buckets=LATENCY_BUCKETS, registry=registry
        )
        self.audio = Counter("canter_audio_seconds", "Seconds of audio transcribed.", ["model"], registry=registry)
        self.refused = Counter("canter_refused", "Requests refused before any work.", ["reason"], registry=registry)
        text = "Requests cancelled before their end."
        self.cancelled = Counter("canter_cancelled", text, ["model"], registry=registry)
        for offered in service.models.offered:  # so that they are 0 before the first request
            self.audio.labels(offered.name)
            self.cancelled.labels(offered.name)
        for name, text, value in (
            ("canter_requests_inside", "Requests in the service.", lambda: service.requests),
            ("canter_audio_seconds_inside", "Seconds of audio in the service.", lambda: service.seconds),
            ("canter_pieces_waiting", "Chunks of audio that wait for the engine.", lambda: service.waiting),
            ("canter_pieces_inside", "Chunks of audio in the engine.", lambda: service.inside),
        ):
            Gauge(name, text, registry=registry).set_function(value)
        registry.register(_ModelMetrics(service.models))
        ProcessCollector(registry=registry)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class Service:
    """The models, the threads that decode audio, and the numbers of requests and seconds inside, whose limits hold for
    all models together."""

    def __init__(self, models: Sequence[ModelSource], config: ServiceConfig):
        """Load the models. Raises what `ModelPool` raises."""
        self.config = config
        self.models = ModelPool(models, config)
        self.requests = 0
        self.seconds = 0.0
        self.started = int(time.time())
        self.metrics = Metrics(self)
        self._readers = ThreadPoolExecutor(config.readers, thread_name_prefix="canter-audio")
        self._reading: set[threading.Event] = set()

    @property
    def alive(self) -> bool:
        return self.models.alive

    @property
    def waiting(self) -> int:
        """Number of chunks that the engines have not taken yet."""
        return sum(served.waiting for served in self.models.loaded)

    @property
    def inside(self) -> int:
        """Number of chunks in the engines."""
        return sum(served.inside for served in self.models.loaded)

    def close(self) -> None:
        for stop in self._reading:
            stop.set()
        self.models.close()
        self._readers.shutdown(cancel_futures=True)  # each ends after its current block and closes its file

    async def warm_up(self) -> None:
        """Let every loaded model decode a second of noise."""
        for served in self.models.loaded:
            await served.warm_up()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Context manager that counts a request as inside. Raise ApiError (503) if the service is full."""
        if self.requests >= self.config.max_requests or not self.alive:
            raise self._busy()
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextmanager
    def room_for(self, audio: Audio) -> Iterator[None]:
        """Context manager that counts a request's audio as inside. Raise ApiError (503) if the service is full."""
        seconds = audio.seconds * audio.channels
        if self.seconds + seconds > max(60 * self.config.max_minutes, seconds):
            raise self._busy()
        self.seconds += seconds
        try:
            yield
        finally:
            self.seconds -= seconds

    def _busy(self) -> ApiError:
        self.metrics.refused.labels("busy").inc()
        return ApiError(503, "the service is full; try again in a moment", code="overloaded")

    async def read(self, model: ServedModel, file: BinaryIO, name: str, fields: AudioRequest) -> Audio:
        """Decode an upload for ``model`` in a thread, and close its ``file`` (open, on disk). The caller closes the
        result.

        Cancelling the call stops the thread. Raises ApiError: 400 for files that are not audio, damaged, or too long,
        507 for a full disk.
        """
        stop = threading.Event()
        self._reading.add(stop)
        try:
            running = self._readers.submit(self._read, model, file, name, fields, stop)
        except RuntimeError:  # the pool is shut down
            file.close()
            self._reading.discard(stop)
            raise _closing() from None
        running.add_done_callback(lambda _: file.close())
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            running.add_done_callback(_discard)
            raise
        finally:
            stop.set()
            self._reading.discard(stop)

    def _read(
        self, model: ServedModel, file: BinaryIO, name: str, fields: AudioRequest, stop: threading.Event
    ) -> Audio:
        start, path, samples = time.perf_counter(), path_of(file), 0
        try:
            header = audio_info(path)
            density = header.rate * header.channels
            channels = _channels(fields, header.channels, name)
            if header.seconds is not None:
                self._check_length(header.seconds, density, name, len(channels))
            found = [
                audio_blocks(
                    Utterance(path, 0.0, text="", channel_selector=channel),
                    model.rate,
                    min(30.0, BLOCK / density),
                    keep_damaged=True,
                )
                for channel in channels
            ]

            def checked(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
                nonlocal samples
                for block in blocks:
                    if stop.is_set():  # the error reaches a client only if the service is closing
                        raise _closing()
                    samples += len(block)
                    self._check_length(samples / model.rate, density, name)
                    yield block

            transcriber = model.transcriber(fields)
            chunks = (
                replace(chunk, channel=channel if fields.channel == "each" else None)
                for channel, blocks in zip(channels, found)
                for chunk in transcriber.chunks(checked(blocks))
            )
            audio = stored(chunks, model.rate)
        except AudioError as error:
            text = str(error).replace(path, name)
            raise ApiError(400, text, "file", "invalid_audio") from None
        seconds, reading = samples / model.rate / len(channels), time.perf_counter() - start
        warnings = dict.fromkeys(warning for blocks in found for warning in blocks.warnings)
        return replace(audio, seconds=seconds, reading=reading, channels=len(channels), warnings=tuple(warnings))

    def _check_length(self, seconds: float, density: int, name: str, channels: int = 1) -> None:
        longest = self.config.max_seconds
        if seconds * channels > longest:
            each = f" on each of {channels} channels" if channels > 1 else ""
            text = f"{name} is {seconds:,.0f} s long{each}, over the limit of {longest:g} s: cut it"
            raise ApiError(400, text, "file", "audio_too_long")
        if seconds * density > longest * MAX_DENSITY:
            text = f"{name} is {seconds:,.0f} s of {density:,} samples a second, all channels counted, which is over "
            text += f"the limit of {longest * MAX_DENSITY:,.0f}: convert it to 16 kHz mono"
            raise ApiError(400, text, "file", "audio_too_long")

    async def segments(
        self, model: ServedModel, audio: Audio, fields: AudioRequest, request: Request
    ) -> AsyncGenerator[TranscriptUpdate]:
        """Yield the transcript of a request by ``model`` (see `ServedModel.segments`), and count its audio."""
        try:
            async with aclosing(model.segments(audio, fields, request)) as updates:
                async for update in updates:
                    yield update
        except EngineFailure as error:  # the model is closing
            raise ApiError(503, str(error), code="overloaded") from None
        except (asyncio.CancelledError, GeneratorExit):
            self.metrics.cancelled.labels(model.name).inc()
            raise
        self.metrics.audio.labels(model.name).inc(audio.seconds * audio.channels)


def _channels(fields: AudioRequest, count: int, name: str) -> list[int | None]:
    """Return the channels of audio with ``count`` of them to transcribe; None is the average of all."""
    if isinstance(fields.channel, int) and fields.channel >= count:
        text = f"{name} has no channel {fields.channel}: it has {count}, counted from 0"
        raise ApiError(400, text, "channel")
    return [*range(count)] if fields.channel == "each" else [None if fields.channel == "mix" else fields.channel]


def _discard(running: "Future[Audio]") -> None:
    """Close the result of a cancelled reading."""
    if not running.cancelled() and running.exception() is None:
        running.result().close()


def _closing() -> ApiError:
    return ApiError(503, CLOSING, code="overloaded")
