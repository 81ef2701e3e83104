"""One recording in decoding: its chunks become requests to the engine, and their hypotheses its transcript."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise
from typing import Literal, get_args

import numpy as np

from canter.corpus.manifest import Utterance
from canter.errors import ConfigError
from canter.inference.engine import language
from canter.inference.engine.engine import Engine, default_window
from canter.inference.engine.requests import Hypothesis, Request
from canter.inference.languages import Probabilities, detected_language, language_in_prompt, languages_to_detect
from canter.inference.transcript.chunks import Chunk, split_audio, trim_silence
from canter.inference.transcript.reading import NO_FALLBACK, Assembly, Fallback, WindowPolicy, in_speech, segments_of
from canter.inference.transcript.segments import Segment
from canter.inference.transcript.vad import DETECTORS, FRAME
from canter.text.owsm import OwsmTokenizer
from canter.text.prompts import CONTEXTS, FORMATS, utterance_slots
from canter.text.tokenizer import Tokenizer
from canter.text.whisper import WhisperTokenizer

Timestamps = Literal["none", "segment", "word"]
Vad = Literal["energy", "silero", "none"]
NO_SAMPLES = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Transcription:
    """Transcript of one utterance, or the reason why there is none."""

    text: str
    tokens: tuple[int, ...] = ()
    """Tokens without prompt and end token."""
    finished: bool = True
    """False where the limit on tokens ended it, without an end token."""
    ctc: tuple[int, ...] | None = None
    """Greedy outputs of the CTC head, if the engine computes them."""
    error: str | None = None
    segments: tuple[Segment, ...] = ()
    """Segments with their times, in order; their texts join to ``text``."""
    language: str | None = None
    """Language that was stated or detected."""
    language_probability: float | None = None
    """Probability of the detected language over all speech; None where it was not detected."""
    seconds: float | None = None
    """Length of the audio that was read."""
    lost_seconds: float = 0.0
    """Seconds of the audio that are damaged or missing."""
    warnings: tuple[str, ...] = ()
    """Faults of the audio: losses, channels that cancel each other out."""
    score: float | None = None
    """Mean natural-log probability of a token, end tokens included, where the text was given and is aligned."""


@dataclass(frozen=True)
class TranscribeConfig:
    """Settings of a transcription. Raises ConfigError for values that are not known."""

    timestamps: Timestamps = "none"
    """`segment`: times from the model's timestamp tokens, where its prompt format has them; `word`: times of words too,
    from cross-attention or Canary's timestamps."""
    chunk_seconds: float | None = None
    """Maximum length of the chunks that long audio is divided into (None: `default_window`)."""
    overlap_seconds: float = 3.0
    """Overlap of two chunks where speech has no pause."""
    vad: Vad = "energy"
    """Voice activity detector; `silero` needs the extra `vad`, `none` makes overlapping chunks of full length."""
    fallback: Fallback | None = field(default_factory=Fallback)
    """Thresholds for decoding again, for Whisper only. None: no further attempts, but silence is still omitted."""
    prompt: str = ""
    """Text that precedes the recording: names and words to expect, a style of writing."""
    audio_track: int | None = None
    """Audio track of files with several, from 0; None: the one marked as default, else the first."""

    def __post_init__(self) -> None:
        for name, value, known in (("timestamps", self.timestamps, Timestamps), ("vad", self.vad, Vad)):
            if value not in get_args(known):
                raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(get_args(known))}")


class Transcriber:
    """One engine with a tokenizer and settings: it makes prompts, chunks and requests, and reads hypotheses."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: TranscribeConfig | None = None):
        """Raise ConfigError where ``vad`` needs an extra that is not installed."""
        self.engine, self.tokenizer, self.config = engine, tokenizer, config or TranscribeConfig()
        self.timestamps = engine.rules.timestamps
        self.policy: WindowPolicy | None = None
        if isinstance(tokenizer, WhisperTokenizer):
            self.policy = WindowPolicy(tokenizer, self.config.fallback or Fallback(temperatures=()), self.timestamps)
        elif self.timestamps:
            self.policy = WindowPolicy(tokenizer, NO_FALLBACK, self.timestamps)
        asked = self.config.chunk_seconds or default_window(engine.model)
        self.window = min(asked, engine.model.longest_seconds)
        self.rate = engine.model.sample_rate
        self.detector = None
        if self.config.vad != "none":
            self.detector = partial(DETECTORS[self.config.vad], rate=self.rate)
            self.detector(np.zeros(1, np.float32))

    @property
    def format(self) -> tuple[str, ...]:
        """Tokens and slots of the model's prompt."""
        if isinstance(self.tokenizer, OwsmTokenizer):
            return self.tokenizer.prompt_slots
        return FORMATS.get(getattr(self.tokenizer, "prompt_format", "whisper" if self.policy else ""), ())

    def slots(self, utterance: Utterance) -> dict[str, str]:
        """Return the prompt slots of an utterance."""
        return self.with_timestamps(utterance_slots(utterance))

    def with_timestamps(self, slots: dict[str, str]) -> dict[str, str]:
        """Return the slots with timestamps, if these are asked for and the prompt has a slot for them."""
        asked = self.config.timestamps != "none" and "timestamp" in self.format
        return {**slots, "timestamp": "yes"} if asked else slots

    def prompt(self, slots: Mapping[str, str], text: str) -> list[int]:
        """Return the prompt's token ids, with the end of the preceding ``text``: at most half of the decoder's
        positions.

        Raises ConfigError where the prompt has no slot for preceding text.
        """
        if not text:
            return self.tokenizer.prompt_ids(slots)
        slot = next((part for part in self.format if part in CONTEXTS), None)
        if slot is None:
            raise ConfigError("this model takes no text before what it transcribes")
        most = self.engine.model.config.decoder.positions // 2
        end = " ".join(text[-16 * most :].split())  # more than fits; tokenising a book would take long
        ids = self.tokenizer.prompt_ids({**slots, slot: end})
        over = max(0, len(ids) - most)
        return ids[:1] + ids[1 + over :]  # <|startofprev|> or <|startofcontext|> precedes the text

    def request(self, slots: Mapping[str, str], prompt: str | None = None) -> Request:
        """Return the request that all chunks of an utterance have in common. ``prompt``: preceding text, by default the
        configuration's."""
        prompt = self.config.prompt if prompt is None else prompt
        names = languages_to_detect(self.tokenizer, slots)
        if names:
            slots = {**slots, "source_lang": names[0]}
        ids = self.prompt(slots, prompt)
        languages = tuple(self.tokenizer.special_id(f"<|{name}|>") for name in names)
        return Request(
            NO_SAMPLES,
            ids,
            policy=self.policy,
            languages=languages,
            language_at=ids.index(languages[0]) if names else 1,
            scored=self.policy is not None,
            aligned=self.config.timestamps == "word",
            guarded=not (self.policy and any(self.policy.fallback.temperatures)),
        )

    def at_temperature(self, request: Request, temperature: float) -> Request:
        """Return the request with a temperature, at which it is decoded only once."""
        policy = request.policy
        if isinstance(policy, WindowPolicy):
            policy = replace(policy, fallback=replace(policy.fallback, temperatures=()))
        return replace(request, temperature=temperature, policy=policy)

    def chunks(self, blocks: Iterable[np.ndarray]) -> Iterator[Chunk]:
        """Yield audio, given in blocks at the model's sample rate, in chunks that fit the model, without long silence;
        none for audio without speech."""
        blocks, begun = iter(blocks), list[np.ndarray]()
        for block in blocks:
            begun.append(block)
            if sum(map(len, begun)) > self.window * self.rate:
                overlap = self.config.overlap_seconds if self.engine.aligns else 0.0  # words join overlapping chunks
                yield from split_audio(chain(begun, blocks), self.detector, self.window, overlap, self.rate)
                return
        if begun:
            audio = begun[0] if len(begun) == 1 else np.concatenate(begun)
            yield from trim_silence(audio, self.detector, self.window, self.rate)

    def requests(self, request: Request, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Request]]:
        """Yield the chunks of an utterance, each with its request; ``request`` is what they have in common.

        In language detection, a chunk whose language is uncertain takes the longest chunk up to the next one into
        account.
        """
        if not request.languages:
            yield from ((chunk, self._of_chunk(request, chunk)) for chunk in chunks)
            return
        longest: Chunk | None = None
        for chunk, following in pairwise(chain(chunks, [None])):
            assert chunk is not None
            others = [one for one in (longest, following) if one is not None]
            nearby = max(others, key=lambda one: len(one.samples), default=None)
            yield (
                chunk,
                replace(
                    self._of_chunk(request, chunk),
                    speech_spans=tuple(language.speech_spans(chunk.voiced, FRAME)),
                    nearby_audio=nearby.samples if nearby else None,
                ),
            )
            if longest is None or len(chunk.samples) >= len(longest.samples):
                longest = chunk

    def _of_chunk(self, request: Request, chunk: Chunk) -> Request:
        prompt = list(request.prompt)
        if chunk.ends_in_speech:
            # Without timestamps Whisper omits the sentence that the end divides, and nothing says where it begins.
            prompt = [token for token in prompt if token != self.engine.rules.no_timestamps]
        policy = request.policy
        return replace(
            request,
            audio=chunk.samples,
            prompt=prompt,
            aligned=request.aligned or chunk.overlap > 0 or chunk.ends_in_speech,
            policy=replace(policy, voiced=chunk.voiced) if isinstance(policy, WindowPolicy) else policy,
        )

    def segments(self, hypothesis: Hypothesis, seconds: float, voiced: np.ndarray | None = None) -> list[Segment]:
        """Return the segments of a chunk of ``seconds`` seconds, without silence; ``voiced`` is the chunk's."""
        found: list[Segment] = []
        begins = 0.0
        for part in hypothesis.parts:
            end = begins + part.continues_at if part.continuation else seconds
            if not self._silent(part):
                new = segments_of(part, self.tokenizer, end - begins, self.timestamps)
                found += [segment.shifted(begins) for segment in new]
            begins = end
        return found if voiced is None else in_speech(found, voiced)

    def languages(self, hypothesis: Hypothesis, seconds: float) -> list[Probabilities]:
        """Return the seconds and the language probabilities of each part of a chunk in which they were detected."""
        found: list[Probabilities] = []
        for part in hypothesis.parts:
            here = part.continues_at if part.continuation else seconds
            seconds -= here
            if part.languages and not self._silent(part):
                found.append((here, part.languages))
        return found

    def _silent(self, hypothesis: Hypothesis) -> bool:
        return self.policy is not None and self.policy.fallback.silent(hypothesis)


@dataclass(frozen=True)
class ChunkKey:
    """Identifier of the request of one chunk."""

    recording: int
    number: int
    start: float
    """Seconds from the start of the recording."""
    seconds: float


class Recording:
    """One recording in decoding: the requests of its chunks, and the transcript of those whose hypotheses are back."""

    def __init__(self, transcriber: Transcriber, request: Request, number: int = 0):
        """Begin a recording: all chunks have ``request`` in common; ``number`` identifies the recording in keys."""
        self.transcriber, self.request, self.number = transcriber, request, number
        self._assembly = Assembly()
        self._chunks: list[tuple[ChunkKey, float, np.ndarray]] = []  # with overlap and ``voiced``, without samples
        self._hypotheses: dict[int, Hypothesis] = {}
        self._languages: list[Probabilities] = []

    def requests(self, chunks: Iterable[Chunk]) -> Iterator[Request]:
        """Yield the request of each chunk in order, with a `ChunkKey`. `complete` needs all of them to be taken."""
        for chunk, request in self.transcriber.requests(self.request, chunks):
            key = ChunkKey(self.number, len(self._chunks), chunk.start, chunk.seconds)
            self._chunks.append((key, chunk.overlap, chunk.voiced))
            yield replace(request, key=key)
        self._assembly.total = len(self._chunks)

    def add(self, number: int, hypothesis: Hypothesis) -> list[Segment]:
        """Add the hypothesis of chunk ``number``, and return the segments that have become final, in order."""
        key, overlap, voiced = self._chunks[number]
        self._hypotheses[number] = hypothesis
        self._languages += self.transcriber.languages(hypothesis, key.seconds)
        segments = self.transcriber.segments(hypothesis, key.seconds, voiced)
        return self._assembly.add(number, segments, key.start, overlap)

    @property
    def complete(self) -> bool:
        """True once the hypotheses of all chunks are there."""
        return self._assembly.complete

    @property
    def detected(self) -> tuple[str, float] | None:
        """Language detected in the chunks so far, and its probability."""
        return detected_language(self.transcriber.tokenizer, self._languages)

    def transcription(self, stated: str | None = None) -> Transcription:
        """Return the transcript of all chunks; ``stated`` is the utterance's language."""
        tokenizer = self.transcriber.tokenizer
        text, segments = self._assembly.finished()
        found = [part for number in range(len(self._chunks)) for part in self._hypotheses[number].parts]
        if len(found) == 1 and segments:
            text = tokenizer.decode(found[0].tokens).strip()
        spoken, probability = self.detected or (None, None)
        if spoken is None:
            named = language_in_prompt(tokenizer, found[0].prompt) if found and not found[0].languages else None
            spoken = named or stated
        with_ctc = any(one.ctc is not None for one in found)
        return Transcription(
            text,
            tuple(token for one in found for token in one.tokens),
            all(one.finished for one in found),
            tuple(output for one in found for output in one.ctc or ()) if with_ctc else None,
            segments=segments,
            language=spoken,
            language_probability=probability,
        )
