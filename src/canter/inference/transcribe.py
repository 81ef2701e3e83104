"""Utterances in, transcripts out: audio is read ahead, batched by length, and decoded by the engine."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, pairwise
from typing import Literal, TypeVar

import numpy as np

from canter.corpus.audio import AudioBlocks, DecodedAudio, audio_blocks, decode_utterance
from canter.corpus.manifest import Utterance
from canter.errors import AudioError, CanterError, ConfigError
from canter.inference.engine import language
from canter.inference.engine.capacity import encoder_batches, usual_window
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import Hypothesis, Request, Underway
from canter.inference.progress import Decoded, Tally
from canter.inference.transcript.pieces import Piece, cut, trimmed
from canter.inference.transcript.reading import Assembly, Fallback, ended_early, in_speech, segments_of, skipped
from canter.inference.transcript.segments import Segment
from canter.inference.transcript.vad import DETECTORS, FRAME
from canter.models.hub import checkpoint_of as checkpoint_of
from canter.text.prompts import CONTEXTS, FORMATS, utterance_slots
from canter.text.tokenizer import Tokenizer
from canter.text.whisper import WhisperTokenizer

READERS = 2  # threads that decode audio while the model works
AHEAD = 2  # batches read ahead


@dataclass(frozen=True)
class Transcription:
    """What was heard in one utterance, or why nothing could be."""

    text: str
    tokens: tuple[int, ...] = ()
    """Prompt and end token left out."""
    finished: bool = True
    """False where the limit on tokens ended it: the model found no end."""
    ctc: tuple[int, ...] | None = None
    """The CTC head's greedy outputs, where the engine was told to give them."""
    error: str | None = None
    segments: tuple[Segment, ...] = ()
    """Stretches of the utterance with their times, in order; their texts joined are ``text``."""
    language: str | None = None
    """What the utterance's prompt said, or what was detected."""
    language_probability: float | None = None
    """Probability of the language that was detected, over all of the speech; None where it was not detected."""
    seconds: float | None = None
    """Length of the audio that was read."""
    lost_seconds: float = 0.0
    """Seconds of the audio that are damaged or missing."""
    warnings: tuple[str, ...] = ()
    """Faults of the audio: losses, channels that cancel each other out."""


@dataclass(frozen=True)
class TranscribeConfig:
    """What is asked of a transcription."""

    timestamps: Literal["none", "segment", "word"] = "none"
    """`segment`: the model is asked for timestamps, where its prompt format has them; `word`: words get times
    from cross-attention, or Canary's timestamps."""
    window_seconds: float | None = None
    """Longer audio is cut; by default what the model takes in one piece (``usual_window``)."""
    overlap_seconds: float = 3.0
    """What two pieces have in common where speech leaves no pause to cut in."""
    vad: Literal["energy", "silero", "none"] = "energy"
    """What finds the pauses of long audio; `silero` needs the extra `vad`, `none` cuts every window."""
    fallback: Fallback | None = field(default_factory=Fallback)
    """When a Whisper's hypothesis is not believed; other models have none. None: every one is kept, but for silence."""
    context: str = ""
    """Text that is taken to come before: names and words to expect, a style of writing."""
    audio_track: int | None = None
    """Audio track of files with several, from 0; None: the one marked as default, else the first."""


class Listener:
    """Prompts and requests for one engine, and what comes back as segments; the tokens are ``tokenizer``'s."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: TranscribeConfig | None = None):
        """Raises ConfigError where ``vad`` needs an extra that is not there."""
        self.engine, self.tokenizer, self.config = engine, tokenizer, config or TranscribeConfig()
        self.whisper = isinstance(tokenizer, WhisperTokenizer)
        once = Fallback(temperatures=())
        self.fallback = (self.config.fallback or once) if self.whisper else None
        self.first_timestamp = engine.rules.first_timestamp if engine.rules.no_timestamps else None
        asked = self.config.window_seconds or usual_window(engine.model)
        self.window = min(asked, engine.model.longest_seconds)
        self.rate = engine.model.sample_rate
        self.detector = None
        if self.config.vad != "none":
            self.detector = partial(DETECTORS[self.config.vad], rate=self.rate)
            self.detector(np.zeros(1, np.float32))

    def slots(self, utterance: Utterance) -> dict[str, str]:
        """The utterance's prompt slots, with timestamps if they are asked for."""
        slots = utterance_slots(utterance)
        if self.config.timestamps != "none" and "timestamp" in self.format:
            slots["timestamp"] = "yes"
        return slots

    @staticmethod
    def detects(tokenizer: Tokenizer) -> bool:
        """Return whether a model with this tokenizer detects the language of an utterance that names none."""
        return isinstance(tokenizer, WhisperTokenizer) and len(tokenizer.languages) > 1

    @property
    def format(self) -> tuple[str, ...]:
        """Tokens and slots of the model's prompt."""
        return FORMATS.get(getattr(self.tokenizer, "prompt_format", "whisper" if self.whisper else ""), ())

    def prompt(self, slots: Mapping[str, str], context: str) -> list[int]:
        """Token ids of the prompt, with as much of the text before, its end, as leaves half of the decoder's positions
        free. Raises ConfigError where the prompt has no place for any."""
        if not context:
            return self.tokenizer.prompt_ids(slots)
        slot = next((part for part in self.format if part in CONTEXTS), None)
        if slot is None:
            raise ConfigError("this model takes no text before what it transcribes")
        most = self.engine.model.config.decoder.positions // 2
        text = " ".join(context[-16 * most :].split())  # more than fits, so that a book costs no more than a page
        ids = self.tokenizer.prompt_ids({**slots, slot: text})
        over = max(0, len(ids) - most)
        return ids[:1] + ids[1 + over :]  # before the text stands <|startofprev|>, or <|startofcontext|>

    def request(self, slots: Mapping[str, str], context: str | None = None) -> Request:
        """Return what all pieces of an utterance have in common. A multilingual Whisper detects the source language of
        slots that name none. ``context``: text that comes before, in place of the configuration's."""
        context = self.config.context if context is None else context
        languages: tuple[int, ...] = ()
        at = 1
        if self.detects(self.tokenizer) and "source_lang" not in slots:
            names = self.tokenizer.languages
            languages = tuple(self.tokenizer.special_id(f"<|{name}|>") for name in names)
            slots = {**slots, "source_lang": names[0]}
        prompt = self.prompt(slots, context)
        if languages:
            at = prompt.index(self.tokenizer.special_id("<|startoftranscript|>")) + 1
        fallback, decode = self.fallback, self.tokenizer.decode
        return Request(
            np.zeros(0, np.float32),
            prompt,
            retry=(lambda found: fallback.retry(found, decode(found.tokens))) if fallback else None,
            rest=self._rest,
            languages=languages,
            language_at=at,
            scored=fallback is not None,
            aligned=self.config.timestamps == "word",
            guarded=not (fallback and any(fallback.temperatures)),
        )

    def pieces(self, blocks: Iterable[np.ndarray]) -> Iterator[Piece]:
        """Yield audio in blocks, at the model's rate, as pieces that fit the model, without long silence. None where
        nobody speaks at all."""
        blocks, begun = iter(blocks), list[np.ndarray]()
        for block in blocks:
            begun.append(block)
            if sum(map(len, begun)) > self.window * self.rate:
                overlap = self.config.overlap_seconds if self.engine.aligns else 0.0  # nothing could join them
                yield from cut(chain(begun, blocks), self.detector, self.window, overlap, self.rate)
                return
        if begun:
            audio = begun[0] if len(begun) == 1 else np.concatenate(begun)
            yield from trimmed(audio, self.detector, self.window, self.rate)

    def requests(self, request: Request, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Request]]:
        """Yield the pieces of an utterance, each with its request; ``request`` is what they have in common.

        Where the language is detected, a piece whose own language is not certain goes by the longest piece up to the
        next one too.
        """
        if not request.languages:
            yield from ((piece, self.of_piece(request, piece)) for piece in pieces)
            return
        longest: Piece | None = None
        for piece, following in pairwise(chain(pieces, [None])):
            assert piece is not None
            others = [one for one in (longest, following) if one is not None]
            nearby = max(others, key=lambda one: len(one.samples), default=None)
            yield piece, self.of_piece(request, piece, nearby)
            if longest is None or len(piece.samples) >= len(longest.samples):
                longest = piece

    def of_piece(self, request: Request, piece: Piece, nearby: Piece | None = None) -> Request:
        """Return an utterance's ``request`` for one of its pieces; ``nearby``: another one, by whose language it goes
        where its own is not certain."""
        prompt = list(request.prompt)
        if piece.goes_on:
            # Without timestamps a Whisper leaves out the sentence that the end cuts, and nothing tells where it begins.
            prompt = [token for token in prompt if token != self.engine.rules.no_timestamps]
        aligned = request.aligned or piece.overlap > 0 or piece.goes_on
        request = replace(request, audio=piece.samples, prompt=prompt, aligned=aligned)
        if request.rest:
            request = replace(request, rest=partial(self._rest, voiced=piece.voiced))
        if not request.languages:
            return request
        return replace(
            request,
            stretches=tuple(language.stretches(piece.voiced, FRAME)),
            nearby=nearby.samples if nearby else None,
        )

    def segments(self, hypothesis: Hypothesis, seconds: float, voiced: np.ndarray | None = None) -> list[Segment]:
        """Return the segments of a piece of so many seconds; none where Whisper heard nobody speak. ``voiced``: where
        somebody speaks in it (see `Piece`)."""
        found: list[Segment] = []
        begins = 0.0
        for part in hypothesis.parts:
            end = begins + part.rest_begins if part.rest else seconds
            if not self._silent(part):
                new = segments_of(part, self.tokenizer, end - begins, self.first_timestamp)
                found += [segment.shifted(begins) for segment in new]
            begins = end
        return found if voiced is None else in_speech(found, voiced)

    def languages(self, hypothesis: Hypothesis, seconds: float) -> list[tuple[float, tuple[float, ...]]]:
        """Return the seconds of each part of a piece, and the probabilities of the languages where they were
        detected."""
        found: list[tuple[float, tuple[float, ...]]] = []
        for part in hypothesis.parts:
            here = part.rest_begins if part.rest else seconds
            seconds -= here
            if part.languages and not self._silent(part):
                found.append((here, part.languages))
        return found

    def spoken(self, parts: Sequence[tuple[float, tuple[float, ...]]]) -> tuple[str | None, float | None]:
        """Return the language of an utterance and its probability, by what `languages` gives for its pieces; None where
        nothing was detected."""
        found = language.spoken(parts)
        return (self.tokenizer.languages[found[0]], found[1]) if found else (None, None)

    def _silent(self, hypothesis: Hypothesis) -> bool:
        return self.fallback is not None and self.fallback.silent(hypothesis)

    def _rest(self, hypothesis: Hypothesis, seconds: float, voiced: np.ndarray | None = None) -> float | None:
        """Return where a Whisper's hypothesis stopped, before so many seconds of audio did."""
        if self.first_timestamp is None or self._silent(hypothesis):
            return None
        place = ended_early(hypothesis, seconds, self.first_timestamp, voiced)
        if place is None:
            place = skipped(hypothesis, self.tokenizer, seconds, self.first_timestamp, voiced)
        return place

    def language(self, hypothesis: Hypothesis) -> str | None:
        """Return the language in a Whisper's prompt, detected or not."""
        if not self.whisper:
            return None
        shown = self.tokenizer.decode(hypothesis.prompt, special=True)
        return next((name for name in self.tokenizer.languages if f"<|{name}|>" in shown), None)


@dataclass(frozen=True)
class _Part:
    """The key of one piece's request."""

    utterance: int
    number: int
    start: float
    seconds: float
    overlap: float
    voiced: np.ndarray = field(compare=False)


def transcribe(
    engine: Engine,
    tokenizer: Tokenizer,
    utterances: Sequence[Utterance],
    longest_seconds: float = math.inf,
    config: TranscribeConfig | None = None,
) -> list[Transcription]:
    """The transcriptions of ``utterances``, in their order. What cannot be read is a transcription with an
    ``error``."""
    results: list[Transcription] = [Transcription("")] * len(utterances)
    for index, transcription in transcribe_stream(engine, tokenizer, utterances, longest_seconds, config):
        results[index] = transcription
    return results


def transcribe_stream(
    engine: Engine,
    tokenizer: Tokenizer,
    utterances: Sequence[Utterance],
    longest_seconds: float = math.inf,
    config: TranscribeConfig | None = None,
) -> Iterator[tuple[int, Transcription]]:
    """Yield what ``transcribe`` returns, each (index, transcription) as soon as it is finished, long utterances first.

    Batches follow the stated durations; only a few batches of audio are in memory at a time, of an utterance
    longer than the window never more than a few windows. ``longest_seconds``: what is longer is refused.
    """
    for event in transcribe_events(engine, tokenizer, utterances, longest_seconds, config):
        if not isinstance(event, Decoded):
            yield event


def transcribe_events(
    engine: Engine,
    tokenizer: Tokenizer,
    utterances: Sequence[Utterance],
    longest_seconds: float = math.inf,
    config: TranscribeConfig | None = None,
) -> Iterator[tuple[int, Transcription] | Decoded]:
    """Yield what ``transcribe_stream`` yields, and a few times a second how much audio is decoded."""
    jobs = [(index, Job(utterance, utterance.duration)) for index, utterance in enumerate(utterances)]
    queue = _Queue(Listener(engine, tokenizer, config), [jobs], longest_seconds)
    tally = Tally([utterance.duration for utterance in utterances])
    for event in queue.events():
        if isinstance(event, Underway):
            yield tally.decoded((key, done) for key, done in event.rows if isinstance(key, _Part))
        elif isinstance(event, _Part):
            tally.add(event)
        else:
            tally.finish(event[0])
            yield event
    yield tally.decoded()


@dataclass(frozen=True)
class Job:
    """One utterance to transcribe."""

    utterance: Utterance
    seconds: float = math.inf
    """Its length, by which batches are made; infinite where that is not known before it is read."""
    audio: np.ndarray | None = None
    """(S,) float32 at the model's rate; None: read from the utterance's file."""


def transcribe_jobs(
    listener: Listener, groups: Iterable[Iterable[tuple[int, Job]]], longest_seconds: float = math.inf
) -> Iterator[tuple[int, Transcription]]:
    """Yield the transcription of every job, with the job's number, as soon as it is finished.

    ``groups`` may have no end. Each is asked for once the decoder has room for it, and batched by itself: long
    utterances first, piece by piece, then the others, longest first.
    """
    for event in _Queue(listener, groups, longest_seconds).events():
        if isinstance(event, tuple):
            yield event


@dataclass
class _Open:
    """A job that is being read or decoded."""

    job: Job
    assembly: Assembly = field(default_factory=Assembly)
    samples: int = 0  # read so far
    lost_seconds: float = 0.0
    warnings: tuple[str, ...] = ()


class _Queue:
    """What waits for the engine, read ahead in threads, and what has not come back whole."""

    def __init__(self, listener: Listener, groups: Iterable[Iterable[tuple[int, Job]]], longest_seconds: float):
        self.listener, self.groups, self.longest = listener, groups, longest_seconds
        self.open: dict[int, _Open] = {}
        self.failed: deque[tuple[int, Transcription]] = deque()
        self.settled: deque[int] = deque()  # whose number of pieces has become known

    def events(self) -> Iterator["tuple[int, Transcription] | _Part | Underway"]:
        """Decode the queue. Yield every piece that is decoded, every transcription that is finished with the number of
        its job, and a few times a second which rows are under way."""
        for event in self.listener.engine.events(self.batches()):
            if isinstance(event, Underway):
                yield event
                continue
            part = event.key
            assert isinstance(part, _Part)
            if part.utterance in self.open:
                assembly = self.open[part.utterance].assembly
                assembly.hypotheses[part.number] = event
                assembly.languages += self.listener.languages(event, part.seconds)
                segments = self.listener.segments(event, part.seconds, part.voiced)
                assembly.add(part.number, segments, part.start, part.overlap)
                yield part
            yield from self.finished()
        yield from self.finished()

    def batches(self) -> Iterator[list[Request]]:
        """Requests for the engine, with the next batches' audio read meanwhile."""
        with ThreadPoolExecutor(READERS) as pool:
            ahead: deque[Callable[[], list[Request]]] = deque()
            try:
                for batch in self._batches(pool):
                    ahead.append(batch)
                    if len(ahead) > AHEAD:
                        yield ahead.popleft()()
                while ahead:
                    yield ahead.popleft()()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _batches(self, pool: ThreadPoolExecutor) -> Iterator[Callable[[], list[Request]]]:
        """Batches of each group, each as a function that waits for it."""
        engine, window = self.listener.engine, self.listener.window
        size = max(1, int(engine.frames // engine.model.encoder_frames(window)))
        for group in self.groups:
            jobs = list(group)
            long = [pair for pair in jobs if pair[1].seconds > window]
            short = [pair for pair in jobs if pair[1].seconds <= window]
            for requests in _ahead(_grouped(self._long(long), size)):
                yield partial(list, requests)
            frames = [engine.model.encoder_frames(job.seconds) for _, job in short]
            for batch in encoder_batches(frames, engine.frames, engine.rows):
                yield partial(_all, [pool.submit(self._short, *short[place]) for place in batch])

    def _begin(self, index: int, job: Job) -> Request:
        """What the requests of an utterance have in common. Raises AudioError if it is too long."""
        self.open[index] = _Open(job)
        if self.longest < job.seconds < math.inf:
            self._refuse_long(job, job.seconds)
        return self.listener.request(self.listener.slots(job.utterance))

    def _refuse_long(self, job: Job, seconds: float) -> None:
        if seconds > self.longest:
            raise AudioError(
                f"{job.utterance.audio_filepath} is {seconds:.0f} s long, over the limit of "
                f"{self.longest:g} s (--longest-seconds): cut it"
            )

    def _short(self, index: int, job: Job) -> list[Request]:
        """The requests of an utterance that is read whole: one, unless it is longer than was stated."""
        try:
            request = self._begin(index, job)
            audio = job.audio
            if audio is None:
                decoded = decode_utterance(job.utterance, self.listener.rate, track=self.listener.config.audio_track)
                audio = decoded.samples
                self._note(index, decoded)
            self._count(index, audio)
            found = list(self._parts(request, index, [audio]))
        except CanterError as error:
            self._fail(index, error)
            return []
        self._settle(index, len(found))
        return found

    def _long(self, jobs: Sequence[tuple[int, Job]]) -> Iterator[Request]:
        """The requests of utterances that are read piece by piece."""
        for index, job in jobs:
            number = 0
            try:
                request = self._begin(index, job)
                decoded = None
                blocks: Iterable[np.ndarray] = () if job.audio is None else [job.audio]
                if job.audio is None:
                    track = self.listener.config.audio_track
                    decoded = audio_blocks(job.utterance, self.listener.rate, keep_damaged=True, track=track)
                    blocks = decoded
                for part in self._parts(request, index, (self._count(index, block) for block in blocks)):
                    yield part
                    number += 1
                if decoded is not None:
                    self._note(index, decoded)
            except CanterError as error:
                self._fail(index, error)
            else:
                self._settle(index, number)

    def _note(self, index: int, decoded: DecodedAudio | AudioBlocks) -> None:
        """Remember what is wrong with the audio of a job."""
        opened = self.open[index]
        opened.lost_seconds, opened.warnings = decoded.lost_seconds, decoded.warnings

    def _count(self, index: int, block: np.ndarray) -> np.ndarray:
        """``block``, once its samples are counted. Raises AudioError where they are too many."""
        opened = self.open[index]
        opened.samples += len(block)
        self._refuse_long(opened.job, opened.samples / self.listener.rate)
        return block

    def _parts(self, request: Request, index: int, blocks: Iterable[np.ndarray]) -> Iterator[Request]:
        """Yield the requests of audio (S,) in ``blocks``, one a piece."""
        pieces = self.listener.pieces(blocks)
        for number, (piece, asked) in enumerate(self.listener.requests(request, pieces)):
            seconds = len(piece.samples) / self.listener.rate
            yield replace(asked, key=_Part(index, number, piece.start, seconds, piece.overlap, piece.voiced))

    def _settle(self, index: int, pieces: int) -> None:
        self.open[index].assembly.total = pieces
        self.settled.append(index)

    def _fail(self, index: int, error: CanterError) -> None:
        self.failed.append((index, Transcription("", error=str(error))))

    def finished(self) -> Iterator[tuple[int, Transcription]]:
        """What has become whole or has failed since."""
        while self.failed:
            index, transcription = self.failed.popleft()
            del self.open[index]
            yield index, transcription
        for _ in range(len(self.settled)):
            index = self.settled.popleft()
            if not self.open[index].assembly.complete:
                self.settled.append(index)
                continue
            yield index, self._whole(self.open.pop(index))

    def _whole(self, opened: _Open) -> Transcription:
        assembly, utterance = opened.assembly, opened.job.utterance
        text, segments = assembly.finished()
        found = [part for number in range(assembly.total or 0) for part in assembly.hypotheses[number].parts]
        ctc = [one.ctc for one in found]
        if len(found) == 1 and segments:
            text = self.listener.tokenizer.decode(found[0].tokens).strip()
        spoken, probability = self.listener.spoken(assembly.languages)
        if spoken is None:
            named = self.listener.language(found[0]) if found and not found[0].languages else None
            spoken = named or utterance.target_lang or utterance.lang
        return Transcription(
            text,
            tuple(token for one in found for token in one.tokens),
            all(one.finished for one in found),
            tuple(x for one in ctc for x in one or ()) if any(one is not None for one in ctc) else None,
            segments=segments,
            language=spoken,
            language_probability=probability,
            seconds=opened.samples / self.listener.rate,
            lost_seconds=round(opened.lost_seconds, 3),
            warnings=opened.warnings,
        )


def _all(futures: Sequence[Future[list[Request]]]) -> list[Request]:
    return [request for future in futures for request in future.result()]


T = TypeVar("T")


def _grouped(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while group := list(islice(items, size)):
        yield group


def _ahead(items: Iterator[list[T]]) -> Iterator[list[T]]:
    """The same, with AHEAD of them made in a thread."""
    with ThreadPoolExecutor(1) as pool:
        futures = deque(pool.submit(next, items, None) for _ in range(AHEAD))
        while (item := futures.popleft().result()) is not None:
            futures.append(pool.submit(next, items, None))
            yield item
