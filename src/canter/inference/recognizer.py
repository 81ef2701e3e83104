"""The model that `canter.load` gives, and what it returns: transcripts of files, arrays and queues of them."""

# pyright: strict

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias, cast, get_args, overload, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from canter.corpus.audio import stated_seconds
from canter.corpus.manifest import Utterance
from canter.corpus.media import is_media
from canter.corpus.remote import absolute, is_url
from canter.errors import AudioError, CanterError, ConfigError
from canter.inference.engine.engine import Engine, engine_for
from canter.inference.engine.requests import EngineConfig
from canter.inference.inputs import Defaults, Item, files_in, items_of, require_language
from canter.inference.transcribe import Job, Listener, TranscribeConfig, Transcription, transcribe_jobs
from canter.inference.transcript.formats import SUBTITLES, SUFFIXES
from canter.inference.transcript.segments import Segment, Word
from canter.inference.transcript.subtitles import SubtitleStyle
from canter.inference.transcript.writers import json_text, render_one, result_row, segments_of, write_output
from canter.redaction import redacted
from canter.text.languages import canonical
from canter.text.tokenizer import Tokenizer

Task = Literal["transcribe", "translate"]
Timestamps = Literal["none", "segment", "word"]
Vad = Literal["energy", "silero", "none"]


@runtime_checkable
class ArrayLike(Protocol):
    """An array of NumPy, or what turns into one: a tensor of torch on the CPU, ..."""

    def __array__(self) -> npt.NDArray[Any]: ...


Audio: TypeAlias = str | os.PathLike[str] | ArrayLike | bytes | BinaryIO
"""A path or URL, samples (S,) or (S, C), the bytes of an audio file, or a binary file object."""

WINDOW = 4  # times the decoder's rows: items that are batched together
ARRAY_SECONDS = 1800.0  # of arrays that wait in memory at most
LOUDEST = 16.0  # that float samples may reach; beyond, they are integers' values
HEADERS = 4  # threads that read headers


@dataclass(frozen=True, repr=False)
class Transcript:
    """The transcript of one recording. ``str(transcript)`` is its text."""

    text: str
    segments: tuple[Segment, ...] = ()
    """Stretches of the text in order, each with ``start`` and ``end`` in seconds, ``text`` and ``words``."""
    language: str | None = None
    """Code of the language spoken, as it was stated or detected; of a translation, of the language written."""
    duration: float = 0.0
    """Seconds of audio that were read."""
    path: str | None = None
    """The file; None for an array."""
    error: str | None = None
    """The reason why there is no transcript; None where there is one."""
    lost_seconds: float = 0.0
    """Seconds of the audio that are damaged or missing; the rest is transcribed."""
    warnings: tuple[str, ...] = ()
    """Faults of the audio: losses and where they begin, channels that cancel each other out."""
    language_probability: float | None = None
    """Probability of the language that was detected, over all of the speech; None where it was stated."""
    _item: Item | None = field(default=None, compare=False)
    _found: Transcription | None = field(default=None, compare=False)

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of all segments, each with ``start``, ``end``, ``text`` and ``probability``; empty unless
        ``timestamps="word"`` was asked for."""
        return tuple(word for segment in self.segments for word in segment.words)

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
        """Write the transcript in the format of the suffix, and return the path: ``.txt``, ``.tsv`` and ``.json`` as
        Whisper's command writes them, ``.srt`` and ``.vtt`` as subtitles, ``.jsonl`` as a row of a NeMo manifest.

        Subtitles are best with ``timestamps="word"``; with ``"segment"`` a cue that divides a segment gets its part of
        the time by the number of characters.

        cues: "sentence" ends cues at sentence ends, within 7 s and 2 lines of 42 characters; "whisper" writes one cue a
            segment; "auto" is "whisper" where one of the options below is given, else "sentence".
        max_line_width, max_line_count, max_words_per_line, highlight_words: shape the cues as these options of
            Whisper's command do.

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
        item = self._item or Item({"audio_filepath": self.path, "duration": self.duration}, None)
        found = self._found or Transcription(
            self.text,
            segments=self.segments,
            language=self.language,
            language_probability=self.language_probability,
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
        told = [f"{self.text[:60]!r}" + ("..." if len(self.text) > 60 else "")]
        if self.error is not None:
            told = [f"error={self.error!r}"]
        told += [f"path={self.path!r}"] if self.path is not None else []
        if self.error is None:
            told += [f"language={self.language!r}", f"duration={self.duration:.2f}"]
            told += [f"{len(self.segments)} segments, {len(self.words)} words"]
        return f"Transcript({', '.join(told)})"


@dataclass(frozen=True)
class _Options:
    """The checked options of one call."""

    listener: Listener
    defaults: Defaults
    sampling_rate: int | None


@dataclass
class _Given:
    """One recording in the queue: its row, its decoding job, and the clean-up afterwards."""

    item: Item
    job: Job | None = None
    shown: str | None = None
    error: str | None = None
    close: Callable[[], None] | None = None


class Recognizer:
    """A speech recognition model, ready to transcribe; `canter.load` makes one.

    ``name`` is what it was loaded from.
    """

    def __init__(self, module: Any, name: str = ""):
        """Raises ConfigError for a model without a tokenizer, whose tokens cannot be read as text."""
        if module.tokenizer is None:
            raise ConfigError(f"{name or 'the model'} has no tokenizer, so its tokens cannot be read as text")
        self._module = module
        self.name = name
        self._engines: dict[EngineConfig, Engine] = {}

    @property
    def module(self) -> torch.nn.Module:
        """The torch module behind it."""
        return self._module

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._module.tokenizer

    @property
    def sample_rate(self) -> int:
        """Samples a second that the model hears; files and arrays of another rate are resampled."""
        return int(self._module.sample_rate)

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that the model knows, as its tokenizer writes them; empty where there is no choice."""
        return self.tokenizer.languages

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write model and tokenizer to a model folder, which appears only when it is whole, and return its path.

        A model of Canter's own is written in Canter's format (``canter convert`` writes others), a model of
        transformers in that of transformers. Raises CheckpointError where the folder holds something else.
        """
        from canter.loading import save_module

        return save_module(self._module, Path(folder))

    def __repr__(self) -> str:
        device = next(self._module.parameters()).device
        return f"Recognizer({self.name!r}, {self._module.shape}, device={str(device)!r})"

    @overload
    def transcribe(  # pyright: ignore[reportOverlappingOverload]  # a str is an Iterable too
        self,
        audio: Audio,
        *,
        language: str | None = ...,
        task: Task = ...,
        target_language: str = ...,
        timestamps: Timestamps = ...,
        beam_size: int = ...,
        ctc_weight: float = ...,
        batch_size: int | None = ...,
        vad: Vad = ...,
        max_repeats: int = ...,
        prompt: str = ...,
        sampling_rate: int | None = ...,
        audio_track: int | None = ...,
    ) -> Transcript: ...

    @overload
    def transcribe(
        self,
        audio: Iterable[Audio],
        *,
        language: str | None = ...,
        task: Task = ...,
        target_language: str = ...,
        timestamps: Timestamps = ...,
        beam_size: int = ...,
        ctc_weight: float = ...,
        batch_size: int | None = ...,
        vad: Vad = ...,
        max_repeats: int = ...,
        prompt: str = ...,
        sampling_rate: int | None = ...,
        audio_track: int | None = ...,
    ) -> Iterator[Transcript]: ...

    def transcribe(
        self,
        audio: Audio | Iterable[Audio],
        *,
        language: str | None = None,
        task: Task = "transcribe",
        target_language: str = "en",
        timestamps: Timestamps = "none",
        beam_size: int = 1,
        ctc_weight: float = 0.0,
        batch_size: int | None = None,
        vad: Vad = "energy",
        max_repeats: int = 3,
        prompt: str = "",
        sampling_rate: int | None = None,
        audio_track: int | None = None,
    ) -> Transcript | Iterator[Transcript]:
        """Transcribe one recording, or an iterable of them.

        One recording (a path, samples, the bytes of a file or an open one) gives a `Transcript`; what cannot be read
        raises AudioError. Many give an iterator over transcripts in the order of the recordings, each as soon as it
        and those before it are done; what cannot be read is a transcript with ``error``. The iterable may be a
        generator without end: only a few batches of audio are in memory. Folders and manifests among the paths stand
        for the recordings in them, each result with its ``path``, and a manifest's rows keep their own languages.

        language: what is spoken, as a code or in English ("de", "German", "de-AT"); None or "auto": a multilingual
            Whisper detects it, and a model of one language needs none.
        task: "translate" writes ``target_language`` (a Whisper: English alone).
        timestamps: "segment" gives segments the times that the model writes; "word" also gives words times.
        beam_size: hypotheses kept for each recording; 1: greedy.
        ctc_weight: weight of the CTC head in joint CTC/attention decoding, from 0 (attention alone) to 1, for models
            with such a head.
        batch_size: recordings decoded together; None: what suits model and device. Transcripts do not depend on it.
        vad: what finds where somebody speaks: long silence is left out, and audio longer than the model's window is cut
            in pauses. "energy", "silero" (needs the extra ``vad``), or "none".
        max_repeats: repeats of the same words that are kept where a model writes them for longer than the audio lasts;
            0: no limit. No other repetition is touched, and none of a Whisper, which has its own rule.
        prompt: text that is taken to come before: names to expect, a style of writing.
        sampling_rate: of arrays; None: the model's own.
        audio_track: audio track of files with several, from 0; None: the one marked as default, else the first.

        Raises ConfigError, before anything is decoded, for options that this model cannot do.
        """
        options = self._checked(
            language,
            task,
            target_language,
            timestamps,
            beam_size,
            ctc_weight,
            batch_size,
            vad,
            max_repeats,
            prompt,
            sampling_rate,
            audio_track,
        )
        if _is_one(audio):
            return self._one(cast(Audio, audio), options)
        if not isinstance(audio, Iterable):
            raise ConfigError(
                f"{_shown(audio)} is no audio: give a path, samples, the bytes of a file, or several of them"
            )
        return self._many(iter(cast("Iterable[Audio]", audio)), options)

    # -- options --

    def _checked(
        self,
        language: str | None,
        task: str,
        target_language: str,
        timestamps: str,
        beam_size: int,
        ctc_weight: float,
        batch_size: int | None,
        vad: str,
        max_repeats: int,
        prompt: str,
        sampling_rate: int | None,
        audio_track: int | None,
    ) -> _Options:
        for name, value, known in (
            ("task", task, get_args(Task)),
            ("timestamps", timestamps, get_args(Timestamps)),
            ("vad", vad, get_args(Vad)),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        for name, number in (
            ("beam_size", beam_size),
            ("batch_size", batch_size),
            ("sampling_rate", sampling_rate),
        ):
            if number is not None and (not _is_whole(number) or number < 1):
                raise ConfigError(f"{name} is {number!r}; it must be a whole number of at least 1")
        if audio_track is not None and (not _is_whole(audio_track) or audio_track < 0):
            raise ConfigError(f"audio_track is {audio_track!r}; tracks are counted from 0")
        if not _is_whole(max_repeats) or max_repeats < 0:
            raise ConfigError(f"max_repeats is {max_repeats!r}; it must be 0, for no limit, or a whole number above")
        engine = self._engine(beam_size, batch_size, ctc_weight, max_repeats)
        if timestamps == "word" and not engine.aligns:
            raise ConfigError(f"{self._called} cannot tell when a word was said; use timestamps='segment' or 'none'")
        asked = TranscribeConfig(
            timestamps=cast(Timestamps, timestamps),
            vad=cast(Vad, vad),
            context=prompt,
            audio_track=audio_track,
        )
        listener = Listener(engine, self.tokenizer, asked)
        languages = self._languages_of(language, task, target_language)
        if prompt:
            self._check_prompt(listener, languages)
        return _Options(listener, languages, sampling_rate)

    def _languages_of(self, language: str | None, task: str, target: str) -> Defaults:
        """Return the languages of recordings that name none. Raises ConfigError for what the model does not know."""
        asked: Task | None = "translate" if task == "translate" else None
        return Defaults.of(self.tokenizer, language, asked, target)

    def _check_prompt(self, listener: Listener, languages: Defaults) -> None:
        named = languages.language or (self.languages[0] if self._detects else None)
        slots = {"source_lang": named, "target_lang": named} if named else {}
        try:
            listener.prompt(slots, listener.config.context)
        except ConfigError as error:
            if named:
                raise ConfigError(f"prompt: {error}") from None

    @property
    def _called(self) -> str:
        return self.name or self._module.shape

    def _engine(self, beams: int, rows: int | None, ctc_weight: float, max_repeats: int) -> Engine:
        config = EngineConfig(beams=beams, rows=rows, ctc_weight=ctc_weight, max_repeats=max_repeats)
        if config not in self._engines:
            self._engines[config] = engine_for(self._module, self.tokenizer.end, config)
        return self._engines[config]

    # -- one --

    def _one(self, audio: Audio, options: _Options) -> Transcript:
        if isinstance(audio, str | os.PathLike) and not is_media(os.fspath(audio)) and Path(audio).exists():
            what = "a folder" if os.path.isdir(audio) else "a manifest"
            raise ConfigError(
                f"{os.fspath(audio)} is {what}, not one recording; for a transcript of each in it give a list: "
                f"transcribe([{os.fspath(audio)!r}])"
            )
        if options.sampling_rate is not None and not isinstance(audio, ArrayLike):
            raise ConfigError("sampling_rate is for arrays; a file states its own")
        given = self._recording(audio, options)
        if given.error is None and given.job is not None:
            groups = [[(0, replace(given.job, seconds=np.inf) if given.job.audio is None else given.job)]]
            try:
                ((_, found),) = transcribe_jobs(options.listener, groups)
                result = self._transcript(given, found)
            finally:
                if given.close:
                    given.close()
        else:
            result = Transcript("", path=given.shown, error=given.error)
        if result.error is not None:
            raise AudioError(result.error)
        return result

    # -- many --

    def _many(self, audio: Iterator[Audio], options: _Options) -> Iterator[Transcript]:
        done: dict[int, Transcript] = {}
        waiting: dict[int, _Given] = {}
        following = itertools.count()
        place = next(following)

        def groups() -> Iterator[list[tuple[int, Job]]]:
            number = 0
            rows = options.listener.engine.rows
            for size in itertools.chain((rows, 2 * rows), itertools.repeat(WINDOW * rows)):
                batch = self._window(recordings, size)
                if not batch:
                    return
                jobs: list[tuple[int, Job]] = []
                for given in batch:
                    if given.job is None:
                        done[number] = Transcript("", path=given.shown, error=given.error)
                    else:
                        waiting[number] = given
                        jobs.append((number, given.job))
                    number += 1
                yield jobs

        with contextlib.ExitStack() as stack:
            recordings = self._recordings(audio, options)
            stack.callback(lambda: [given.close() for given in waiting.values() if given.close])
            for number, found in transcribe_jobs(options.listener, groups()):
                given = waiting.pop(number)
                if given.close:
                    given.close()
                done[number] = self._transcript(given, found)
                while place in done:
                    yield done.pop(place)
                    place = next(following)
            while place in done:
                yield done.pop(place)
                place = next(following)

    def _window(self, recordings: Iterator[_Given], size: int) -> list[_Given]:
        """Return the next recordings, at most ``size`` and no more of arrays than may wait in memory."""
        found: list[_Given] = []
        seconds = 0.0
        for given in recordings:
            found.append(given)
            seconds += given.job.seconds if given.job and given.job.audio is not None else 0.0
            if len(found) == size or seconds >= ARRAY_SECONDS:
                break
        unknown = [given for given in found if given.job and given.job.audio is None and given.job.seconds == np.inf]
        with ThreadPoolExecutor(HEADERS) as pool:
            for given, stated in zip(unknown, pool.map(_stated, unknown)):
                if isinstance(stated, CanterError):
                    given.job, given.error = None, _told(given, str(stated))
                elif stated is not None and given.job:
                    given.job = replace(given.job, seconds=stated)
        return found

    def _recordings(self, audio: Iterator[Audio], options: _Options) -> Iterator[_Given]:
        """Yield what is given, folders and manifests as what they hold."""
        for one in audio:
            if not isinstance(one, str | os.PathLike) or is_media(os.fspath(one)):
                yield self._recording(one, options)
                continue
            try:
                files = files_in(os.fspath(one))
                if files:
                    yield from (self._recording(file, options) for file in files)
                    continue
                empty = True
                for item in items_of(one, options.defaults):
                    empty = False
                    yield self._listed(item)
                if empty:
                    yield _Given(
                        Item({}, None),
                        shown=redacted(os.fspath(one)),
                        error=f"{redacted(os.fspath(one))} holds nothing to transcribe",
                    )
            except CanterError as error:
                yield _Given(Item({}, None), shown=redacted(os.fspath(one)), error=str(error))

    def _listed(self, item: Item) -> _Given:
        """Return a row of a manifest, or a file of a folder."""
        item = self._with_language(item)
        path = item.row.get("audio_filepath")
        shown = item.utterance.audio_filepath if item.utterance else str(path) if path else None
        shown = redacted(shown) if shown else None
        if item.utterance is None:
            return _Given(item, shown=shown, error=item.problem)
        return _Given(item, Job(item.utterance, item.utterance.duration), shown)

    def _recording(self, one: Audio, options: _Options) -> _Given:
        """Return one file or array, as far as it can be checked without reading it."""
        close = None
        try:
            if isinstance(one, str | os.PathLike):
                path, shown, samples = absolute(one), redacted(os.fspath(one)), None
                if not is_url(path) and "::" not in path and not os.path.exists(path):
                    where = "" if os.path.isabs(one) else f" (looked for in {os.getcwd()})"
                    return _Given(Item({}, None), shown=shown, error=f"{shown} does not exist{where}")
            elif isinstance(one, bytes | bytearray | memoryview) or hasattr(one, "read"):
                path, close = _spooled(one)
                shown, samples = getattr(one, "name", None), None
                shown = shown if isinstance(shown, str) else None
            elif isinstance(one, ArrayLike):
                path, shown = "array", None
                samples = _samples(one, options.sampling_rate or self.sample_rate, self.sample_rate)
            else:
                raise AudioError(f"{_shown(one)} is no audio: give a path, samples, or the bytes of a file")
        except CanterError as error:
            return _Given(Item({}, None), shown=None, error=str(error))
        seconds = len(samples) / self.sample_rate if samples is not None else np.inf
        utterance = Utterance(path, 0.0 if samples is None else seconds, text="")
        defaults = options.defaults
        row: dict[str, Any] = {"audio_filepath": shown}
        item = self._with_language(defaults.complete(Item(row, utterance)))
        if item.utterance is None:
            return _Given(item, shown=shown, error=item.problem, close=close)
        return _Given(item, Job(item.utterance, seconds, samples), shown, close=close)

    def _with_language(self, item: Item) -> Item:
        """Return the item; with a problem where the model needs a language and it names none."""
        if len(self.languages) < 2 or item.utterance is None or self._detects:
            return item
        return require_language([item], self.languages)[0]

    @property
    def _detects(self) -> bool:
        return Listener.detects(self.tokenizer)

    def _transcript(self, given: _Given, found: Transcription) -> Transcript:
        """Return the public form of what was found."""
        if found.error is not None:
            return Transcript("", path=given.shown, error=_told(given, found.error))
        seconds = found.seconds or 0.0
        utterance = given.item.utterance
        item = given.item
        if utterance is not None and utterance.duration == 0:
            row = given.item.row | {"duration": round(seconds, 3)}
            item = replace(given.item, row=row, utterance=replace(utterance, duration=seconds))
        language = found.language
        if language is None and len(self.languages) == 1:
            language = self.languages[0]
        if language is not None:
            language = canonical(language) or language
        found = replace(found, language=language)
        return Transcript(
            found.text,
            tuple(segments_of(item, found)),
            language,
            seconds,
            given.shown,
            lost_seconds=found.lost_seconds,
            warnings=found.warnings,
            language_probability=found.language_probability,
            _item=item,
            _found=found,
        )


def _stated(given: _Given) -> float | CanterError | None:
    assert given.job is not None
    try:
        return stated_seconds(given.job.utterance.audio_filepath)
    except CanterError as error:
        return error


def _told(given: _Given, error: str) -> str:
    """Return an error as it concerns one who named a file, not a row of a manifest, and with the file's name in it."""
    if given.item.utterance is not None and given.close is not None:  # a temporary file, whose name says nothing
        error = error.replace(given.item.utterance.audio_filepath, given.shown or "what was given")
    if given.shown and os.path.basename(given.shown) not in error:
        error = f"{given.shown}: {error}"
    return error


def _is_one(audio: Any) -> bool:
    return isinstance(audio, str | os.PathLike | ArrayLike | bytes | bytearray | memoryview) or hasattr(audio, "read")


def _is_whole(number: Any) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def _spooled(one: Any) -> tuple[str, Callable[[], None]]:
    """Write the bytes of an audio file to a temporary one, and return its path and what removes it."""
    data: Any = one.read() if hasattr(one, "read") else one
    if isinstance(data, str):
        raise AudioError("a file that was opened as text is no audio: open it with mode 'rb'")
    handle, path = tempfile.mkstemp(prefix="canter-", suffix=".audio")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    return path, partial(Path(path).unlink, missing_ok=True)


def _samples(array: ArrayLike, rate: int, wanted: int) -> npt.NDArray[np.float32]:
    """Return an array (S,) or (S, C) of any usual type as mono float32 at ``wanted`` Hz.

    Raises AudioError for one of another shape or type, and for samples that are no audio.
    """
    samples: npt.NDArray[Any] = np.asarray(array)
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        raise AudioError(
            f"an array of shape {samples.shape}: samples go first, (S, C); transpose it, or give a list of arrays "
            "for several recordings"
        )
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise AudioError(f"an array of shape {samples.shape} is no audio: give (S,) samples, or (S, C) of C channels")
    if samples.dtype.kind == "i" and samples.dtype.itemsize in (2, 4):
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    elif samples.dtype.kind != "f":
        raise AudioError(f"an array of {samples.dtype} is no audio: give float samples in -1 ... 1, int16 or int32")
    samples = samples.astype(np.float32, copy=False)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    peak = max(float(samples.max()), -float(samples.min()))  # np.abs would take as much memory again
    if not np.isfinite(peak):
        raise AudioError("an array holds samples that are not finite numbers")
    if peak > LOUDEST:
        raise AudioError(f"an array of floats reaches {peak:,.0f}; float samples lie in -1 ... 1 (int16's over 32768)")
    if rate != wanted:
        import soxr  # pyright: ignore[reportMissingTypeStubs]

        samples = soxr.resample(samples, rate, wanted, quality="HQ")
    return np.ascontiguousarray(samples, dtype=np.float32)
