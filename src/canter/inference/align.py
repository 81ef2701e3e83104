"""Alignment of given texts with their audio: times and probabilities of their words, and scores of the texts.

Audio that fits the model's window is aligned with its text at once. Longer audio is transcribed first, and divided into
pieces where its transcript agrees with the text (`canter.inference.transcript.matching`).
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice, pairwise
from typing import Literal, get_args

import numpy as np

from canter.corpus.audio import DecodedAudio, decode_utterance, load_utterance
from canter.corpus.manifest import Utterance
from canter.errors import CanterError, ConfigError
from canter.inference.engine.alignment import Alignment
from canter.inference.engine.ctc import Spelling, spelling_of
from canter.inference.engine.engine import Engine
from canter.inference.engine.forced import ForcedText
from canter.inference.engine.requests import Request, encoder_batches
from canter.inference.languages import language_in_prompt
from canter.inference.recording import TranscribeConfig, Transcriber, Transcription
from canter.inference.transcribe import Job, transcribe_jobs
from canter.inference.transcript.matching import GivenWord, Piece, levels, pieces_of
from canter.inference.transcript.reading import bounded, is_special, plain_word, words_of
from canter.inference.transcript.segments import UNSPACED, Segment, Word
from canter.inference.transcript.subtitles import ends_sentence
from canter.inference.transcript.vad import FRAME
from canter.models.protocol import check_support
from canter.redaction import redacted
from canter.text.tokenizer import Tokenizer

Method = Literal["auto", "ctc", "attention"]
GROUP = 4  # maximum rows read together, as a multiple of the decoder's rows
GROUP_SECONDS = 1800.0  # maximum seconds of audio read together, padded to the longest
READERS = 2  # threads that read audio
PAUSE = 0.2  # minimum seconds of silence within the times of a word that are no part of it
AROUND = 0.05  # seconds of silence that stay


@dataclass(frozen=True)
class TextScore:
    """Probability of a text given its audio."""

    logprob: float
    """Mean natural-log probability of a token, end token included."""
    end_logprob: float
    """Natural-log probability that the text ends after its last token."""
    tokens: int
    """Number of tokens, end token included."""
    characters: int
    seconds: float
    """Length of the audio that was read."""


@dataclass(frozen=True)
class ForcedRecording:
    """A recording in pieces, with the probabilities of the words of its text."""

    words: Sequence[GivenWord]
    audio: DecodedAudio = field(repr=False)
    rate: int
    request: Request
    """Request that all pieces have in common."""
    pieces: Sequence[Piece]
    language: str | None = None
    language_probability: float | None = None
    forced: Sequence[ForcedText] = ()
    """Probabilities, and times if asked for, of the tokens of each piece."""

    @property
    def seconds(self) -> float:
        """Length of the audio that was read."""
        return len(self.audio.samples) / self.rate

    @property
    def score(self) -> TextScore:
        """Score of the complete text."""
        logprobs = [value for one in self.forced for value in one.logprobs]
        characters = sum(len(word.text) for word in self.words) - 1  # without the first space
        end = self.forced[-1].logprobs[-1]
        return TextScore(sum(logprobs) / len(logprobs), end, len(logprobs), characters, self.seconds)

    def samples(self, piece: Piece) -> np.ndarray:
        """Return the audio (S,) of a piece."""
        return self.audio.samples[round(piece.start * self.rate) : round(piece.end * self.rate)]

    def tokens(self, piece: Piece) -> list[int]:
        """Return the tokens of the words of a piece."""
        return [token for word in self.words[piece.first : piece.last] for token in word.tokens]


def check_text(text: str) -> None:
    """Raise ConfigError for a text without letters and digits, which nothing can be aligned with."""
    if not plain_word(text):
        raise ConfigError("the text is empty" if not text.strip() else f"the text {text.strip()[:40]!r} has no letters")


def given_words(text: str, tokenizer: Tokenizer, lang: str | None = None) -> list[GivenWord]:
    """Return the words of a text with their tokens; in scripts without spaces, each character is a word.

    ``lang`` is the language of the text. Raises ConfigError for a text without letters and digits, and for a language
    that the tokenizer does not have.
    """
    check_text(text)
    found: list[GivenWord] = []
    for number, line in enumerate(text.splitlines()):
        for unit in line.split():
            tokens = [token for token in tokenizer.encode(f" {unit}", lang) if not is_special(tokenizer, token)]
            found += [GivenWord(part, one, number) for part, one in _divided(unit, tokens, tokenizer)]
    if not any(word.tokens for word in found):
        raise ConfigError(f"the model has no tokens for the text {text.strip()[:40]!r}")
    return found


def _divided(unit: str, tokens: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, tuple[int, ...]]]:
    """Return the words in a text without white space, with their tokens; the first one begins with a space."""
    if UNSPACED.search(unit):
        places = tuple(map(float, range(len(tokens) + 1)))
        parts = words_of(Alignment(tuple(tokens), places, (1.0,) * len(tokens)), tokenizer)
        parts = [part for part in parts if part.text.strip()]
        if "".join(part.text.strip() for part in parts) == unit:
            ends = [int(part.start) for part in parts[1:]] + [len(tokens)]
            return [
                (("" if number else " ") + part.text.strip(), tuple(tokens[begin:end]))
                for number, (part, begin, end) in enumerate(zip(parts, [0, *ends], ends))
            ]
    return [(f" {unit}", tuple(tokens))]


class Aligner:
    """One engine with a tokenizer and a method, which aligns and scores texts."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        method: Method = "auto",
        *,
        audio_track: int | None = None,
        name: str = "the model",
    ):
        """Make an aligner. ``method`` "auto" is the CTC head where the model has one, else cross-attention.

        Raises ConfigError for an unknown method, for "ctc" with a model without a CTC head, and for a model of another
        library, whose decoder cannot be given a text.
        """
        if method not in get_args(Method):
            raise ConfigError(f"method is {method!r}; it must be one of {', '.join(get_args(Method))}")
        check_support(engine.model, {"alignment of a given text": "cached_decoding"}, name)
        self.engine, self.tokenizer, self.audio_track = engine, tokenizer, audio_track
        self.spelling = _spelling(engine, method)
        self.plain = Transcriber(engine, tokenizer, TranscribeConfig(audio_track=audio_track))
        self.by_word = Transcriber(engine, tokenizer, TranscribeConfig("word", audio_track=audio_track))

    def align(
        self, utterances: Sequence[Utterance], audio: np.ndarray | None = None
    ) -> Iterator[tuple[int, Transcription]]:
        """Yield the aligned text of each utterance with its index, in the order in which they are finished.

        ``audio`` (S,), at the model's sample rate, is that of a single utterance, in place of its file. A line of the
        text is a segment; a text of one line has a segment for each sentence. An utterance that cannot be aligned has
        an ``error``.
        """

        def read(utterance: Utterance) -> DecodedAudio:
            if audio is not None:
                return _undamaged(audio)
            return decode_utterance(utterance, self.plain.rate, track=self.audio_track)

        for index, found in self._forced(utterances, read, timed=True):
            yield index, Transcription("", error=found) if isinstance(found, str) else self._transcription(found)

    def scores(self, utterances: Sequence[Utterance]) -> Iterator[tuple[int, TextScore | str]]:
        """Yield the score of each utterance's text with the utterance's index, or the reason why there is none.

        Damaged audio is refused, as training does.
        """

        def read(utterance: Utterance) -> DecodedAudio:
            return _undamaged(load_utterance(utterance, self.plain.rate))

        for index, found in self._forced(utterances, read, timed=False):
            yield index, found if isinstance(found, str) else found.score

    def _forced(
        self, utterances: Sequence[Utterance], read: Callable[[Utterance], DecodedAudio], timed: bool
    ) -> Iterator[tuple[int, ForcedRecording | str]]:
        """Yield recordings with the probabilities of their texts, the longest first, or the reason why there is none.

        A few batches of audio of similar length are in memory, which threads read ahead.
        """
        groups = encoder_batches([one.duration for one in utterances], GROUP_SECONDS, GROUP * self.engine.rows)
        with ThreadPoolExecutor(READERS) as pool:

            def opened(group: Sequence[int]) -> "list[Future[ForcedRecording | str]]":
                return [pool.submit(self._open, utterances[index], read) for index in group]

            ahead = deque(map(opened, groups[:1]))
            for group, following in zip(groups, [*groups[1:], []]):
                ahead.append(opened(following))
                read_rows = [future.result() for future in ahead.popleft()]
                divided = [
                    one if isinstance(one, str) else self._divided(utterances[index], one)
                    for index, one in zip(group, read_rows)
                ]
                yield from zip(group, self._with_forced(divided, timed))

    def _open(self, utterance: Utterance, read: Callable[[Utterance], DecodedAudio]) -> "ForcedRecording | str":
        """Return an utterance with its audio as one piece, or the reason why it cannot be aligned."""
        try:
            words = given_words(utterance.text, self.tokenizer, utterance.text_lang)
            request = self.plain.request(self.plain.slots(utterance))
            audio, rate = read(utterance), self.plain.rate
        except (CanterError, ValueError) as error:
            return _named(utterance, str(error))
        piece = Piece(0.0, len(audio.samples) / rate, 0, len(words))
        return ForcedRecording(words, audio, rate, request, [piece], utterance.text_lang)

    def _divided(self, utterance: Utterance, recording: ForcedRecording) -> "ForcedRecording | str":
        """Return the recording in pieces that fit the model, or the reason why it cannot be transcribed for that."""
        most = self.engine.model.config.decoder.positions - len(recording.request.prompt) - 1
        counts = [len(word.tokens) for word in recording.words]
        if max(counts) > most:
            word = recording.words[counts.index(max(counts))].text.strip()
            return _named(utterance, f"the word {word[:40]!r} has {max(counts)} tokens; the model takes at most {most}")
        if recording.seconds <= self.plain.window and sum(counts) <= most:
            return recording
        job = Job(utterance, recording.seconds, recording.audio.samples)
        ((_, found),) = transcribe_jobs(self.by_word, [[(0, job)]])
        if found.error is not None:
            return _named(utterance, found.error)
        request = recording.request
        if request.languages and found.language is not None:
            request = self.plain.request(self.plain.slots(replace(utterance, lang=found.language)))
        spoken = [word for segment in found.segments for word in segment.words]
        level = levels(recording.audio.samples, recording.rate)
        return replace(
            recording,
            request=request,
            pieces=pieces_of(recording.words, spoken, level, self.plain.window, most),
            language=found.language or recording.language,
            language_probability=found.language_probability,
        )

    def _with_forced(self, found: "Sequence[ForcedRecording | str]", timed: bool) -> "list[ForcedRecording | str]":
        """Return the recordings with the probabilities, and if ``timed`` the times, of their texts."""
        recordings = [one for one in found if not isinstance(one, str)]
        pairs = [(one, piece) for one in recordings for piece in one.pieces]
        requests = [
            replace(one.request, audio=one.samples(piece), aligned=timed, scored=False, policy=None)
            for one, piece in pairs
        ]
        texts = [one.tokens(piece) for one, piece in pairs]
        forced = iter(self.engine.force(requests, texts, self.spelling if timed else None))
        return [
            one if isinstance(one, str) else replace(one, forced=tuple(islice(forced, len(one.pieces))))
            for one in found
        ]

    def _transcription(self, found: ForcedRecording) -> Transcription:
        """Return the words of the text with their times, in segments."""
        pairs = zip(found.pieces, found.forced)
        words = _in_order([word for pair in pairs for word in self._timed(found, *pair)], found.seconds)
        language = found.language or language_in_prompt(self.tokenizer, found.forced[0].prompt)
        segments = [
            Segment(words[begin].start, words[end - 1].end, text.strip(), tokens, tuple(words[begin:end]), score)
            for begin, end, text, tokens, score in _lines(found)
        ]
        return Transcription(
            "".join(word.text for word in found.words).strip(),
            tuple(token for word in found.words for token in word.tokens),
            segments=tuple(segments),
            language=language,
            language_probability=found.language_probability,
            seconds=found.seconds,
            lost_seconds=round(found.audio.lost_seconds, 3),
            warnings=found.audio.warnings,
            score=found.score.logprob,
        )

    def _timed(self, recording: ForcedRecording, piece: Piece, forced: ForcedText) -> list[Word]:
        """Return the words of a piece with times from the start of the recording."""
        words = recording.words[piece.first : piece.last]
        places = [*accumulate((len(word.tokens) for word in words), initial=0)]
        found: list[Word] = []
        for word, (begin, end) in zip(words, pairwise(places)):
            known = [span for span in forced.spans[begin:end] if span is not None]
            start = found[-1].end if found else 0.0
            first, last = (known[0][0], known[-1][1]) if known else (start, start)
            probabilities = [math.exp(value) for value in forced.logprobs[begin:end]]
            found.append(Word(first, last, word.text.strip(), sum(probabilities) / max(1, len(probabilities))))
        if forced.ctc_logprob is None:  # a path of cross-attention covers the pauses too
            found = self._without_pauses(found, recording.samples(piece))
        return [replace(word, start=word.start + piece.start, end=word.end + piece.start) for word in found]

    def _without_pauses(self, words: list[Word], audio: np.ndarray) -> list[Word]:
        detector = self.plain.detector
        (segment,) = bounded([Segment(words[0].start, words[-1].end, "", (), tuple(words))])
        if detector is None:
            return list(segment.words)
        voiced = detector(audio) > 0.5
        return [_spoken_part(word, voiced) for word in segment.words]


def _spoken_part(word: Word, voiced: np.ndarray) -> Word:
    """Return a word without the pauses at its ends, and without the end of the word before a pause in it.

    voiced (F,): True for speech, in frames of FRAME seconds.
    """
    first = round(word.start / FRAME)
    places = first + np.flatnonzero(voiced[first : round(word.end / FRAME)])
    if not len(places):
        return word
    runs = np.split(places, np.flatnonzero(np.diff(places) * FRAME > PAUSE) + 1)
    run = max(runs, key=len)
    start, end = float(run[0]) * FRAME, float(run[-1] + 1) * FRAME
    start = start - AROUND if start - word.start > PAUSE else word.start
    return replace(word, start=start, end=end + AROUND if word.end - end > PAUSE else word.end)


def _undamaged(samples: np.ndarray) -> DecodedAudio:
    found = DecodedAudio()
    found.samples = samples
    return found


def _spelling(engine: Engine, method: Method) -> Spelling | None:
    """Return the spelling of the CTC head that gives the times; None for those of cross-attention."""
    if method == "attention":
        return None
    if method == "ctc":
        return spelling_of(engine.model, "method ctc")
    try:
        return spelling_of(engine.model)
    except ConfigError:
        return None


def _named(utterance: Utterance, error: str) -> str:
    """Return an error that names the utterance's audio."""
    path = redacted(utterance.audio_filepath)
    return error if path in error else f"{path}: {error}"


def _in_order(words: Sequence[Word], seconds: float) -> list[Word]:
    """Return the words with times that lie within the audio and do not decrease."""
    found: list[Word] = []
    latest = 0.0
    for word in words:
        start = min(max(word.start, latest), seconds)
        found.append(replace(word, start=start, end=min(max(word.end, start), seconds)))
        latest = start
    return found


def _lines(found: ForcedRecording) -> Iterator[tuple[int, int, str, tuple[int, ...], float]]:
    """Yield first word, word after the last, text, tokens and mean log probability of each segment: of each line, or of
    each sentence in a text of one line."""
    words, several = found.words, found.words[-1].line > found.words[0].line
    logprobs = [value for one in found.forced for value in one.logprobs[:-1]]
    places = [*accumulate((len(word.tokens) for word in words), initial=0)]
    begin = 0
    for end in range(1, len(words) + 1):
        last = end == len(words)
        ends = last
        if not last and several:
            ends = words[end - 1].line < words[end].line
        elif not last:
            ends = ends_sentence(words[end - 1].text.strip(), words[end].text.strip())
        if ends:
            some = words[begin:end]
            values = logprobs[places[begin] : places[end]]
            tokens = tuple(token for word in some for token in word.tokens)
            score = sum(values) / len(values) if values else 0.0
            yield begin, end, "".join(word.text for word in some), tokens, score
            begin = end
