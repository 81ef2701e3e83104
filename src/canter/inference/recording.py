"""One recording in decoding: its chunks become requests to the engine, and their hypotheses its transcript."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby, pairwise
from typing import Literal, get_args

import numpy as np

from canter.corpus.manifest import Utterance
from canter.errors import ConfigError
from canter.inference.engine import language
from canter.inference.engine.engine import Engine, default_window
from canter.inference.engine.hotwords import HotWords
from canter.inference.engine.requests import Hypothesis, Request
from canter.inference.hotwords import Phrases, hotwords_of
from canter.inference.languages import (
    Probabilities,
    detected_language,
    language_in_prompt,
    language_probabilities,
    languages_to_detect,
)
from canter.inference.transcript.chunks import Chunk, clipped, split_audio, trim_silence
from canter.inference.transcript.reading import (
    NO_FALLBACK,
    Assembly,
    Fallback,
    WindowPolicy,
    in_order_of_time,
    in_speech,
    joined,
    segments_of,
    without_hallucinations,
)
from canter.inference.transcript.segments import Alternatives, Segment
from canter.inference.transcript.vad import DETECTORS, FRAME, USUAL_VAD, Vad, VadOptions
from canter.models.protocol import Capability, check_support
from canter.text.prompts import CONTEXTS, format_of, utterance_slots
from canter.text.tokenizer import Tokenizer
from canter.text.whisper import WhisperTokenizer

Timestamps = Literal["none", "segment", "word"]
RESET_TEMPERATURE = 0.5  # above it a chunk's text is no prompt for later ones
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
    language_probabilities: tuple[tuple[str, float], ...] = ()
    """All languages with their probabilities, the most probable first, where only the language is detected."""
    seconds: float | None = None
    """Length of the audio that was read."""
    lost_seconds: float = 0.0
    """Seconds of the audio that are damaged or missing."""
    warnings: tuple[str, ...] = ()
    """Faults of the audio: losses, channels that cancel each other out."""
    nbest: tuple[Alternatives, ...] = ()
    """The most probable texts of each chunk, if they were asked for."""
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
    vad_options: VadOptions = USUAL_VAD
    """Threshold, padding and shortest lengths of the voice activity detector."""
    each_channel: bool = False
    """Transcribe each channel of a recording by itself, and merge their segments in order of time."""
    languages: tuple[str, ...] = ()
    """Languages among which to detect the one of a recording, in the model's codes; empty: all that it knows."""
    detect_only: bool = False
    """Detect the language, with a probability for each, and write no text."""
    condition_on_previous_text: bool = False
    """Decode the chunks of a recording one after another, each with the text before it in its prompt."""
    clip_timestamps: tuple[float, ...] = ()
    """Starts and ends, in seconds, of the spans to transcribe; without an end the last one lasts to the end of the
    recording. Empty: all of it."""
    hallucination_silence_threshold: float | None = None
    """Leave out segments whose words look invented, between pauses of more than this many seconds
    (`without_hallucinations`); needs times of words. None: leave out none."""
    fallback: Fallback | None = field(default_factory=Fallback)
    """Thresholds for decoding again, for Whisper only. None: no further attempts, but silence is still omitted."""
    prompt: str = ""
    """Text that precedes the recording: names and words to expect, a style of writing."""
    audio_track: int | None = None
    """Audio track of files with several, from 0; None: the one marked as default, else the first."""
    hotwords: Phrases | None = None
    """Phrases to prefer."""
    logprobs: bool = False
    """Add the log probability of every token."""
    nbest: int = 1
    """Number of texts of each chunk to keep; more than one needs as many beams."""

    def __post_init__(self) -> None:
        for name, value, known in (("timestamps", self.timestamps, Timestamps), ("vad", self.vad, Vad)):
            if value not in get_args(known):
                raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(get_args(known))}")
        clips, least = self.clip_timestamps, self.hallucination_silence_threshold
        if not all(0 <= one < math.inf for one in clips) or any(one >= other for one, other in pairwise(clips)):
            shown = ",".join(f"{one:g}" for one in clips)[:60]
            raise ConfigError(f"clip_timestamps are {shown}; they must be increasing seconds: start, end, start, ...")
        if least is not None and not 0 < least < math.inf:
            raise ConfigError(f"hallucination_silence_threshold is {least:g}; it must be more than 0 seconds")
        if self.vad == "none" and self.vad_options != USUAL_VAD:
            raise ConfigError("the options of voice activity detection mean nothing without a detector (vad none)")

    @property
    def times(self) -> Timestamps:
        """Times to ask the model for: at least those of segments, where channels are merged by them."""
        return "segment" if self.each_channel and self.timestamps == "none" else self.timestamps


class Transcriber:
    """One engine with a tokenizer and settings: it makes prompts, chunks and requests, and reads hypotheses."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: TranscribeConfig | None = None):
        """Raise ConfigError where ``vad`` needs an extra that is not installed, or the model does not support an
        option."""
        self.engine, self.tokenizer, self.config = engine, tokenizer, config or TranscribeConfig()
        self._check_options()
        self.among = self.config.languages or tokenizer.languages
        self.timestamps = engine.rules.timestamps
        self._hotwords: dict[tuple[Phrases, str | None], HotWords] = {}  # the latest
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
        language = next(iter(tokenizer.languages), None)
        self.hotwords(self.config.hotwords, {"target_lang": language} if language else {})  # refused before any work

    def _check_options(self) -> None:
        config, asked = self.config, dict[str, Capability]()
        if config.languages or config.detect_only:
            asked["language detection"] = "language_detection"
        if config.condition_on_previous_text:
            asked["condition_on_previous_text"] = "previous_text"
        if config.hallucination_silence_threshold is not None:
            asked["hallucination_silence_threshold"] = "word_timestamps"
            if config.timestamps != "word":
                raise ConfigError("hallucination_silence_threshold needs times of words (timestamps word)")
        if config.hotwords:
            asked["hot words"] = "cached_decoding"
        if config.logprobs or config.nbest > 1:
            asked["log probabilities and N-best texts"] = "cached_decoding"
        check_support(self.engine.model, asked, "this")
        if config.nbest > self.engine.config.beams:
            raise ConfigError(
                f"the {config.nbest} best texts need a beam size of at least {config.nbest}; it is "
                f"{self.engine.config.beams}"
            )
        if config.hotwords and self.engine.config.ctc_weight:
            raise ConfigError("hot words cannot be combined with joint CTC/attention decoding; leave one out")

    @property
    def format(self) -> tuple[str, ...]:
        """Tokens and slots of the model's prompt."""
        return format_of(self.tokenizer)

    def slots(self, utterance: Utterance) -> dict[str, str]:
        """Return the prompt slots of an utterance."""
        return self.with_timestamps(utterance_slots(utterance))

    def with_timestamps(self, slots: dict[str, str]) -> dict[str, str]:
        """Return the slots with timestamps, if these are asked for and the prompt has a slot for them."""
        asked = self.config.times != "none" and "timestamp" in self.format
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

    def hotwords(self, phrases: Phrases | None, slots: Mapping[str, str]) -> HotWords | None:
        """Return phrases as tokens of the language of a prompt; raise ConfigError where they cannot be spelled."""
        if phrases is None:
            return None
        key = phrases, slots.get("target_lang")
        found = self._hotwords.get(key)
        if found is None:
            found = hotwords_of(phrases, self.tokenizer, self.engine.model.vocabulary, key[1])
            self._hotwords = {key: found}
        return found

    def request(self, slots: Mapping[str, str], prompt: str | None = None, hotwords: Phrases | None = None) -> Request:
        """Return the request that all chunks of an utterance have in common. ``prompt``: preceding text, and
        ``hotwords``: phrases to prefer, by default the configuration's."""
        prompt = self.config.prompt if prompt is None else prompt
        if self.config.detect_only:
            slots = {name: value for name, value in slots.items() if name not in ("source_lang", "target_lang")}
        names = languages_to_detect(self.tokenizer, slots, self.among)
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
            scored=self.policy is not None or self.config.logprobs,
            hotwords=self.hotwords(hotwords or self.config.hotwords, slots),
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
        """Yield audio, given in blocks at the model's sample rate, in chunks that fit the model, without long silence
        and what lies outside of ``clip_timestamps``; none for audio without speech."""
        clips = self.config.clip_timestamps
        if not clips:
            yield from self._chunks(blocks)
            return
        for number, parts in groupby(clipped(blocks, clips, self.rate), key=lambda part: part[0]):
            for chunk in self._chunks(samples for _, samples in parts):
                yield replace(chunk, start=chunk.start + round(clips[2 * number] * self.rate) / self.rate)

    def _chunks(self, blocks: Iterable[np.ndarray]) -> Iterator[Chunk]:
        blocks, begun = iter(blocks), list[np.ndarray]()
        for block in blocks:
            begun.append(block)
            if sum(map(len, begun)) > self.window * self.rate:
                overlap = self.config.overlap_seconds if self.engine.aligns else 0.0  # words join overlapping chunks
                given = (self.detector, self.window, overlap, self.rate, self.config.vad_options)
                yield from split_audio(chain(begun, blocks), *given)
                return
        if begun:
            audio = begun[0] if len(begun) == 1 else np.concatenate(begun)
            yield from trim_silence(audio, self.detector, self.window, self.rate, self.config.vad_options)

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
                new = segments_of(part, self.tokenizer, end - begins, self.timestamps, self.config.logprobs)
                found += [segment.shifted(begins) for segment in new]
            begins = end
        found = found if voiced is None else in_speech(found, voiced)
        threshold = self.config.hallucination_silence_threshold
        return found if threshold is None else without_hallucinations(found, seconds, threshold)

    def languages(self, hypothesis: Hypothesis, seconds: float) -> list[Probabilities]:
        """Return the seconds and the language probabilities of each part of a chunk in which they were detected."""
        found: list[Probabilities] = []
        for part in hypothesis.parts:
            here = part.continues_at if part.continuation else seconds
            seconds -= here
            if part.languages and not self._silent(part):
                found.append((here, part.languages))
        return found

    def alternatives(self, hypothesis: Hypothesis, start: float, seconds: float) -> Iterator[Alternatives]:
        """Yield the N best texts of each part of a chunk that begins at ``start`` and lasts ``seconds``."""
        end = start + seconds
        for part in hypothesis.parts:
            until = start + part.continues_at if part.continuation else end
            best = part.alternatives[: self.config.nbest]
            texts = tuple((self.tokenizer.decode(one.tokens).strip(), one.logprob) for one in best)
            if texts and not self._silent(part):
                yield Alternatives(start, until, texts)
            start = until

    def all_languages(self, parts: Iterable[Probabilities]) -> tuple[tuple[str, float], ...]:
        """Return the languages with their probabilities, where only the language is detected."""
        return language_probabilities(self.among, parts) if self.config.detect_only else ()

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
    part: int = 0
    """Number of the channel among those that are transcribed by themselves."""
    parts: int = 1
    """Number of these channels."""


class Recording:
    """One recording, or one channel of it, in decoding: the requests of its chunks, and the transcript of those whose
    hypotheses are back."""

    def __init__(
        self,
        transcriber: Transcriber,
        request: Request,
        number: int = 0,
        channel: int | None = None,
        part: int = 0,
        parts: int = 1,
    ):
        """Begin a recording: all chunks have ``request`` in common; ``number`` identifies the recording in keys.

        ``channel`` labels the segments; the channel is ``part`` of the ``parts`` of the recording.
        """
        self.transcriber, self.request, self.number = transcriber, request, number
        self.channel, self.part, self.parts = channel, part, parts
        self._assembly = Assembly()
        self._chunks: list[tuple[ChunkKey, float, np.ndarray]] = []  # with overlap and ``voiced``, without samples
        self._hypotheses: dict[int, Hypothesis] = {}
        self._languages: list[Probabilities] = []
        self._forgotten = 0.0  # seconds up to which the text is not given to later chunks

    def requests(self, chunks: Iterable[Chunk]) -> Iterator[Request]:
        """Yield the request of each chunk in order, with a `ChunkKey`. `complete` needs all of them to be taken."""
        for chunk, request in self.transcriber.requests(self.request, chunks):
            key = ChunkKey(self.number, len(self._chunks), chunk.start, chunk.seconds, self.part, self.parts)
            self._chunks.append((key, chunk.overlap, chunk.voiced))
            yield replace(request, key=key)
        self._assembly.total = len(self._chunks)

    def add(self, number: int, hypothesis: Hypothesis) -> list[Segment]:
        """Add the hypothesis of chunk ``number``, and return the segments that have become final, in order."""
        key, overlap, voiced = self._chunks[number]
        self._hypotheses[number] = hypothesis
        self._languages += self.transcriber.languages(hypothesis, key.seconds)
        if any(part.temperature > RESET_TEMPERATURE for part in hypothesis.parts):
            self._forgotten = key.start + key.seconds
        segments = self.transcriber.segments(hypothesis, key.seconds, voiced)
        if self.channel is not None:
            segments = [replace(one, channel=self.channel) for one in segments]
        return self._assembly.add(number, segments, key.start, overlap)

    def conditioned(self, number: int, request: Request, slots: Mapping[str, str]) -> Request:
        """Return the request of chunk ``number`` with the text before it in the prompt, after that of the user.

        ``slots`` are those of the recording's prompt. Text up to a chunk that was decoded at a temperature above 0.5 is
        left out, as in Whisper's command.
        """
        key, overlap, _ = self._chunks[number]
        texts = [self.transcriber.config.prompt]
        for segment in self._assembly.segments:
            if segment.start < self._forgotten:
                continue
            if overlap and segment.end > key.start:
                texts.append("".join(word.text for word in segment.words if word.end <= key.start))
            else:
                texts.append(segment.text)
        new = self.transcriber.request(slots, " ".join(text.strip() for text in texts if text.strip()))
        unstamped, prompt = self.transcriber.engine.rules.no_timestamps, [*new.prompt]
        if unstamped not in request.prompt:
            prompt = [token for token in prompt if token != unstamped]
        return replace(request, prompt=prompt, language_at=new.language_at)

    @property
    def complete(self) -> bool:
        """True once the hypotheses of all chunks are there."""
        return self._assembly.complete

    @property
    def final_until(self) -> float:
        """Seconds up to which the segments are final; infinite once they are complete."""
        return self._assembly.final_until

    @property
    def languages(self) -> list[Probabilities]:
        """Seconds and language probabilities of the chunks so far."""
        return self._languages

    @property
    def detected(self) -> tuple[str, float] | None:
        """Language detected in the chunks so far, and its probability."""
        return detected_language(self.transcriber.among, self._languages)

    def transcription(self, stated: str | None = None) -> Transcription:
        """Return the transcript of all chunks; ``stated`` is the utterance's language."""
        tokenizer = self.transcriber.tokenizer
        text, segments = self._assembly.finished()
        found = [part for number in range(len(self._chunks)) for part in self._hypotheses[number].parts]
        if len(found) == 1 and segments and self.transcriber.config.hallucination_silence_threshold is None:
            text = tokenizer.decode(found[0].tokens).strip()
        spoken, probability = self.detected or (None, None)
        if spoken is None:
            named = language_in_prompt(tokenizer, found[0].prompt) if found and not found[0].languages else None
            spoken = named or (None if self.transcriber.config.detect_only else stated)
        nbest: list[Alternatives] = []
        if self.transcriber.config.nbest > 1:
            for number, (key, _, _) in enumerate(self._chunks):
                best = self.transcriber.alternatives(self._hypotheses[number], key.start, key.seconds)
                nbest += [replace(one, channel=self.channel) for one in best]
        with_ctc = any(one.ctc is not None for one in found)
        return Transcription(
            text,
            tuple(token for one in found for token in one.tokens),
            all(one.finished for one in found),
            tuple(output for one in found for output in one.ctc or ()) if with_ctc else None,
            segments=segments,
            language=spoken,
            language_probability=probability,
            nbest=tuple(nbest),
            language_probabilities=self.transcriber.all_languages(self._languages),
        )


def merged_channels(recordings: Sequence[Recording], stated: str | None = None) -> Transcription:
    """Return the transcript of all channels of a recording, with the segments in order of time; ``stated`` is the
    utterance's language. A detected language is that of most speech in all channels."""
    found = [one.transcription(stated) for one in recordings]
    if len(found) == 1:
        return found[0]
    segments = in_order_of_time(segment for one in found for segment in one.segments)
    parts = [part for one in recordings for part in one.languages]
    transcriber = recordings[0].transcriber
    spoken, probability = detected_language(transcriber.among, parts) or (None, None)
    spoken = spoken or next((one.language for one in found if one.language is not None), None)
    ctc = [one.ctc for one in found if one.ctc is not None]
    return Transcription(
        joined(segments),
        tuple(token for one in found for token in one.tokens),
        all(one.finished for one in found),
        tuple(output for one in ctc for output in one) if ctc else None,
        segments=tuple(segments),
        language=spoken,
        language_probability=probability,
        nbest=tuple(sorted((one for each in found for one in each.nbest), key=lambda one: one.start)),
        language_probabilities=transcriber.all_languages(parts),
    )
