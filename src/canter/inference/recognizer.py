"""Recognizer, the model that `canter.load` returns, and its transcripts of files, arrays and queues of them."""

# pyright: strict

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import (
    BinaryIO,
    Literal,
    Protocol,
    TypeAlias,
    TypedDict,
    Unpack,
    cast,
    get_args,
    overload,
    runtime_checkable,
)

import numpy as np
import numpy.typing as npt
import torch

from canter.corpus.audio import stated_seconds
from canter.corpus.manifest import Utterance
from canter.corpus.media import is_media
from canter.corpus.remote import absolute, is_url
from canter.errors import AudioError, CanterError, ConfigError
from canter.inference.align import Aligner, Method, check_text
from canter.inference.engine.alignment import word_times_warning
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig
from canter.inference.hotwords import WEIGHT, Phrases
from canter.inference.inputs import Channel, Item, files_in, items_of, read_channel
from canter.inference.languages import Defaults, Task, detects_language, read_languages, spoken_language
from canter.inference.loading import drafting_engine, tokenizer_of
from canter.inference.recording import Timestamps, TranscribeConfig, Transcriber, Transcription
from canter.inference.transcribe import Job, transcribe_jobs
from canter.inference.transcript.formats import (
    SUBTITLES,
    SUFFIXES,
    file_segments,
    json_text,
    render_one,
    result_row,
    write_output,
)
from canter.inference.transcript.segments import Alternatives, Segment, TokenScore, Word
from canter.inference.transcript.subtitles import SubtitleStyle
from canter.inference.transcript.vad import USUAL_VAD, Vad, VadOptions
from canter.models.protocol import AnyModel, check_support, module_of
from canter.redaction import redacted
from canter.text.languages import canonical
from canter.text.tokenizer import Tokenizer


@runtime_checkable
class ArrayLike(Protocol):
    """A NumPy array, or an object that converts to one, such as a torch tensor on the CPU."""

    def __array__(self) -> npt.NDArray[np.generic]: ...


Audio: TypeAlias = str | os.PathLike[str] | ArrayLike | bytes | BinaryIO
"""A path or URL, samples (S,) or (S, C), the bytes of an audio file, or a binary file object."""

GROUP = 4  # recordings batched together, as a multiple of the decoder's rows
ARRAY_SECONDS = 1800.0  # maximum seconds of arrays that wait in memory
PEAK = 16.0  # maximum of float samples; larger values are those of integers
HEADERS = 4  # threads that read headers


class TranscribeOptions(TypedDict, total=False):
    """Options of `Recognizer.transcribe`, for type checkers."""

    language: str | Sequence[str] | None
    task: Task
    target_language: str
    timestamps: Timestamps
    beam_size: int
    ctc_weight: float
    batch_size: int | None
    vad: Vad
    vad_options: VadOptions | None
    max_repeats: int
    prompt: str
    hotwords: str | Iterable[str]
    hotword_weight: float
    nbest: int
    logprobs: bool
    sampling_rate: int | None
    audio_track: int | None
    channel: Channel
    condition_on_previous_text: bool
    clip_timestamps: Sequence[float]
    suppress_tokens: Sequence[int]
    hallucination_silence_threshold: float | None
    draft: str | os.PathLike[str]


@dataclass(frozen=True)
class LanguageDetection:
    """Language of one recording, and the probabilities of others."""

    language: str | None
    """Code of the most probable language over all speech; None without speech."""
    probability: float | None = None
    """Probability of that language."""
    probabilities: Mapping[str, float] = field(default_factory=dict[str, float])
    """Probability of every language by its code, the most probable first."""
    path: str | None = None
    """File; None for an array."""
    error: str | None = None
    """Reason why nothing was detected; None where there is no error."""


@dataclass(frozen=True, repr=False)
class Transcript:
    """Transcript of one recording. ``str(transcript)`` is its text."""

    text: str
    segments: tuple[Segment, ...] = ()
    """Segments in order, each with ``start`` and ``end`` in seconds, ``text`` and ``words``, and its ``channel`` with
    ``channel="each"``."""
    language: str | None = None
    """Code of the language spoken, stated or detected; of a translation, the language written."""
    duration: float = 0.0
    """Seconds of audio that were read."""
    path: str | None = None
    """File; None for an array."""
    error: str | None = None
    """Reason why there is no transcript; None where there is one."""
    lost_seconds: float = 0.0
    """Seconds of the audio that are damaged or missing; all other audio is transcribed."""
    warnings: tuple[str, ...] = ()
    """Faults of the audio: losses and where they begin, channels that cancel each other out."""
    language_probability: float | None = None
    """Probability of the detected language over all speech; None where it was stated."""
    nbest: tuple[Alternatives, ...] = ()
    """The most probable texts of each chunk of the audio, each a tuple of (text, log probability), if asked for."""
    score: float | None = None
    """Mean natural-log probability of a token of the text, end tokens included, from `Recognizer.align`; None for what
    the model wrote itself."""
    _item: Item | None = field(default=None, compare=False)
    _found: Transcription | None = field(default=None, compare=False)

    @property
    def detection(self) -> LanguageDetection:
        """Detected language, with the probabilities of all where only the language was detected."""
        every = dict(self._found.language_probabilities) if self._found else {}
        return LanguageDetection(self.language, self.language_probability, every, self.path, self.error)

    @property
    def words(self) -> tuple[Word, ...]:
        """Words of all segments, each with ``start``, ``end``, ``text`` and ``probability``; empty without
        ``timestamps="word"``."""
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def logprobs(self) -> tuple[TokenScore, ...]:
        """Tokens of all segments, each with ``text`` and ``logprob``; empty without ``logprobs=True``."""
        return tuple(score for segment in self.segments for score in segment.token_scores)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        cues: Literal["auto", "sentence", "whisper"] = "auto",
        max_line_width: int | None = None,
        max_line_count: int | None = None,
        max_words_per_line: int | None = None,
        highlight_words: bool = False,
    ) -> Path:
        """Write the transcript in the format of the suffix, and return the path.

        ``.txt``, ``.tsv`` and ``.json`` are written as by Whisper's command, ``.srt`` and ``.vtt`` as subtitles, and
        ``.jsonl`` as a row of a NeMo manifest. Subtitles are best with ``timestamps="word"``; with ``"segment"``, a cue
        that divides a segment gets its time in proportion to the number of characters.

        cues: "sentence" ends cues at sentence ends, with at most 7 s and 2 lines of 42 characters; "whisper" writes one
            cue per segment; "auto" is "whisper" with one of the options below, else "sentence".
        max_line_width, max_line_count, max_words_per_line, highlight_words: limits and style of the cues, as in
            Whisper's command.

        Raises ConfigError for another suffix, options that need times of words where there are none, or a path that
        cannot be written; AudioError for a result that is an error.
        """
        style = SubtitleStyle(cues, max_line_width, max_line_count, max_words_per_line, highlight_words)
        path = Path(path)
        kind = next((kind for kind, suffix in SUFFIXES.items() if suffix == path.suffix.lower()), None)
        if kind is None:
            raise ConfigError(f"{path}: the suffix is none of {', '.join(SUFFIXES.values())}")
        if self.error is not None:
            raise AudioError(f"{path} is not written, there is no transcript: {self.error}")
        if (style.shaped or style.cues != "auto") and kind not in SUBTITLES:
            raise ConfigError(f"{path}: cues and their lines are options of .srt and .vtt; leave them out")
        if style.needs_words and not self.words and self.text:
            raise ConfigError(f"{path}: these options need times of words; transcribe with timestamps='word'")
        item, found = self._item, self._found
        if item is None or found is None:
            utterance = Utterance(self.path or "array", self.duration, text="")
            item = Item({"audio_filepath": self.path, "duration": self.duration}, utterance)
            probability = self.language_probability
            found = Transcription(
                self.text, segments=self.segments, language=self.language, language_probability=probability
            )
        if kind == "nemo":
            text = json_text(result_row(item, found, timed=bool(self.words))) + "\n"
        else:
            text = render_one(item, found, kind, style)
        write_output(path, [text])
        return path

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        shown = [f"{self.text[:60]!r}" + ("..." if len(self.text) > 60 else "")]
        if self.error is not None:
            shown = [f"error={self.error!r}"]
        shown += [f"path={self.path!r}"] if self.path is not None else []
        if self.error is None:
            shown += [f"language={self.language!r}", f"duration={self.duration:.2f}"]
            shown += [f"{len(self.segments)} segments, {len(self.words)} words"]
        return f"Transcript({', '.join(shown)})"


@dataclass(frozen=True)
class _Call:
    """Checked options of one call."""

    transcriber: Transcriber
    defaults: Defaults
    sampling_rate: int | None
    channel: Channel


@dataclass
class _Source:
    """One recording in the queue: its row, its decoding job, and the clean-up afterwards."""

    item: Item
    job: Job | None = None
    shown: str | None = None
    error: str | None = None
    close: Callable[[], None] | None = None

    @classmethod
    def failed(cls, shown: str | None, error: str) -> _Source:
        return cls(Item({}, None), shown=shown, error=error)

    def failure(self) -> Transcript:
        return Transcript("", path=self.shown, error=self.error)


class Recognizer:
    """Speech recognition model, ready to transcribe; `canter.load` makes one."""

    def __init__(self, module: AnyModel, name: str = ""):
        """Wrap a model that was loaded from ``name``. Raises ConfigError for a model without a tokenizer."""
        self._tokenizer = tokenizer_of(module, name or "the model")
        self._module = module
        self.name = name
        self._engines: dict[tuple[EngineConfig, str], Engine] = {}

    @property
    def module(self) -> torch.nn.Module:
        """Torch module of the model."""
        return module_of(self._module)

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model."""
        return self._tokenizer

    @property
    def sample_rate(self) -> int:
        """Sample rate in Hz of the model's input; other files and arrays are resampled."""
        return self._module.sample_rate

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that the model knows, as its tokenizer writes them; empty where there is no choice."""
        return self.tokenizer.languages

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write model and tokenizer to a model folder, atomically, and return its path.

        Canter's own models are written in Canter's format (``canter convert`` writes others), models of transformers in
        that of transformers. Raises CheckpointError where the folder holds something else.
        """
        from canter.loading import save_module

        return save_module(self._module, Path(folder))

    def __repr__(self) -> str:
        device = next(self._module.parameters()).device
        return f"Recognizer({self.name!r}, {self._module.shape}, device={str(device)!r})"

    @overload
    def transcribe(  # pyright: ignore[reportOverlappingOverload]  # a str is an Iterable too
        self, audio: Audio, **options: Unpack[TranscribeOptions]
    ) -> Transcript: ...

    @overload
    def transcribe(self, audio: Iterable[Audio], **options: Unpack[TranscribeOptions]) -> Iterator[Transcript]: ...

    def transcribe(
        self,
        audio: Audio | Iterable[Audio],
        *,
        language: str | Sequence[str] | None = None,
        task: Task = "transcribe",
        target_language: str = "en",
        timestamps: Timestamps = "none",
        beam_size: int = 1,
        ctc_weight: float = 0.0,
        batch_size: int | None = None,
        vad: Vad = "energy",
        vad_options: VadOptions | None = None,
        max_repeats: int = 3,
        prompt: str = "",
        hotwords: str | Iterable[str] = (),
        hotword_weight: float = WEIGHT,
        nbest: int = 1,
        logprobs: bool = False,
        sampling_rate: int | None = None,
        audio_track: int | None = None,
        channel: Channel = "mix",
        condition_on_previous_text: bool = False,
        clip_timestamps: Sequence[float] = (),
        suppress_tokens: Sequence[int] = (-1,),
        hallucination_silence_threshold: float | None = None,
        draft: str | os.PathLike[str] = "auto",
    ) -> Transcript | Iterator[Transcript]:
        """Transcribe one recording, or an iterable of them.

        One recording (a path, samples, the bytes of a file or an open one) gives a `Transcript`; one that cannot be
        read raises AudioError. Several give an iterator over transcripts in the order of the recordings, each as soon
        as it and those before it are done; for one that cannot be read, the transcript has an ``error``. The iterable
        may be an endless generator: only a few batches of audio are in memory. Folders and manifests among the paths
        stand for the recordings in them: each gives a result with its ``path``, and a manifest's rows keep their own
        languages.

        language: language spoken, as a code or in English ("de", "German", "de-AT"). With None or "auto" a multilingual
            Whisper detects it, and with several ("de", "fr") it detects it among these; a model of one language needs
            none.
        task: "translate" writes ``target_language`` (Whisper: only English).
        timestamps: "segment" adds the times of segments that the model writes, "word" those of words too.
        beam_size: number of hypotheses per recording; 1 is greedy search.
        ctc_weight: weight of the CTC head in joint CTC/attention decoding, from 0 (attention only) to 1, for models
            with such a head.
        batch_size: number of recordings decoded together (None: chosen by model and device). Transcripts do not depend
            on it.
        vad: voice activity detector: long silence is left out, and audio longer than the model's window is divided in
            pauses. "energy", "silero" (needs the extra ``vad``), or "none".
        vad_options: threshold, padding and shortest lengths of the detector.
        max_repeats: number of repeats to keep where a model repeats the same words for longer than the audio lasts; 0
            means no limit. No other repetition is changed; a Whisper has its own rule.
        prompt: text that precedes the recording: names to expect, a style of writing.
        hotwords: words and phrases to prefer where the model finds them almost as probable as its own text: a list, a
            text file with one a line, or a string with commas between them. Those that are not said change nothing.
        hotword_weight: nats (natural logarithms) by which a phrase may be less probable than the model's own text.
        nbest: number of texts of each chunk to keep, as ``nbest`` of the result; at most ``beam_size``.
        logprobs: add the log probability of every token, as ``logprobs`` of the result.
        sampling_rate: sample rate of arrays in Hz (None: the model's).
        audio_track: audio track of files with several, from 0 (None: the one marked as default, else the first).
        channel: channel of recordings that name none: "mix" averages all, a number takes that one (from 0), and "each"
            transcribes every one by itself and merges their segments in order of time.
        condition_on_previous_text: decode the chunks of long audio one after another, each with the text before it in
            its prompt.
        clip_timestamps: starts and ends in seconds of the spans to transcribe; without an end the last one is open.
        suppress_tokens: ids of tokens that are never written; -1 is the model's own set, and () none.
        hallucination_silence_threshold: leave out segments whose words look invented, between pauses of more than this
            many seconds; needs ``timestamps="word"``.
        draft: source of drafts, which let greedy search check several tokens in a step of the decoder; the text does
            not depend on it. "ctc" is the model's CTC head, "auto" the same where it pays, "off" none, and anything
            else a smaller model with the same tokenizer, as for `canter.load`.

        Raises ConfigError, before anything is decoded, for options that the model does not support.
        """
        if task not in get_args(Task):
            raise ConfigError(f"task is {task!r}; it must be one of {', '.join(get_args(Task))}")
        _check_whole(beam_size=beam_size, batch_size=batch_size, sampling_rate=sampling_rate, nbest=nbest)
        _check_track(audio_track)
        if not _is_whole(max_repeats) or max_repeats < 0:
            raise ConfigError(f"max_repeats is {max_repeats!r}; it must be 0, for no limit, or a whole number above")
        phrases = None
        if hotwords:
            read = Phrases.read if isinstance(hotwords, str) else Phrases.of
            phrases = read(hotwords, hotword_weight)  # pyright: ignore[reportArgumentType]
        channel = read_channel(channel)
        language, among = read_languages(self.tokenizer, language)
        config = TranscribeConfig(
            timestamps,
            vad=vad,
            vad_options=vad_options or USUAL_VAD,
            prompt=prompt,
            audio_track=audio_track,
            each_channel=channel == "each",
            hotwords=phrases,
            logprobs=logprobs,
            nbest=nbest,
            languages=among,
            condition_on_previous_text=condition_on_previous_text,
            clip_timestamps=tuple(clip_timestamps),
            hallucination_silence_threshold=hallucination_silence_threshold,
        )
        engine = self._engine(
            EngineConfig(
                rows=batch_size,
                max_repeats=max_repeats,
                beams=beam_size,
                ctc_weight=ctc_weight,
                suppress_tokens=tuple(suppress_tokens),
            ),
            draft,
        )
        if timestamps == "word" and not engine.aligns:
            called = self.name or self._module.shape
            raise ConfigError(f"{called} cannot compute times of words; use timestamps='segment' or 'none'")
        if timestamps == "word" and (warning := word_times_warning(self._module)):
            warnings.warn(f"{self.name or 'the model'} {warning}", stacklevel=2)
        asked: Task | None = "translate" if task == "translate" else None
        call = _Call(
            Transcriber(engine, self.tokenizer, config),
            Defaults.of(self.tokenizer, language, asked, target_language),
            sampling_rate,
            channel,
        )
        self._check_prompt(call)
        if _is_one(audio):
            return self._one(cast(Audio, audio), call, partial(self._transcribed, call))
        if not isinstance(audio, Iterable):
            raise ConfigError(
                f"{_shown(audio)} is no audio: give a path, samples, the bytes of a file, or several of them"
            )
        return self._many(iter(cast("Iterable[Audio]", audio)), call)

    @overload
    def detect_language(  # pyright: ignore[reportOverlappingOverload]  # a str is an Iterable too
        self,
        audio: Audio,
        *,
        among: Sequence[str] | None = None,
        sampling_rate: int | None = None,
        audio_track: int | None = None,
    ) -> LanguageDetection: ...

    @overload
    def detect_language(
        self,
        audio: Iterable[Audio],
        *,
        among: Sequence[str] | None = None,
        sampling_rate: int | None = None,
        audio_track: int | None = None,
    ) -> Iterator[LanguageDetection]: ...

    def detect_language(
        self,
        audio: Audio | Iterable[Audio],
        *,
        among: Sequence[str] | None = None,
        sampling_rate: int | None = None,
        audio_track: int | None = None,
    ) -> LanguageDetection | Iterator[LanguageDetection]:
        """Detect the language of one recording, or of an iterable of them, without decoding text.

        Recordings, results and errors are as in `transcribe`. Each chunk of speech takes the encoder and one step of
        the decoder.

        among: languages to choose from, as codes or in English (None: all that the model knows).

        Raises ConfigError for a model that cannot detect languages, and for languages that it does not know.
        """
        check_support(self._module, {"detect_language": "language_detection"}, self.name or "this")
        _check_whole(sampling_rate=sampling_rate)
        language, several = read_languages(self.tokenizer, among)
        only = (spoken_language(self.tokenizer, language),) if language else several
        config = TranscribeConfig(detect_only=True, languages=only, audio_track=audio_track)
        transcriber = Transcriber(self._engine(EngineConfig()), self.tokenizer, config)
        call = _Call(transcriber, Defaults.of(self.tokenizer, None), sampling_rate, "mix")
        if _is_one(audio):
            return self._one(cast(Audio, audio), call, partial(self._transcribed, call)).detection
        return (one.detection for one in self._many(iter(cast("Iterable[Audio]", audio)), call))

    def _check_prompt(self, call: _Call) -> None:
        named = call.defaults.language or (self.languages[0] if detects_language(self.tokenizer) else None)
        prompt = call.transcriber.config.prompt
        if prompt and named:
            try:
                call.transcriber.prompt({"source_lang": named, "target_lang": named}, prompt)
            except ConfigError as error:
                raise ConfigError(f"prompt: {error}") from None

    def _engine(self, config: EngineConfig, draft: str | os.PathLike[str] = "auto") -> Engine:
        key = config, os.fspath(draft)
        if key not in self._engines:
            self._engines[key] = drafting_engine(self._module, self.tokenizer, config, draft)
        return self._engines[key]

    def align(
        self,
        audio: Audio,
        text: str,
        *,
        language: str | None = None,
        method: Method = "auto",
        sampling_rate: int | None = None,
        audio_track: int | None = None,
    ) -> Transcript:
        """Align a given text with one recording of any length, and return it with the times of its words.

        Each word has the ``probability`` that the model gives it; a word with a low one is probably not said there.
        The ``score`` is that of the complete text. Each line of the text is a segment; a text of one line has a segment
        for each sentence.

        text: what is said in the recording, as it is to be written.
        language: language spoken, as in `transcribe`.
        method: source of the times: "ctc" is the most probable path through the CTC head, "attention" the weights of
            cross-attention; "auto" is "ctc" for a model with a CTC head, else "attention".
        sampling_rate, audio_track: as in `transcribe`.

        Raises AudioError for audio that cannot be read or aligned, and ConfigError for a text without letters and for
        options that the model does not support.
        """
        _check_whole(sampling_rate=sampling_rate)
        _check_track(audio_track)
        check_text(text)
        name = self.name or self._module.shape
        engine = self._engine(EngineConfig())
        aligner = Aligner(engine, self.tokenizer, method, audio_track=audio_track, name=name)
        if aligner.spelling is None and (warning := word_times_warning(self._module)):
            warnings.warn(f"{self.name or 'the model'} {warning}", stacklevel=2)
        call = _Call(aligner.plain, Defaults.of(self.tokenizer, language), sampling_rate, "mix")

        def aligned(source: _Source, job: Job) -> Transcript:
            source.item = replace(source.item, row=source.item.row | {"text": text})
            ((_, found),) = aligner.align([replace(job.utterance, text=text)], job.audio)
            return self._transcript(source, found)

        return self._one(audio, call, aligned)

    # -- one --

    def _transcribed(self, call: _Call, source: _Source, job: Job) -> Transcript:
        ((_, found),) = transcribe_jobs(call.transcriber, [[(0, job)]])
        return self._transcript(source, found)

    def _one(self, audio: Audio, call: _Call, decode: Callable[[_Source, Job], Transcript]) -> Transcript:
        """Return what ``decode`` makes of one recording. Raises AudioError where there is none."""
        if isinstance(audio, str | os.PathLike) and not is_media(os.fspath(audio)) and Path(audio).exists():
            what = "a folder" if os.path.isdir(audio) else "a manifest"
            raise ConfigError(
                f"{os.fspath(audio)} is {what}, not one recording; for a transcript of each in it give a list: "
                f"transcribe([{os.fspath(audio)!r}])"
            )
        if call.sampling_rate is not None and not isinstance(audio, ArrayLike):
            raise ConfigError("sampling_rate is for arrays; a file states its own")
        source = self._recording(audio, call)
        result = source.failure()
        if source.job is not None:
            try:
                result = decode(source, source.job)
            finally:
                if source.close:
                    source.close()
        if result.error is not None:
            raise AudioError(result.error)
        return result

    # -- many --

    def _many(self, audio: Iterator[Audio], call: _Call) -> Iterator[Transcript]:
        done: dict[int, Transcript] = {}
        waiting: dict[int, _Source] = {}
        place = 0

        def groups() -> Iterator[list[tuple[int, Job]]]:
            numbers = itertools.count()
            rows = call.transcriber.engine.rows
            for size in itertools.chain((rows, 2 * rows), itertools.repeat(GROUP * rows)):
                group = self._group(recordings, size)
                if not group:
                    return
                jobs: list[tuple[int, Job]] = []
                for source, number in zip(group, numbers):  # in this order, so that no number is lost
                    if source.job is None:
                        done[number] = source.failure()
                    else:
                        waiting[number] = source
                        jobs.append((number, source.job))
                yield jobs

        def in_order() -> Iterator[Transcript]:
            nonlocal place
            while place in done:
                yield done.pop(place)
                place += 1

        with contextlib.ExitStack() as stack:
            recordings = self._recordings(audio, call)
            stack.callback(lambda: [source.close() for source in waiting.values() if source.close])
            for number, found in transcribe_jobs(call.transcriber, groups()):
                source = waiting.pop(number)
                if source.close:
                    source.close()
                done[number] = self._transcript(source, found)
                yield from in_order()
            yield from in_order()

    def _group(self, recordings: Iterator[_Source], size: int) -> list[_Source]:
        """Return the next recordings, at most ``size``, and at most ARRAY_SECONDS of arrays."""
        found: list[_Source] = []
        seconds = 0.0
        for source in recordings:
            found.append(source)
            seconds += source.job.seconds if source.job and source.job.audio is not None else 0.0
            if len(found) == size or seconds >= ARRAY_SECONDS:
                break
        unknown = [one for one in found if one.job and one.job.audio is None and one.job.seconds == np.inf]
        with ThreadPoolExecutor(HEADERS) as pool:
            for source, stated in zip(unknown, pool.map(_stated, unknown)):
                if isinstance(stated, CanterError):
                    source.job, source.error = None, _with_name(source, str(stated))
                elif stated is not None and source.job:
                    source.job = replace(source.job, seconds=stated)
        return found

    def _recordings(self, audio: Iterator[Audio], call: _Call) -> Iterator[_Source]:
        """Yield the recordings that are given, and those in folders and manifests."""
        for one in audio:
            if not isinstance(one, str | os.PathLike) or is_media(os.fspath(one)):
                yield self._recording(one, call)
                continue
            path, shown = os.fspath(one), redacted(os.fspath(one))
            try:
                files = files_in(path)
                if files:
                    yield from (self._recording(file, call) for file in files)
                    continue
                empty = True
                for item in items_of(one, call.defaults, call.channel):
                    empty = False
                    yield self._listed(item)
                if empty:
                    yield _Source.failed(shown, f"{shown} holds nothing to transcribe")
            except CanterError as error:
                yield _Source.failed(shown, str(error))

    def _listed(self, item: Item) -> _Source:
        """Return a row of a manifest, or a file of a folder."""
        path = item.row.get("audio_filepath")
        shown = item.utterance.audio_filepath if item.utterance else str(path) if path else None
        shown = redacted(shown) if shown else None
        if item.utterance is None:
            return _Source(item, shown=shown, error=item.problem)
        return _Source(item, Job(item.utterance, item.utterance.duration), shown)

    def _recording(self, one: Audio, call: _Call) -> _Source:
        """Return one file or array, checked as far as possible without reading it."""
        close = None
        try:
            if isinstance(one, str | os.PathLike):
                path, shown, samples = absolute(one), redacted(os.fspath(one)), None
                if not is_url(path) and "::" not in path and not os.path.exists(path):
                    where = "" if os.path.isabs(one) else f" (looked for in {os.getcwd()})"
                    return _Source.failed(shown, f"{shown} does not exist{where}")
            elif isinstance(one, bytes | bytearray | memoryview) or hasattr(one, "read"):
                path, close = _spooled(cast("bytes | BinaryIO", one))
                shown, samples = getattr(one, "name", None), None
                shown = shown if isinstance(shown, str) else None
            elif isinstance(one, ArrayLike):
                path, shown = "array", None
                samples = _samples(one, call.sampling_rate or self.sample_rate, self.sample_rate, call.channel)
            else:
                raise AudioError(f"{_shown(one)} is no audio: give a path, samples, or the bytes of a file")
        except CanterError as error:
            return _Source.failed(None, str(error))
        seconds = len(samples) / self.sample_rate if samples is not None else np.inf
        utterance = Utterance(path, 0.0 if samples is None else seconds, text="")
        item = Item({"audio_filepath": shown}, utterance).on(call.channel).completed(call.defaults)
        if item.utterance is None:
            if close:
                close()
            return _Source(item, shown=shown, error=item.problem)
        return _Source(item, Job(item.utterance, seconds, samples), shown, close=close)

    def _transcript(self, source: _Source, found: Transcription) -> Transcript:
        """Return the public form of a transcription."""
        if found.error is not None:
            return Transcript("", path=source.shown, error=_with_name(source, found.error))
        item, seconds = source.item, found.seconds or 0.0
        if item.utterance is not None and item.utterance.duration == 0:
            row = item.row | {"duration": round(seconds, 3)}
            item = replace(item, row=row, utterance=replace(item.utterance, duration=seconds))
        language = found.language
        if language is None and len(self.languages) == 1:
            language = self.languages[0]
        if language is not None:
            language = canonical(language) or language
        found = replace(found, language=language)
        return Transcript(
            found.text,
            tuple(file_segments(item, found)),
            language,
            seconds,
            source.shown,
            lost_seconds=found.lost_seconds,
            warnings=found.warnings,
            language_probability=found.language_probability,
            nbest=found.nbest,
            score=found.score,
            _item=item,
            _found=found,
        )


def _stated(source: _Source) -> float | CanterError | None:
    assert source.job is not None
    try:
        return stated_seconds(source.job.utterance.audio_filepath)
    except CanterError as error:
        return error


def _with_name(source: _Source, error: str) -> str:
    """Return an error with the name of the file, in place of that of a temporary one."""
    if source.item.utterance is not None and source.close is not None:
        error = error.replace(source.item.utterance.audio_filepath, source.shown or "what was given")
    if source.shown and os.path.basename(source.shown) not in error:
        error = f"{source.shown}: {error}"
    return error


def _is_one(audio: object) -> bool:
    return isinstance(audio, str | os.PathLike | ArrayLike | bytes | bytearray | memoryview) or hasattr(audio, "read")


def _is_whole(number: object) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def _check_whole(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and (not _is_whole(number) or number < 1):
            raise ConfigError(f"{name} is {number!r}; it must be a whole number of at least 1")


def _check_track(audio_track: int | None) -> None:
    if audio_track is not None and (not _is_whole(audio_track) or audio_track < 0):
        raise ConfigError(f"audio_track is {audio_track!r}; tracks are counted from 0")


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def _spooled(one: bytes | BinaryIO) -> tuple[str, Callable[[], None]]:
    """Write the bytes of an audio file to a temporary one, and return its path and a function that removes it."""
    data: bytes | str = one if isinstance(one, bytes | bytearray | memoryview) else one.read()
    if isinstance(data, str):
        raise AudioError("a file that was opened as text is no audio: open it with mode 'rb'")
    handle, path = tempfile.mkstemp(prefix="canter-", suffix=".audio")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    return path, partial(Path(path).unlink, missing_ok=True)


def _samples(array: ArrayLike, rate: int, wanted: int, channel: Channel = "mix") -> npt.NDArray[np.float32]:
    """Return an array (S,) or (S, C) of any usual type as float32 at ``wanted`` Hz: (S,), or (S, C) for each channel.

    Raises AudioError for one of another shape or type, and for samples that are no audio.
    """
    samples: npt.NDArray[np.generic] = np.asarray(array)
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        raise AudioError(
            f"an array of shape {samples.shape}: samples go first, (S, C); transpose it, or give a list of arrays "
            "for several recordings"
        )
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise AudioError(f"an array of shape {samples.shape} is no audio: give (S,) samples, or (S, C) of C channels")
    if samples.dtype.kind == "i" and samples.dtype.itemsize in (2, 4):
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype.str).min)
    elif samples.dtype.kind != "f":
        raise AudioError(f"an array of {samples.dtype} is no audio: give float samples in -1 ... 1, int16 or int32")
    samples = samples.astype(np.float32, copy=False)
    if isinstance(channel, int):
        count = 1 if samples.ndim == 1 else samples.shape[1]
        if channel >= count:
            raise AudioError(f"an array has no channel {channel}: it has {count}, counted from 0; choose one of them")
        samples = samples if samples.ndim == 1 else samples[:, channel]
    elif samples.ndim == 2 and channel == "mix":
        samples = samples.mean(axis=1)
    peak = max(float(samples.max()), -float(samples.min()))  # np.abs would double the memory
    if not np.isfinite(peak):
        raise AudioError("an array holds samples that are not finite numbers")
    if peak > PEAK:
        raise AudioError(f"an array of floats reaches {peak:,.0f}; float samples lie in -1 ... 1 (int16's over 32768)")
    if rate != wanted:
        import soxr  # pyright: ignore[reportMissingTypeStubs]

        samples = soxr.resample(samples, rate, wanted, quality="HQ")
    return np.ascontiguousarray(samples, dtype=np.float32)
