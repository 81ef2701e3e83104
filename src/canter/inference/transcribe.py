"""Utterances in, transcripts out: audio is read ahead, batched by length, and decoded by the engine."""

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from canter.corpus.audio import audio_blocks, load_utterance
from canter.corpus.manifest import Utterance
from canter.errors import AudioError, CanterError, CheckpointError, ConfigError
from canter.inference.capacity import encoder_batches, usual_window
from canter.inference.engine import Engine
from canter.inference.pieces import Piece, cut
from canter.inference.progress import Decoded, Tally
from canter.inference.reading import Assembly, Fallback, ended_early, segments_of
from canter.inference.requests import Hypothesis, Request, Underway
from canter.inference.segments import Segment
from canter.inference.vad import DETECTORS
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
        text = " ".join(
            context[-16 * most :].split()
        )  # more than fits, so that a book costs no more than a page
        ids = self.tokenizer.prompt_ids({**slots, slot: text})
        over = max(0, len(ids) - most)
        return ids[:1] + ids[1 + over :]  # before the text stands <|startofprev|>, or <|startofcontext|>

    def request(self, slots: Mapping[str, str]) -> Request:
        """What all pieces of an utterance have in common. A Whisper of many languages detects the source
        language of slots that name none."""
        languages: tuple[int, ...] = ()
        names = self.tokenizer.languages
        if self.whisper and len(names) > 1 and "source_lang" not in slots:
            if self.config.context:
                raise ConfigError("with text before it the language of an utterance must be told")
            languages = tuple(self.tokenizer.special_id(f"<|{name}|>") for name in names)
            slots = {**slots, "source_lang": names[0]}
        fallback, decode = self.fallback, self.tokenizer.decode
        return Request(
            np.zeros(0, np.float32),
            self.prompt(slots, self.config.context),
            retry=(lambda found: fallback.retry(found, decode(found.tokens))) if fallback else None,
            rest=self._rest,
            languages=languages,
            scored=fallback is not None,
            aligned=self.config.timestamps == "word",
        )

    def pieces(self, blocks: Iterable[np.ndarray]) -> Iterator[Piece]:
        """Audio in blocks, at the model's rate, in pieces that fit the model."""
        overlap = self.config.overlap_seconds if self.engine.aligns else 0.0  # nothing could join them
        return cut(blocks, self.detector, self.window, overlap, self.rate)

    def of_piece(self, request: Request, piece: Piece) -> Request:
        """An utterance's ``request``, for one of its pieces."""
        prompt = list(request.prompt)
        if piece.goes_on:
            # Without timestamps a Whisper leaves out the sentence that the end cuts, and nothing tells where it begins.
            prompt = [token for token in prompt if token != self.engine.rules.no_timestamps]
        aligned = request.aligned or piece.overlap > 0 or piece.goes_on
        return replace(request, audio=piece.samples, prompt=prompt, aligned=aligned)

    def segments(self, hypothesis: Hypothesis, seconds: float) -> list[Segment]:
        """Of a piece of so many seconds; none where Whisper heard nobody speak."""
        if self._silent(hypothesis):
            return []
        found = segments_of(hypothesis, self.tokenizer, seconds, self.first_timestamp)
        if hypothesis.rest:
            begins = hypothesis.rest_begins
            rest = self.segments(hypothesis.rest, seconds - begins)
            found += [segment.shifted(begins) for segment in rest]
        return found

    def _silent(self, hypothesis: Hypothesis) -> bool:
        return self.fallback is not None and self.fallback.silent(hypothesis)

    def _rest(self, hypothesis: Hypothesis, seconds: float) -> float | None:
        """Where a Whisper's hypothesis stopped, before so many seconds of audio did."""
        if self.first_timestamp is None or self._silent(hypothesis):
            return None
        return ended_early(hypothesis, seconds, self.first_timestamp)

    def language(self, hypothesis: Hypothesis) -> str | None:
        """The language in a Whisper's prompt, detected or not."""
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
    listener = Listener(engine, tokenizer, config)
    queue = _Queue(listener, utterances, longest_seconds)
    tally = Tally([utterance.duration for utterance in utterances])
    for event in engine.events(queue.batches()):
        if isinstance(event, Underway):
            yield tally.decoded((key, done) for key, done in event.rows if isinstance(key, _Part))
            continue
        part = event.key
        assert isinstance(part, _Part)
        if part.utterance in queue.open:
            assembly = queue.open[part.utterance]
            assembly.hypotheses[part.number] = event
            segments = listener.segments(event, part.seconds)
            assembly.add(part.number, segments, part.start, part.overlap)
            tally.add(part)
        for index, transcription in queue.finished():
            tally.finish(index)
            yield index, transcription
    for index, transcription in queue.finished():
        tally.finish(index)
        yield index, transcription
    yield tally.decoded()


class _Queue:
    """What waits for the engine, read ahead in threads, and what has not come back whole."""

    def __init__(self, listener: Listener, utterances: Sequence[Utterance], longest_seconds: float):
        self.listener, self.utterances, self.longest = listener, utterances, longest_seconds
        self.open: dict[int, Assembly] = {}
        self.failed: deque[tuple[int, Transcription]] = deque()
        self.settled: deque[int] = deque()  # whose number of pieces has become known

    def batches(self) -> Iterator[list[Request]]:
        """Long utterances piece by piece, then the others, longest first."""
        engine, listener = self.listener.engine, self.listener
        long = [i for i, one in enumerate(self.utterances) if one.duration > listener.window]
        short = [i for i, one in enumerate(self.utterances) if one.duration <= listener.window]
        size = max(1, int(engine.frames // engine.model.encoder_frames(listener.window)))
        yield from _ahead(_grouped(self._long(long), size))
        frames = [engine.model.encoder_frames(self.utterances[index].duration) for index in short]
        batches = encoder_batches(frames, engine.frames, engine.rows)
        with ThreadPoolExecutor(READERS) as pool:
            ahead: deque[list[Future[list[Request]]]] = deque()
            try:
                for batch in [*batches, *[[]] * AHEAD]:  # empty ones push the last out
                    ahead.append([pool.submit(self._short, short[index]) for index in batch])
                    if len(ahead) > AHEAD:
                        yield [request for future in ahead.popleft() for request in future.result()]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, index: int) -> Request:
        """What the requests of an utterance have in common. Raises AudioError if it is too long."""
        utterance = self.utterances[index]
        self.open[index] = Assembly()
        if utterance.duration > self.longest:
            raise AudioError(
                f"{utterance.audio_filepath} is {utterance.duration:.0f} s long, over the limit of "
                f"{self.longest:g} s (--longest-seconds): cut it"
            )
        return self.listener.request(self.listener.slots(utterance))

    def _short(self, index: int) -> list[Request]:
        try:
            request = self._begin(index)
            audio = load_utterance(self.utterances[index], self.listener.rate)
            seconds = len(audio) / self.listener.rate
            if seconds > self.longest:
                raise AudioError(f"{self.utterances[index].audio_filepath} is {seconds:.0f} s long: cut it")
            if seconds <= self.listener.window:
                found = [replace(request, audio=audio, key=_Part(index, 0, 0.0, seconds, 0.0))]
            else:
                pieces = self.listener.pieces([audio])
                found = [self._part(request, index, n, piece) for n, piece in enumerate(pieces)]
        except CanterError as error:
            self._fail(index, error)
            return []
        self._settle(index, len(found))
        return found

    def _long(self, indices: Sequence[int]) -> Iterator[Request]:
        for index in indices:
            number = 0
            try:
                request = self._begin(index)
                blocks = audio_blocks(self.utterances[index], self.listener.rate)
                for number, piece in enumerate(self.listener.pieces(blocks), 1):
                    yield self._part(request, index, number - 1, piece)
            except CanterError as error:
                self._fail(index, error)
            else:
                self._settle(index, number)

    def _part(self, request: Request, index: int, number: int, piece: Piece) -> Request:
        key = _Part(index, number, piece.start, len(piece.samples) / piece.rate, piece.overlap)
        return replace(self.listener.of_piece(request, piece), key=key)

    def _settle(self, index: int, pieces: int) -> None:
        self.open[index].total = pieces
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
            if not self.open[index].complete:
                self.settled.append(index)
                continue
            yield index, self._whole(self.open.pop(index), self.utterances[index])

    def _whole(self, assembly: Assembly, utterance: Utterance) -> Transcription:
        text, segments = assembly.finished()
        found = [part for number in range(assembly.total or 0) for part in assembly.hypotheses[number].parts]
        ctc = [one.ctc for one in found]
        if len(found) == 1 and segments:
            text = self.listener.tokenizer.decode(found[0].tokens).strip()
        return Transcription(
            text,
            tuple(token for one in found for token in one.tokens),
            all(one.finished for one in found),
            tuple(x for one in ctc for x in one or ()) if any(one is not None for one in ctc) else None,
            segments=segments,
            language=self.listener.language(found[0]) if found and self.listener.whisper
            else utterance.target_lang or utterance.lang,
        )  # fmt: skip


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


def checkpoint_of(path: str | Path) -> Path:
    """The model that ``path`` stands for: of a run folder its best checkpoint, or without one its newest;
    anything else stands for itself.

    Raises CheckpointError for a run without a whole checkpoint.
    """
    checkpoints = Path(path) / "checkpoints"
    if not checkpoints.is_dir():
        return Path(path)
    best = checkpoints / "best.json"
    if best.exists():
        try:
            chosen = checkpoints / json.loads(best.read_text(encoding="utf-8"))["checkpoint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{best} is damaged ({error}); name a folder of {checkpoints} instead"
            ) from None
        if chosen.is_dir():
            return chosen
    whole = sorted(file.parent for file in checkpoints.glob("step-*/config.json"))
    if not whole:
        raise CheckpointError(f"{path} holds no checkpoint yet; train on, or name a model folder")
    return whole[-1]
