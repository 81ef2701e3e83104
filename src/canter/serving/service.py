"""Decode uploads, transcribe them with the one engine that all requests share, and count what happens."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import BinaryIO, cast

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
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from canter.corpus.audio import audio_blocks, audio_info
from canter.corpus.manifest import Utterance
from canter.errors import AudioError, ConfigError
from canter.inference.engine.engine import Engine, engine_for
from canter.inference.engine.requests import Request
from canter.inference.languages import (
    detected_language,
    detects_language,
    prompts_written_language,
    spoken_language,
    translation_targets,
)
from canter.inference.recording import Recording, TranscribeConfig, Transcriber
from canter.inference.transcript.chunks import Chunk
from canter.inference.transcript.formats import SUBTITLES
from canter.inference.transcript.reading import ChannelMerger
from canter.inference.transcript.segments import Segment
from canter.serving.config import ServiceConfig
from canter.serving.protocol import TIMESTAMPS, ApiError, AudioRequest
from canter.serving.scheduler import Outcome, Scheduler, Stored, Timing
from canter.serving.upload import anonymous_file, disk_errors, path_of, write_all
from canter.text.languages import find, is_said
from canter.text.whisper import WhisperTokenizer

MAX_DENSITY = 384_000  # values a second that the longest audio may have: eight channels at 48 kHz
TRANSCRIBERS = 32  # settings of requests whose transcribers are kept; a request needs its own three times
BLOCK = 2**22  # values decoded between two checks that the client is still there
LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds


class Samples:
    """Samples of an upload in a file without a name, so that hours of audio do not fill memory while they wait."""

    def __init__(self) -> None:
        with disk_errors():
            self._file = anonymous_file()
        self._bytes = 0

    def add(self, samples: np.ndarray) -> Stored:
        """Append ``samples`` (S,) float32, and return their place. Raise ApiError (507) if the disk is full."""
        place = self._bytes
        data = samples.astype(np.float32, copy=False).tobytes()
        with disk_errors():
            write_all(self._file, data)
        self._bytes += len(data)
        return Stored(self._file, place, len(samples))

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Audio:
    """Decoded audio of an upload."""

    chunks: list[Chunk]
    """Windows with speech, each short enough for the model; their samples are `Stored`."""
    samples: Samples
    """File with the samples of all chunks."""
    seconds: float
    reading: float
    """Seconds that decoding and segmentation took."""
    channels: int = 1
    """Number of channels that are transcribed by themselves."""
    upload: float = 0.0
    """Seconds that the upload took."""
    warnings: tuple[str, ...] = ()
    """Faults of the audio: losses, channels that cancel each other out."""

    def close(self) -> None:
        self.samples.close()


@dataclass(frozen=True)
class TranscriptUpdate:
    """Segments and language of a transcript that became final with one more chunk."""

    segments: list[Segment]
    """The next segments in order, which are final."""
    language: str | None
    """Language of the audio: the requested one, or the one detected so far; None of a model without languages."""
    timing: Timing
    language_probability: float | None = None
    """Probability of the detected language; None if the language was requested."""


class _EngineCounters(Collector):
    """Collector that reads the counters of all engines when Prometheus asks for them."""

    def __init__(self, service: "Service"):
        self._service = service

    def collect(self) -> Iterable[Metric]:
        counters = [scheduler.engine.counters for scheduler in self._service.schedulers]
        stages = CounterMetricFamily(
            "canter_stage_seconds", "Seconds that the engine spent in a stage.", labels=["stage"]
        )
        for stage, name in (("features", "feature"), ("encoder", "encoder"), ("decoder", "decoder")):
            stages.add_metric([stage], sum(getattr(one, f"{name}_seconds") for one in counters))
        yield stages
        for name, text, counter in (
            ("canter_tokens", "Tokens decoded.", "tokens"),
            ("canter_decoder_steps", "Steps of the decoder.", "steps"),
            ("canter_decoder_rows", "Rows computed, summed over decoder steps.", "row_steps"),
            ("canter_decoder_useful_rows", "Computed rows that had not ended.", "useful_row_steps"),
        ):
            yield CounterMetricFamily(name, text, value=sum(getattr(one, counter) for one in counters))


class Metrics:
    """Prometheus metrics of one service, in a registry of their own."""

    def __init__(self, service: "Service"):
        disable_created_metrics()  # one more line for each metric, of no use here
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("canter_requests", "Requests answered.", ["endpoint", "status"], registry=registry)
        text = "Seconds from a request's header to the end of its answer."
        self.latency = Histogram(
            "canter_request_seconds", text, ["endpoint"], buckets=LATENCY_BUCKETS, registry=registry
        )
        self.audio = Counter("canter_audio_seconds", "Seconds of audio transcribed.", registry=registry)
        self.refused = Counter("canter_refused", "Requests refused before any work.", ["reason"], registry=registry)
        self.cancelled = Counter("canter_cancelled", "Requests cancelled before their end.", registry=registry)
        for name, text, value in (
            ("canter_requests_inside", "Requests in the service.", lambda: service.requests),
            ("canter_audio_seconds_inside", "Seconds of audio in the service.", lambda: service.seconds),
            ("canter_pieces_waiting", "Chunks of audio that wait for the engine.", lambda: service.waiting),
            (
                "canter_pieces_inside",
                "Chunks of audio in the engine.",
                lambda: sum(one.inside for one in service.schedulers),
            ),
        ):
            Gauge(name, text, registry=registry).set_function(value)
        registry.register(_EngineCounters(service))
        ProcessCollector(registry=registry)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class Service:
    """The engine's scheduler, the threads that decode audio, and the numbers of requests and seconds inside."""

    def __init__(self, engine: Engine, config: ServiceConfig):
        tokenizer = engine.model.tokenizer
        if tokenizer is None:
            raise ConfigError("the model has no tokenizer, so its tokens cannot be read as text")
        language = config.language if is_said(config.language) else None
        if language is not None:
            try:
                language = spoken_language(tokenizer, language)
            except ConfigError as error:
                raise ConfigError(f"--language: {error}") from None
        config = replace(config, language=language, tokenizer=tokenizer)
        self.engine, self.config, self.tokenizer = engine, config, tokenizer
        self.rate = engine.model.sample_rate
        self._transcriber_with = lru_cache(TRANSCRIBERS)(partial(Transcriber, engine, tokenizer))
        for timestamps in TIMESTAMPS:  # so that a missing detector is an error of the start
            self._transcriber_with(TranscribeConfig(timestamps=timestamps, vad=config.vad))
        self.requests = 0
        self.seconds = 0.0
        self.started = int(time.time())
        self.scheduler = Scheduler(engine)
        self._of_beams: dict[int, Scheduler] = {}
        self.metrics = Metrics(self)
        self._readers = ThreadPoolExecutor(config.readers, thread_name_prefix="canter-audio")
        self._reading: set[threading.Event] = set()

    @property
    def targets(self) -> tuple[str, ...]:
        """Target languages of translation; a Whisper has English only."""
        if len(self.tokenizer.languages) < 2:
            return ()
        return ("en",) if isinstance(self.tokenizer, WhisperTokenizer) else translation_targets(self.tokenizer)

    @property
    def detects(self) -> bool:
        """True for a model that detects the language of the audio, such as a multilingual Whisper."""
        return detects_language(self.tokenizer)

    @property
    def schedulers(self) -> list[Scheduler]:
        """Queues of the engine: that of greedy search, and one for each beam size that was asked for."""
        return [self.scheduler, *self._of_beams.values()]

    @property
    def alive(self) -> bool:
        return all(scheduler.alive for scheduler in self.schedulers)

    @property
    def waiting(self) -> int:
        """Number of chunks that the engines have not taken yet."""
        return sum(scheduler.waiting for scheduler in self.schedulers)

    def _scheduler(self, beams: int) -> Scheduler:
        """Return the queue for a beam size; its engine, with a cache of its own, is made on the first request."""
        if beams == self.engine.config.beams:
            return self.scheduler
        if beams not in self._of_beams:
            engine = engine_for(self.engine.model, self.engine.end, replace(self.engine.config, beams=beams))
            self._of_beams[beams] = Scheduler(engine)
        return self._of_beams[beams]

    def close(self) -> None:
        for stop in self._reading:
            stop.set()
        for scheduler in self.schedulers:
            scheduler.close()
        self._readers.shutdown(cancel_futures=True)  # each ends after its current block and closes its file

    async def warm_up(self) -> None:
        """Decode a second of noise, so that the first request does not pay for initialisation."""
        fields = AudioRequest("transcribe", self.config.language or next(iter(self.tokenizer.languages), None))
        noise = np.random.default_rng(0).normal(scale=1e-3, size=self.rate)  # some libraries divide by silence
        audio = self._stored([Chunk(0.0, noise.astype(np.float32))])
        try:
            async for _ in self.segments(audio, fields, self.request(fields)):
                pass
        finally:
            audio.close()

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

    async def read(self, file: BinaryIO, name: str, fields: AudioRequest) -> Audio:
        """Decode an upload in a thread, and close its ``file`` (open, on disk). The caller closes the result.

        Cancelling the call stops the thread. Raises ApiError: 400 for files that are not audio, damaged, or too long,
        507 for a full disk.
        """
        stop = threading.Event()
        self._reading.add(stop)
        try:
            running = self._readers.submit(self._read, file, name, fields, stop)
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

    def _read(self, file: BinaryIO, name: str, fields: AudioRequest, stop: threading.Event) -> Audio:
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
                    self.rate,
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
                    self._check_length(samples / self.rate, density, name)
                    yield block

            transcriber = self._transcriber(fields)
            audio = self._stored(
                replace(chunk, channel=channel if fields.channel == "each" else None)
                for channel, blocks in zip(channels, found)
                for chunk in transcriber.chunks(checked(blocks))
            )
        except AudioError as error:
            text = str(error).replace(path, name)
            raise ApiError(400, text, "file", "invalid_audio") from None
        seconds, reading = samples / self.rate / len(channels), time.perf_counter() - start
        warnings = dict.fromkeys(warning for blocks in found for warning in blocks.warnings)
        return replace(audio, seconds=seconds, reading=reading, channels=len(channels), warnings=tuple(warnings))

    def _stored(self, chunks: Iterable[Chunk]) -> Audio:
        """Return the chunks as an upload whose samples are on disk."""
        samples, kept = Samples(), list[Chunk]()
        try:
            for chunk in chunks:
                # A waiting request needs only the length of its samples; the scheduler reads them.
                kept.append(replace(chunk, samples=cast(np.ndarray, samples.add(chunk.samples))))
        except BaseException:
            samples.close()
            raise
        return Audio(kept, samples, sum(len(chunk.samples) for chunk in kept) / self.rate, 0.0)

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

    def _transcriber(self, fields: AudioRequest) -> Transcriber:
        """Return the transcriber that asks the model for the times that the answer contains.

        Subtitles need the times of words, if the model has them: their cues end with sentences.
        """
        cues = fields.response_format in SUBTITLES or fields.hallucination_silence_threshold is not None
        config = TranscribeConfig(
            "word" if cues and self.engine.aligns else fields.timestamps,
            fields.chunk_seconds,
            vad=fields.vad or self.config.vad,
            vad_options=fields.vad_options,
            each_channel=fields.channel == "each",
            languages=fields.languages,
            clip_timestamps=fields.clip_timestamps,
            hallucination_silence_threshold=fields.hallucination_silence_threshold,
            logprobs=fields.logprobs,
        )
        return self._transcriber_with(config)

    def request(self, fields: AudioRequest) -> Request:
        """Return the engine's request, without audio. Raise ApiError, naming the field, if the model cannot do it."""
        languages = self.tokenizer.languages
        known = ", ".join(languages)
        source = fields.language or (languages[0] if len(languages) == 1 else None)
        if fields.task == "translate" and not self.targets:
            knows = "transcribes" if len(languages) > 1 else f"knows {known or 'one language'} only"
            raise ApiError(400, f"this model {knows} and does not translate", "model")
        unneeded = fields.task == "translate" and prompts_written_language(self.tokenizer)
        if source is None and languages and not self.detects and not unneeded:
            text = f"this model needs the language of the audio: {known}"
            raise ApiError(400, text, "language", "missing_language")
        if source and languages and source not in languages:
            raise ApiError(400, f"language {source!r} is not one of the model's: {known}", "language")
        if fields.hallucination_silence_threshold is not None and not self.engine.aligns:
            text = "this model has no times of words, which hallucination_silence_threshold needs"
            raise ApiError(400, text, "hallucination_silence_threshold")
        if fields.timestamps == "word" and not self.engine.aligns:
            raise ApiError(400, "this model has no times of words", "timestamp_granularities[]")
        if fields.temperature and "cached_decoding" not in self.engine.model.supports:
            raise ApiError(400, "another library decodes this model, at temperature 0 only", "temperature")
        if "cached_decoding" not in self.engine.model.supports:
            for name, asked in (("hotwords", fields.hotwords), ("include[]", fields.logprobs)):
                if asked:
                    raise ApiError(400, "another library decodes this model, which cannot do that", name)
        target = source if fields.task == "transcribe" else fields.to_language or find("en", self.targets) or "en"
        if fields.task == "translate" and target not in self.targets:
            text = f"to_language {target!r} is not one that the model translates into: {', '.join(self.targets)}"
            raise ApiError(400, text, "to_language")
        given = {"source_lang": source, "target_lang": target}
        slots = {name: value for name, value in given.items() if value}
        slots["task"] = "asr" if fields.task == "transcribe" else "ast"
        transcriber = self._transcriber(fields)
        slots = transcriber.with_timestamps(slots)
        try:
            request = transcriber.request(slots, fields.prompt)
        except ConfigError:
            raise ApiError(400, "this model takes no 'prompt'", "prompt") from None
        try:
            words = transcriber.hotwords(fields.hotwords, slots)
        except ConfigError as error:
            raise ApiError(400, str(error), "hotwords") from None
        if fields.temperature or not fields.fallback:
            request = transcriber.at_temperature(request, fields.temperature)
        guarded = fields.guarded and (request.guarded or not fields.fallback)
        return replace(request, adapter=fields.adapter, hotwords=words, guarded=guarded)

    async def segments(self, audio: Audio, fields: AudioRequest, request: Request) -> AsyncGenerator[TranscriptUpdate]:
        """Yield the transcript in order, as soon as a chunk is decoded; ``request`` is the result of `Service.request`.

        Closing the iterator early cancels the remaining chunks.
        """
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(outcome: Outcome) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(outcomes.put_nowait, outcome)

        transcriber, requests = self._transcriber(fields), list[Request]()
        recordings: list[Recording] = []
        places: list[tuple[Recording, int]] = []  # of each request: its channel, and the number of its chunk there
        for channel in dict.fromkeys(chunk.channel for chunk in audio.chunks):
            recording = Recording(transcriber, request, channel=channel, part=len(recordings))
            recordings.append(recording)
            new = list(recording.requests(chunk for chunk in audio.chunks if chunk.channel == channel))
            places += [(recording, number) for number in range(len(new))]
            requests += new
        merger = ChannelMerger(len(recordings))
        scheduler = self._scheduler(fields.beam_size)
        ticket = scheduler.submit(requests, deliver)
        try:
            for _ in requests:
                outcome = await outcomes.get()
                if isinstance(outcome.error, AudioError):
                    raise ApiError(400, str(outcome.error), "file", "invalid_audio")
                if outcome.hypothesis is None:
                    raise ApiError(500, str(outcome.error))
                recording, number = places[outcome.chunk]
                final = recording.add(number, outcome.hypothesis)
                if len(recordings) > 1:
                    final = merger.add(recording.part, final, recording.final_until)
                parts = [part for one in recordings for part in one.languages]
                detected, probability = detected_language(transcriber.among, parts) or (None, None)
                language = fields.language or detected or next(iter(self.tokenizer.languages), None)
                yield TranscriptUpdate(final, language, outcome.timing, probability)
            self.metrics.audio.inc(audio.seconds * audio.channels)
        finally:
            if ticket.left:
                self.metrics.cancelled.inc()
                scheduler.cancel(ticket)


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
    return ApiError(503, "the service is shutting down", code="overloaded")
