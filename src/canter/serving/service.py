"""From an upload to the segments of its transcript, through the one engine that all requests share."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import BinaryIO, cast

import numpy as np

from canter.corpus.audio import audio_blocks, audio_info
from canter.corpus.manifest import Utterance
from canter.errors import AudioError, ConfigError
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import Request
from canter.inference.languages import detects_language
from canter.inference.recording import Recording, TranscribeConfig, Transcriber
from canter.inference.transcript.chunks import Chunk
from canter.inference.transcript.formats import SUBTITLES
from canter.inference.transcript.segments import Segment
from canter.serving.config import ServiceConfig
from canter.serving.metrics import Metrics
from canter.serving.protocol import TIMESTAMPS, ApiError, Asked
from canter.serving.scheduler import Outcome, Scheduler, Stored, Timing
from canter.serving.upload import anonymous_file, disk_told, path_of, write_all
from canter.text.languages import is_said, resolve

DENSEST = 384_000  # values a second that the longest audio may have: eight channels at 48 kHz
BLOCK = 2**22  # values decoded before a reader looks whether anybody still waits for them


class Samples:
    """The samples of an upload in a file without a name, so that hours of them wait without filling memory."""

    def __init__(self) -> None:
        with disk_told():
            self._file = anonymous_file()
        self._bytes = 0

    def add(self, samples: np.ndarray) -> Stored:
        """Append ``samples`` (S,) float32, and return where they are. Raises ApiError (507) where the disk is full."""
        place = self._bytes
        data = samples.astype(np.float32, copy=False).tobytes()
        with disk_told():
            write_all(self._file, data)
        self._bytes += len(data)
        return Stored(self._file, place, len(samples))

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Audio:
    """An upload, decoded."""

    pieces: list[Chunk]
    """Windows that the model takes at once, where somebody speaks; their samples are `Stored`."""
    samples: Samples
    """The file in which all of them lie."""
    seconds: float
    reading: float
    """Seconds that decoding and cutting took."""
    upload: float = 0.0
    """Seconds that it took to arrive."""
    warnings: tuple[str, ...] = ()
    """Faults of the audio: losses, channels that cancel each other out."""

    def close(self) -> None:
        self.samples.close()


@dataclass(frozen=True)
class Heard:
    """What has become known by one more piece."""

    segments: list[Segment]
    """Which nothing will change any more; the next ones in order."""
    language: str
    """Language of the audio: the one asked for, or the one detected so far."""
    timing: Timing
    """Of the request, so far."""
    language_probability: float | None = None
    """Probability of a detected language; None where it was asked for."""


class Service:
    """Holds the engine's thread, the threads that decode audio, and the count of who is inside."""

    def __init__(self, engine: Engine, config: ServiceConfig):
        tokenizer = engine.model.tokenizer
        if tokenizer is None:
            raise ConfigError("the model has no tokenizer, so its tokens cannot be read as text")
        lang = config.lang if is_said(config.lang) else None
        if lang is not None:
            try:
                lang = resolve(lang, tokenizer.languages)
            except ConfigError as error:
                raise ConfigError(f"--lang: {error}") from None
        config = replace(config, lang=lang, languages=tokenizer.languages)
        self.engine, self.config, self.tokenizer = engine, config, tokenizer
        self.rate = engine.model.config.features.sample_rate
        self.transcribers = {
            timestamps: Transcriber(engine, tokenizer, TranscribeConfig(timestamps=timestamps, vad=config.vad))
            for timestamps in TIMESTAMPS
        }
        self.requests = 0
        self.seconds = 0.0
        self.started = int(time.time())
        self.scheduler = Scheduler(engine)
        self.metrics = Metrics(self.scheduler, lambda: self.requests, lambda: self.seconds)
        self._readers = ThreadPoolExecutor(config.readers, thread_name_prefix="canter-audio")
        self._reading: set[threading.Event] = set()

    @property
    def targets(self) -> tuple[str, ...]:
        """Languages that the model translates into; Whisper's into English alone."""
        if len(self.tokenizer.languages) == 1:
            return ()
        return self.tokenizer.languages if "target_lang" in self._slots else ("en",)

    @property
    def detects(self) -> bool:
        """Whether the model can tell the language: Whisper's prompt names it at once after its first token."""
        return detects_language(self.tokenizer)

    @property
    def _slots(self) -> tuple[str, ...]:
        return self.transcribers["none"].format

    def close(self) -> None:
        for stop in self._reading:
            stop.set()
        self.scheduler.close()
        self._readers.shutdown(cancel_futures=True)  # each ends with its block and takes its file with it

    async def warm_up(self) -> None:
        """Decodes a second of silence, so that the first request finds everything in place."""
        asked = Asked("transcribe", self.config.lang or self.tokenizer.languages[0])
        audio = self._stored([Chunk(0.0, np.zeros(self.rate, np.float32))])
        try:
            async for _ in self.segments(audio, asked, self.request(asked)):
                pass
        finally:
            audio.close()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place inside for one request. Raises ApiError (503) where there is none."""
        if self.requests >= self.config.queue or not self.scheduler.alive:
            raise self._busy()
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextmanager
    def room_for(self, audio: Audio) -> Iterator[None]:
        """Room inside for a request's audio. Raises ApiError (503) where there is none."""
        if self.seconds + audio.seconds > max(self.config.queue_seconds, audio.seconds):
            raise self._busy()
        self.seconds += audio.seconds
        try:
            yield
        finally:
            self.seconds -= audio.seconds

    def _busy(self) -> ApiError:
        self.metrics.refused.labels("busy").inc()
        return ApiError(503, "the service is full; try again in a moment", code="overloaded")

    async def read(self, file: BinaryIO, name: str) -> Audio:
        """Decode an upload, whose ``file`` (open, on disk) is closed once nothing reads it; close the result too.

        Raises ApiError: 400 for what is no audio, damaged, or too long, 507 where the disk is full. Whoever stops
        waiting stops the reading too: a thread would go on with what nobody wants.
        """
        stop = threading.Event()
        self._reading.add(stop)
        try:
            running = self._readers.submit(self._read, file, name, stop)
        except RuntimeError:  # it does not take any more
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

    def _read(self, file: BinaryIO, name: str, stop: threading.Event) -> Audio:
        begun, path, heard, warnings = time.perf_counter(), path_of(file), 0, list[str]()

        def counted() -> Iterator[np.ndarray]:
            nonlocal heard
            for block in self._blocks(path, name, stop, warnings):
                heard += len(block)
                yield block

        try:
            audio = self._stored(self.transcribers["none"].chunks(counted()))
        except AudioError as error:
            text = str(error).replace(path, name)
            raise ApiError(400, text, "file", "invalid_audio") from None
        seconds, reading = heard / self.rate, time.perf_counter() - begun
        return replace(audio, seconds=seconds, reading=reading, warnings=tuple(warnings))

    def _stored(self, pieces: Iterable[Chunk]) -> Audio:
        """Return the pieces as an upload whose samples are on disk."""
        samples, kept = Samples(), list[Chunk]()
        try:
            for piece in pieces:
                # In place of an array: what waits is only asked for its length, and the scheduler reads it.
                kept.append(replace(piece, samples=cast(np.ndarray, samples.add(piece.samples))))
        except BaseException:
            samples.close()
            raise
        return Audio(kept, samples, sum(len(piece.samples) for piece in kept) / self.rate, 0.0)

    def _blocks(self, path: str, name: str, stop: threading.Event, warnings: list[str]) -> Iterator[np.ndarray]:
        """Yield the upload's samples in blocks (S,) that take a moment each, and note what is
        damaged."""
        density, heard = self._density(path, name), 0
        blocks = audio_blocks(Utterance(path, 0.0, text=""), self.rate, min(30.0, BLOCK / density), keep_damaged=True)
        for block in blocks:
            _go_on(stop)
            heard += len(block)
            self._check_length(heard / self.rate, density, name)
            yield block
        warnings += blocks.warnings

    def _density(self, path: str, name: str) -> int:
        """Values that a second of the upload is decoded to, channels counted. Raises ApiError for what its
        header alone tells to be too much."""
        header = audio_info(path)
        density = header.rate * header.channels
        if header.seconds is not None:
            self._check_length(header.seconds, density, name)
        return density

    def _check_length(self, seconds: float, density: int, name: str) -> None:
        longest = self.config.longest_seconds
        if seconds > longest:
            text = f"{name} is {seconds:,.0f} s long, over the limit of {longest:g} s: cut it"
            raise ApiError(400, text, "file", "audio_too_long")
        if seconds * density > longest * DENSEST:
            raise ApiError(
                400,
                f"{name} is {seconds:,.0f} s of {density:,} samples a second, all channels counted, which is over "
                f"the limit of {longest * DENSEST:,.0f}: convert it to 16 kHz mono",
                "file",
                "audio_too_long",
            )

    def _transcriber(self, asked: Asked) -> Transcriber:
        """Return what asks the model for the times that the answer needs; cues end where sentences do, at the times of
        their words where the model can tell those."""
        cues = asked.response_format in SUBTITLES
        return self.transcribers["word" if cues and self.engine.aligns else asked.timestamps]

    def request(self, asked: Asked) -> Request:
        """What the engine is asked, the audio apart. Raises ApiError naming the field that does not fit the
        model."""
        languages = self.tokenizer.languages
        known = ", ".join(languages)
        source = asked.language or (languages[0] if len(languages) == 1 else None)
        if asked.task == "translate" and not self.targets:
            raise ApiError(400, f"this model knows {languages[0]} alone and does not translate", "model")
        if source is None and not self.detects:
            text = f"this model must be told the language of the audio: {known}"
            raise ApiError(400, text, "language", "missing_language")
        if source and source not in languages:
            raise ApiError(400, f"language {source!r} is not one of the model's: {known}", "language")
        target = source if asked.task == "transcribe" else asked.to_language or "en"
        if asked.task == "translate" and target not in self.targets:
            raise ApiError(
                400,
                f"to_language {target!r} is not one that the model translates into: {', '.join(self.targets)}",
                "to_language",
            )
        given = {"source_lang": source, "target_lang": target}
        slots = {name: value for name, value in given.items() if value}
        slots["task"] = "asr" if asked.task == "transcribe" else "ast"
        transcriber = self._transcriber(asked)
        try:
            request = transcriber.request(transcriber.with_timestamps(slots), asked.prompt)
        except ConfigError:
            raise ApiError(400, "this model takes no 'prompt'", "prompt") from None
        if asked.temperature:
            request = transcriber.at_temperature(request, asked.temperature)
        return request

    async def segments(self, audio: Audio, asked: Asked, request: Request) -> AsyncGenerator[Heard]:
        """What is heard, piece by piece in order, as soon as it is decoded; ``request`` is what ``request``
        made of ``asked``. Leaving the iteration early takes the rest out of the engine."""
        transcriber = self._transcriber(asked)
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(outcome: Outcome) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(outcomes.put_nowait, outcome)

        recording = Recording(transcriber, request)
        requests = list(recording.requests(audio.pieces))
        ticket = self.scheduler.submit(requests, deliver)
        try:
            for _ in requests:
                outcome = await outcomes.get()
                if outcome.hypothesis is None:
                    raise ApiError(500, str(outcome.error))
                final = recording.add(outcome.piece, outcome.hypothesis)
                detected, probability = recording.detected or (None, None)
                language = asked.language or detected or self.tokenizer.languages[0]
                yield Heard(final, language, outcome.timing, probability)
            self.metrics.audio.inc(audio.seconds)
        finally:
            if ticket.left:
                self.metrics.cancelled.inc()
                self.scheduler.cancel(ticket)


def _discard(running: "Future[Audio]") -> None:
    """Close the result of a reading that nobody waits for any more."""
    if not running.cancelled() and running.exception() is None:
        running.result().close()


def _go_on(stop: threading.Event) -> None:
    if stop.is_set():  # nobody hears this, unless the service is closing
        raise _closing()


def _closing() -> ApiError:
    return ApiError(503, "the service is shutting down", code="overloaded")
