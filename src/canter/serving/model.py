"""One model of the service: how to load it, and once it is loaded, its engine, queues, transcribers and languages."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import numpy as np

from canter.errors import AudioError, ConfigError
from canter.inference.engine.engine import Engine, default_window, engine_for, suppressed_tokens
from canter.inference.engine.requests import Counters, EngineConfig, Request
from canter.inference.languages import (
    detected_language,
    detects_language,
    prompts_written_language,
    read_languages,
    spoken_language,
    translation_targets,
)
from canter.inference.loading import drafting_engine, load_engine, tokenizer_of
from canter.inference.recording import ChunkKey, Recording, TranscribeConfig, Transcriber
from canter.inference.transcript.chunks import Chunk
from canter.inference.transcript.formats import SUBTITLES
from canter.inference.transcript.reading import ChannelMerger
from canter.inference.transcript.segments import Segment
from canter.loading import Precision, base_folder
from canter.models.model import SpeechModel
from canter.models.protocol import AnyModel, check_support, module_of
from canter.runtime import tensor_bytes
from canter.serving.audio import Audio, stored
from canter.serving.config import ServiceConfig
from canter.serving.protocol import TIMESTAMPS, ApiError, AudioRequest
from canter.serving.scheduler import Outcome, Scheduler, Timing
from canter.text.languages import find, is_said
from canter.text.whisper import WhisperTokenizer

TRANSCRIBERS = 32  # settings of requests whose transcribers are kept; a request needs its own three times
WEIGHT_FILES = (("*.safetensors",), ("*.bin", "exp/*/*.pth"))  # the second where there are none of the first


@dataclass(frozen=True)
class ModelSource:
    """A model that the service offers: its names, and what to load."""

    names: tuple[str, ...]
    """Names by which clients may ask for the model; the first one is shown."""
    model: Path | AnyModel
    """Checkpoint on disk; or a model that is in memory already, whose memory stays in use when it is unloaded."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    device: str = "auto"
    precision: Precision = "float32"
    adapter: Path | None = None
    """Folder of a LoRA adapter to merge into the model."""
    draft: str = "auto"
    """Source of drafts (see `load_engine`)."""
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Folders of adapters that stay apart, by the names by which clients ask for the model with one of them."""

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise ConfigError("the model needs a name that clients can ask for")
        both = sorted({*self.names} & {*self.adapter_names})
        if both:
            raise ConfigError(f"--adapter {both[0]}: that is a name of the model itself; choose another")

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order of their numbers in the model's bank, which begin with 1."""
        if isinstance(self.model, Path):
            return (*self.adapters,)
        bank = getattr(self.model, "bank", None)
        return (*bank.numbers,) if bank is not None else ()

    def load(self) -> Engine:
        """Load the model and return its engine. Raises what `load_engine` raises."""
        if isinstance(self.model, Path):
            given = {"device": self.device, "precision": self.precision, "adapter": self.adapter}
            engine = load_engine(self.model, self.engine, **given, adapters=self.adapters, draft=self.draft)
        else:
            tokenizer = tokenizer_of(self.model, self.name)
            engine = drafting_engine(self.model, tokenizer, self.engine, self.draft, self.precision)
        if self.engine.max_repeats != EngineConfig.max_repeats:
            check_support(engine.model, {"--max-repeats": "repetition_guard"}, self.name)
        return engine

    def weight_bytes(self) -> int:
        """Return the bytes of the files with the weights: what the model takes at least, before it has been loaded. 0
        for a model in memory."""
        if not isinstance(self.model, Path):
            return 0
        base = base_folder(self.model)
        if base.is_file():
            return base.stat().st_size
        for patterns in WEIGHT_FILES:
            if files := [file for pattern in patterns for file in base.glob(pattern)]:
                return sum(file.stat().st_size for file in files)
        return 0


@dataclass(frozen=True)
class ModelProfile:
    """Properties of a model, which stay known after it has been unloaded."""

    languages: tuple[str, ...]
    language: str | None
    """Language of requests that name none."""
    targets: tuple[str, ...]
    """Target languages of translation."""
    detects: bool
    """True for a model that detects the language of the audio."""
    words: bool
    """True for a model that has times of words."""
    bytes: int
    """Memory of the model (see `ServedModel.bytes`) when it was loaded."""


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


class ServedModel:
    """A loaded model: its engine with the queues, and the transcribers that requests share."""

    def __init__(self, source: ModelSource, engine: Engine, config: ServiceConfig):
        """Raise ConfigError for a model without a tokenizer, one that does not know the default language, and a missing
        voice activity detector."""
        self.source, self.engine, self.config = source, engine, config
        self.tokenizer = tokenizer_of(engine.model, source.name)
        self.language = config.language if is_said(config.language) else None
        if self.language is not None:
            try:
                self.language = spoken_language(self.tokenizer, self.language)
            except ConfigError as error:
                raise ConfigError(f"--language: {error} ({source.name})") from None
        self.rate = engine.model.sample_rate
        self._transcriber_with = lru_cache(TRANSCRIBERS)(partial(Transcriber, engine, self.tokenizer))
        for timestamps in TIMESTAMPS:  # so that a missing detector is an error of the start
            self._transcriber_with(TranscribeConfig(timestamps=timestamps, vad=config.vad))
        drafters = [engine.drafter] if isinstance(engine.drafter, Engine) else []
        modules = [module_of(one.model) for one in (engine, *drafters)]
        self._weights = tensor_bytes([one for module in modules for one in (*module.parameters(), *module.buffers())])
        self._weights += sum(map(cache_bytes, drafters))
        self.scheduler = Scheduler(engine)
        self._of_beams: dict[int, Scheduler] = {}

    @property
    def name(self) -> str:
        return self.source.name

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
    def first_language(self) -> str | None:
        """The first of its languages; None of a model without languages."""
        return next(iter(self.tokenizer.languages), None)

    @property
    def profile(self) -> ModelProfile:
        languages = (*self.tokenizer.languages,)
        return ModelProfile(languages, self.language, self.targets, self.detects, self.engine.aligns, self.bytes)

    @property
    def bytes(self) -> int:
        """Memory of the model, and of the one that writes its drafts, if any: weights as they are, and the decoder's
        caches of all its engines when all of their rows are in use.

        The caches are computed from shapes (`cache_bytes`), because they grow as rows enter. Activations are not
        counted: they are those of one batch of the encoder and one step of the decoder, which exist only while the
        model computes. Of another library's model, only the weights are counted.
        """
        return self._weights + sum(cache_bytes(scheduler.engine) for scheduler in self.schedulers)

    @property
    def schedulers(self) -> list[Scheduler]:
        """Queues of the engine: that of greedy search, and one for each beam size that was asked for."""
        return [self.scheduler, *self._of_beams.values()]

    @property
    def counters(self) -> list[Counters]:
        """Counters of its engines."""
        return [scheduler.engine.counters for scheduler in self.schedulers]

    @property
    def alive(self) -> bool:
        return all(scheduler.alive for scheduler in self.schedulers)

    @property
    def waiting(self) -> int:
        """Number of chunks that the engines have not taken yet."""
        return sum(scheduler.waiting for scheduler in self.schedulers)

    @property
    def inside(self) -> int:
        """Number of chunks in the engines."""
        return sum(scheduler.inside for scheduler in self.schedulers)

    def close(self) -> None:
        for scheduler in self.schedulers:
            scheduler.close()

    async def warm_up(self) -> None:
        """Decode a second of noise, so that the first request does not pay for initialisation."""
        fields = AudioRequest("transcribe", self.language or self.first_language)
        noise = np.random.default_rng(0).normal(scale=1e-3, size=self.rate)  # some libraries divide by silence
        audio = stored([Chunk(0.0, noise.astype(np.float32))], self.rate)
        try:
            async for _ in self.segments(audio, fields, self.request(fields)):
                pass
        finally:
            audio.close()

    def _scheduler(self, beams: int) -> Scheduler:
        """Return the queue for a beam size; its engine, with a cache of its own, is made on the first request."""
        if beams == self.engine.config.beams:
            return self.scheduler
        if beams not in self._of_beams:
            config = replace(self.engine.config, beams=beams, draft="off")
            engine = engine_for(self.engine.model, self.engine.end, config)
            self._of_beams[beams] = Scheduler(engine)
        return self._of_beams[beams]

    def transcriber(self, fields: AudioRequest) -> Transcriber:
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
            condition_on_previous_text=fields.condition_on_previous_text,
            prompt=fields.prompt if fields.condition_on_previous_text else "",  # `Recording.conditioned` repeats it
        )
        return self._transcriber_with(config)

    def completed(self, fields: AudioRequest) -> AudioRequest:
        """Return the fields with languages in the model's codes, the default language, and the adapter's number.

        Raises ApiError (400), naming the field, for a language that the model does not know.
        """
        try:
            language, several = read_languages(self.tokenizer, [*fields.languages])
            among = several or ((spoken_language(self.tokenizer, language),) if language else ())
        except ConfigError as error:
            raise ApiError(400, f"languages: {error}", "languages") from None
        numbers = {name: number for number, name in enumerate(self.source.adapter_names, 1)}
        return replace(
            fields,
            language=self._code("language", fields.language) or (None if among else self.language),
            to_language=self._code("to_language", fields.to_language),
            languages=among,
            adapter=numbers.get(fields.model, 0),
        )

    def _code(self, name: str, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            return spoken_language(self.tokenizer, value)
        except ConfigError as error:
            raise ApiError(400, f"{name}: {error}", name) from None

    def request(self, fields: AudioRequest) -> Request:
        """Return the engine's request, without audio, of fields that are `completed`. Raise ApiError, naming the field,
        if the model cannot do it."""
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
            for name, asked in (
                ("hotwords", fields.hotwords),
                ("include[]", fields.logprobs),
                ("suppress_tokens", fields.suppress_tokens not in (None, (-1,))),
            ):
                if asked:
                    raise ApiError(400, "another library decodes this model, which cannot do that", name)
        if fields.condition_on_previous_text and "previous_text" not in self.engine.model.supports:
            text = "this model takes no text before what it transcribes; leave condition_on_previous_text out"
            raise ApiError(400, text, "condition_on_previous_text")
        if fields.suppress_tokens is not None:
            try:
                suppressed_tokens(self.engine.model, self.engine.end, fields.suppress_tokens)
            except ConfigError as error:
                raise ApiError(400, str(error), "suppress_tokens") from None
        slots, transcriber = self._slots(fields), self.transcriber(fields)
        if fields.task == "translate" and slots["target_lang"] not in self.targets:
            text = f"to_language {slots['target_lang']!r} is not one that the model translates into: "
            raise ApiError(400, text + ", ".join(self.targets), "to_language")
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
        suppressed = None if fields.suppress_tokens == (-1,) else fields.suppress_tokens
        return replace(request, adapter=fields.adapter, hotwords=words, guarded=guarded, suppress_tokens=suppressed)

    def _slots(self, fields: AudioRequest) -> dict[str, str]:
        """Return the prompt slots of a request."""
        languages = self.tokenizer.languages
        source = fields.language or (languages[0] if len(languages) == 1 else None)
        target = source if fields.task == "transcribe" else fields.to_language or find("en", self.targets) or "en"
        given = {"source_lang": source, "target_lang": target}
        slots = {name: value for name, value in given.items() if value}
        slots["task"] = "asr" if fields.task == "transcribe" else "ast"
        return self.transcriber(fields).with_timestamps(slots)

    async def segments(self, audio: Audio, fields: AudioRequest, request: Request) -> AsyncGenerator[TranscriptUpdate]:
        """Yield the transcript in order, as soon as a chunk is decoded; ``request`` is the result of
        `ServedModel.request`.

        Closing the iterator early cancels the remaining chunks.
        """
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(outcome: Outcome) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(outcomes.put_nowait, outcome)

        transcriber, slots = self.transcriber(fields), self._slots(fields)
        recordings: list[Recording] = []
        turns: list[list[Request]] = []  # of each recording: the requests that are not queued yet, the last one first
        for channel in dict.fromkeys(chunk.channel for chunk in audio.chunks):
            recording = Recording(transcriber, request, channel=channel, part=len(recordings))
            recordings.append(recording)
            turns.append([*recording.requests(chunk for chunk in audio.chunks if chunk.channel == channel)][::-1])
        places: list[tuple[Recording, int]] = []  # of each queued request: its channel, and its chunk's number there

        def following(recording: Recording) -> list[Request]:
            """Return the next requests of a recording: all, or one with the text so far in its prompt."""
            left, found = turns[recording.part], list[Request]()
            while left and not (fields.condition_on_previous_text and found):
                one = left.pop()
                assert isinstance(one.key, ChunkKey)
                places.append((recording, one.key.number))
                conditioned = fields.condition_on_previous_text
                found.append(recording.conditioned(one.key.number, one, slots) if conditioned else one)
            return found

        merger, chunks = ChannelMerger(len(recordings)), sum(map(len, turns))
        scheduler = self._scheduler(fields.beam_size)
        ticket = scheduler.submit([one for each in recordings for one in following(each)], deliver, chunks)
        try:
            for _ in range(chunks):
                outcome = await outcomes.get()
                if isinstance(outcome.error, AudioError):
                    raise ApiError(400, str(outcome.error), "file", "invalid_audio")
                if outcome.hypothesis is None:
                    raise ApiError(500, str(outcome.error))
                recording, number = places[outcome.chunk]
                final = recording.add(number, outcome.hypothesis)
                if more := following(recording):
                    scheduler.add(ticket, more)
                if len(recordings) > 1:
                    final = merger.add(recording.part, final, recording.final_until)
                parts = [part for one in recordings for part in one.languages]
                detected, probability = detected_language(transcriber.among, parts) or (None, None)
                language = fields.language or detected or self.first_language
                yield TranscriptUpdate(final, language, outcome.timing, probability)
        finally:
            if ticket.left:
                scheduler.cancel(ticket)


def cache_bytes(engine: Engine) -> int:
    """Return the bytes of the decoder's caches when all rows of the engine are in use: keys and values of
    cross-attention for a window of audio, and of self-attention for as many tokens as the decoder has positions, in
    every layer. 0 for an engine of another library, which has none between calls."""
    if "cached_decoding" not in engine.model.supports:
        return 0
    model = cast(SpeechModel, engine.model)
    shape = model.decoder.config
    frames = model.encoder_frames(default_window(engine.model))
    limit = min(shape.positions, engine.config.most_tokens(frames, model.generation))
    columns = frames + engine.config.beams * limit
    return engine.rows * columns * 2 * shape.layers * shape.width * model.decoder.embedding.weight.element_size()


def load_in_thread(source: ModelSource, config: ServiceConfig) -> "Future[ServedModel]":
    """Load a model in a thread that ends, so that its OpenMP threads end too.

    OpenMP keeps the threads of every thread that computes. While there are more of them than cores, all sleep almost
    at once (100 spins) whenever they wait for each other, which is several times a layer.
    """
    loaded: Future[ServedModel] = Future()
    loaded.set_running_or_notify_cancel()  # the thread cannot be stopped

    def load() -> None:
        try:
            loaded.set_result(ServedModel(source, source.load(), config))
        except BaseException as error:
            loaded.set_exception(error)

    threading.Thread(target=load, name="canter-loading", daemon=True).start()
    return loaded
