"""From an upload to the segments of its transcript, through the one engine that all requests share."""

import asyncio
import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from canter.corpus.audio import audio_seconds, load_audio
from canter.errors import AudioError, ConfigError
from canter.inference.engine import Engine, Request
from canter.inference.segments import Segment
from canter.inference.transcribe import most_seconds
from canter.serving.config import ServiceConfig
from canter.serving.metrics import Metrics
from canter.serving.protocol import ApiError, Asked
from canter.serving.scheduler import Outcome, Scheduler, Timing
from canter.text.prompts import CONTEXTS, FORMATS

_FOR_MANIFESTS = re.compile(r"(;| or) remove the row")


@dataclass(frozen=True)
class Audio:
    """An upload, decoded."""

    samples: np.ndarray  # (S,) float32 at the model's rate
    seconds: float
    reading: float
    """Seconds that decoding took."""
    upload: float = 0.0
    """Seconds that it took to arrive."""


class Service:
    """Holds the engine's thread, the threads that decode audio, and the count of who is inside."""

    def __init__(self, engine: Engine, config: ServiceConfig):
        tokenizer = engine.model.tokenizer
        if tokenizer is None:
            raise ConfigError("the model has no tokenizer, so its tokens cannot be read as text")
        if config.lang and config.lang not in tokenizer.languages:
            raise ConfigError(f"--lang {config.lang}: the model knows {', '.join(tokenizer.languages)}")
        self.engine, self.config, self.tokenizer = engine, config, tokenizer
        self.rate = engine.model.config.features.sample_rate
        self.longest = min(config.longest_seconds, most_seconds(engine.model))
        self.requests = 0
        self.seconds = 0.0
        self.started = int(time.time())
        self.scheduler = Scheduler(engine)
        self.metrics = Metrics(self.scheduler, lambda: self.requests, lambda: self.seconds)
        self._readers = ThreadPoolExecutor(config.readers, thread_name_prefix="canter-audio")

    @property
    def targets(self) -> tuple[str, ...]:
        """Languages that the model translates into; Whisper's into English alone."""
        if len(self.tokenizer.languages) == 1:
            return ()
        return self.tokenizer.languages if "target_lang" in self._slots else ("en",)

    @property
    def _slots(self) -> tuple[str, ...]:
        return FORMATS[getattr(self.tokenizer, "prompt_format", "whisper")]

    def close(self) -> None:
        self.scheduler.close()
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def warm_up(self) -> None:
        """Decodes a second of silence, so that the first request finds everything in place."""
        asked = Asked("transcribe", self.config.lang or self.tokenizer.languages[0])
        audio = Audio(np.zeros(self.rate, np.float32), 1.0, 0.0)
        async for _ in self.segments(audio, asked):
            pass

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

    def _busy(self) -> ApiError:
        self.metrics.refused.labels("busy").inc()
        return ApiError(503, "the service is full; try again in a moment", code="overloaded")

    async def read(self, file: BinaryIO, name: str) -> Audio:
        """The samples of an upload. Raises ApiError (400) for what is no audio, damaged, or too long."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, file, name)

    def _read(self, file: BinaryIO, name: str) -> Audio:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="canter-") as folder:
            path = os.path.join(folder, "upload")
            with open(path, "wb") as target:
                file.seek(0)
                shutil.copyfileobj(file, target, 2**20)
            try:
                self._check_length(audio_seconds(path), name)
                samples = load_audio(path, sample_rate=self.rate)
            except AudioError as error:
                text = _FOR_MANIFESTS.sub("", str(error)).replace(path, name)
                raise ApiError(400, text, "file", "invalid_audio") from None
        self._check_length(len(samples) / self.rate, name)
        return Audio(samples, len(samples) / self.rate, time.perf_counter() - begun)

    def _check_length(self, seconds: float, name: str) -> None:
        if seconds > self.longest:
            raise ApiError(
                400,
                f"{name} is {seconds:,.0f} s long, over the limit of {self.longest:g} s: cut it",
                "file",
                "audio_too_long",
            )

    def prompt(self, asked: Asked) -> list[int]:
        """The decoder's first tokens. Raises ApiError naming the field that does not fit the model."""
        if asked.temperature:
            raise ApiError(
                400,
                f"temperature {asked.temperature:g}: this service decodes the likeliest tokens; leave it at 0",
                "temperature",
            )
        languages = self.tokenizer.languages
        source = asked.language or (languages[0] if len(languages) == 1 else None)
        target = source if asked.task == "transcribe" else asked.to_language or "en"
        if asked.task == "translate" and not self.targets:
            raise ApiError(400, f"this model knows {languages[0]} alone and does not translate", "model")
        known = ", ".join(languages)
        if source is None:
            raise ApiError(
                400,
                f"this model must be told the language of the audio: {known}",
                "language",
                "missing_language",
            )
        if source not in languages:
            raise ApiError(400, f"language {source!r} is not one of the model's: {known}", "language")
        if asked.task == "translate" and target not in self.targets:
            raise ApiError(
                400,
                f"to_language {target!r} is not one that the model translates into: {', '.join(self.targets)}",
                "to_language",
            )
        slots = {
            "source_lang": source,
            "target_lang": str(target),
            "task": "asr" if asked.task == "transcribe" else "ast",
        }
        return self._with_context(slots, asked.prompt)

    def _with_context(self, slots: dict[str, str], context: str) -> list[int]:
        """The prompt, with as much of the text before as leaves half of the decoder's positions free."""
        slot = next((part for part in self._slots if part in CONTEXTS), None)
        if not context:
            return self.tokenizer.prompt_ids(slots)
        if slot is None:
            raise ApiError(400, "this model takes no 'prompt'", "prompt")
        words = context.split()
        most = self.engine.model.config.decoder.positions // 2
        while len(ids := self.tokenizer.prompt_ids({**slots, slot: " ".join(words)})) > most and words:
            words = words[max(1, len(words) // 8) :]
        return ids

    async def segments(self, audio: Audio, asked: Asked) -> AsyncGenerator[tuple[Segment, Timing]]:
        """The segments as they are decoded, in order, each with the time that its part took. Leaving the
        iteration early takes the rest out of the engine."""
        if self.seconds + audio.seconds > max(self.config.queue_seconds, audio.seconds):
            raise self._busy()
        pieces = [(0.0, audio.samples)]
        prompt = self.prompt(asked)
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(outcome: Outcome) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(outcomes.put_nowait, outcome)

        self.seconds += audio.seconds
        ticket = self.scheduler.submit([Request(samples, prompt) for _, samples in pieces], deliver)
        try:
            done: dict[int, Outcome] = {}
            for number, (offset, samples) in enumerate(pieces):
                while number not in done:
                    outcome = await outcomes.get()
                    done[outcome.piece] = outcome
                outcome = done.pop(number)
                if outcome.error or outcome.hypothesis is None:
                    raise ApiError(500, str(outcome.error))
                tokens = outcome.hypothesis.tokens
                text = self.tokenizer.decode(tokens).strip()
                end = offset + len(samples) / self.rate
                yield Segment(offset, end, text, tuple(tokens)), outcome.timing
            self.metrics.audio.inc(audio.seconds)
        finally:
            self.seconds -= audio.seconds
            if ticket.left:
                self.metrics.cancelled.inc()
                self.scheduler.cancel(ticket)
