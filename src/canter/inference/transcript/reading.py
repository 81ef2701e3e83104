"""Segments and words from hypotheses: timestamps that the model wrote, times of words, and joining of chunks."""

import itertools
import math
import re
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from canter.inference.engine.alignment import Alignment
from canter.inference.engine.requests import Hypothesis
from canter.inference.engine.timestamps import TimestampTokens
from canter.inference.transcript.segments import UNSPACED, Segment, TokenScore, Word
from canter.inference.transcript.vad import FRAME
from canter.text.owsm import OwsmTokenizer
from canter.text.sentencepiece import SentencePieceTokenizer
from canter.text.tokenizer import Tokenizer

OPENING = "\"'“¿([{-"  # punctuation that belongs to the word after it (openai-whisper's lists)
CLOSING = "\"'.。,，!！?？:：”)]}、"
_CANARY_STAMP = re.compile(r"<\|(\d+)\|>")
CANARY_FRAME = 0.08  # seconds per unit of Canary's timestamps
LONG_WORD = 0.7  # upper bound in seconds of the median word of an alignment
TAIL = 0.3  # seconds after the last timestamp of a transcript that still belong to it
MIN_SPEECH_AFTER = 1.0  # minimum seconds of speech after the last timestamp to decode from there
USUAL_RATE = 15.0  # bytes of text per second of speech
SPARSE_RATE = 3.0  # a quarter of the rate of slow speakers in any script
MUCH_SPEECH = 5.0  # minimum seconds of speech in a segment to call its text sparse
LONG_SILENCE = 0.5  # minimum seconds of silence to trim from the times of a segment
AROUND = 0.1  # seconds of silence that stay
MIN_WINDOW = 0.5  # minimum seconds before and after the last timestamp to decode from there
EDGE = 2.0  # seconds at the start and the end of a chunk that count as silence around an anomalous segment
SAME_TIME = 1.0  # maximum difference in seconds between the times of a word in two overlapping chunks


def compression_ratio(text: str) -> float:
    """Return the bytes of the text per byte of its zlib compression, Whisper's measure of repetition."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


@dataclass(frozen=True)
class Fallback:
    """Thresholds above which Whisper decodes a window again at a higher temperature (Radford et al., 2022, section
    4.5)."""

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Temperatures of the attempts; the last attempt is always kept."""
    compression_ratio: float | None = 2.4
    """Maximum compression ratio of the text."""
    logprob: float | None = -1.0
    """Minimum mean log probability of a token."""
    no_speech: float | None = 0.6
    """Probability of no speech above which an improbable text counts as silence, and is not decoded again."""

    def silent(self, hypothesis: Hypothesis) -> bool:
        """Return True for a hypothesis of silence."""
        unlikely = self.logprob is None or hypothesis.avg_logprob < self.logprob
        return self.no_speech is not None and hypothesis.no_speech > self.no_speech and unlikely


NO_FALLBACK = Fallback((), None, None, None)
"""Thresholds of a model that is decoded once, and never found silent."""


@dataclass(frozen=True)
class WindowPolicy:
    """Whisper's rules for decoding a window again, at a higher temperature or from where its text ended early; a
    `DecodingPolicy` of the engine. OWSM is only decoded on from there."""

    tokenizer: Tokenizer
    fallback: Fallback
    timestamps: TimestampTokens | None = None
    voiced: np.ndarray | None = field(default=None, compare=False)
    """(F,) True for speech, in frames of FRAME seconds that end with the audio; None if unknown."""

    def retry(self, hypothesis: Hypothesis) -> float | None:
        """Return the temperature of the next attempt; None keeps the hypothesis."""
        rules = self.fallback
        doubtful = (
            rules.compression_ratio is not None
            and compression_ratio(self.tokenizer.decode(hypothesis.tokens)) > rules.compression_ratio
        ) or (rules.logprob is not None and hypothesis.avg_logprob < rules.logprob)
        if not doubtful or rules.silent(hypothesis):
            return None
        return next((one for one in rules.temperatures if one > hypothesis.temperature), None)

    def continue_at(self, hypothesis: Hypothesis, seconds: float) -> float | None:
        """Return the time from which to decode on, before the end at ``seconds``; None where nothing is missing."""
        if self.timestamps is None or self.fallback.silent(hypothesis):
            return None
        place = ended_early(hypothesis, seconds, self.timestamps, self.voiced)
        if place is None:
            place = skipped(hypothesis, self.tokenizer, seconds, self.timestamps, self.voiced)
        return place


def words_of(alignment: Alignment, tokenizer: Tokenizer) -> list[Word]:
    """Return the words of an alignment, in scripts without spaces one per character. Their texts keep the space before
    them, so that they join to the text."""
    found: list[Word] = []
    kept = [place for place, token in enumerate(alignment.tokens) if not is_special(tokenizer, token)]
    tokens, probabilities = [alignment.tokens[i] for i in kept], [alignment.probabilities[i] for i in kept]
    starts = [alignment.starts[i] for i in [*kept, len(alignment.tokens)]]
    begin = 0
    for end in range(1, len(tokens) + 1):
        text = raw_text(tokenizer, tokens[begin:end])
        if "\ufffd" in text:  # an incomplete character
            continue
        probability = sum(probabilities[begin:end]) / (end - begin)
        word = Word(starts[begin], starts[end], text, probability, tuple(probabilities[begin:end]))
        begin = end
        last = found[-1] if found else None
        if last is None or _begins_word(last.text, text):
            found.append(word)
        else:
            found[-1] = _merged(last, word)
    return found


def is_special(tokenizer: Tokenizer, token: int) -> bool:
    """Return whether a token is written out with special tokens only, such as one of a prompt."""
    return bool(tokenizer.decode([token], special=True).strip()) and not tokenizer.decode([token])


def raw_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Return the text with leading space, which ``decode`` strips."""
    if isinstance(tokenizer, SentencePieceTokenizer | OwsmTokenizer):
        return "".join(map(tokenizer.piece, tokens)).replace("▁", " ")
    return tokenizer.decode(tokens, special=True)


def _begins_word(before: str, text: str) -> bool:
    if before.strip() and all(mark in OPENING for mark in before.strip()) and before.startswith(" "):
        return False
    if text.strip() and all(mark in CLOSING for mark in text.strip()):
        return False
    return text.startswith(" ") or bool(UNSPACED.match(text)) or bool(UNSPACED.search(before[-1:]))


def _merged(one: Word, other: Word) -> Word:
    length = max(len(one.text) + len(other.text), 1)
    probability = (one.probability * len(one.text) + other.probability * len(other.text)) / length
    return Word(one.start, other.end, one.text + other.text, probability, one.probabilities + other.probabilities)


def token_scores_of(tokens: Sequence[int], logprobs: Sequence[float], tokenizer: Tokenizer) -> tuple[TokenScore, ...]:
    """Return the tokens of a text with their log probabilities, without special tokens and timestamps."""
    kept = [place for place, token in enumerate(tokens) if not is_special(tokenizer, token)]
    found: list[TokenScore] = []
    begin = 0
    for end in range(1, len(kept) + 1):
        text = raw_text(tokenizer, [tokens[place] for place in kept[begin:end]])
        if "\ufffd" in text and end < len(kept):  # an incomplete character
            continue
        found.append(TokenScore(text, sum(logprobs[place] for place in kept[begin:end])))
        begin = end
    return tuple(found)


def segments_of(
    hypothesis: Hypothesis,
    tokenizer: Tokenizer,
    seconds: float,
    timestamps: TimestampTokens | None = None,
    scored: bool = False,
) -> list[Segment]:
    """Return the segments of a chunk of ``seconds`` seconds, with times from its start.

    Timestamps that the model wrote are the bounds: ``timestamps`` of Whisper and OWSM (an unfinished last segment ends
    with the audio), or those of Canary, which surround every word. Without timestamps the chunk is one segment. An
    alignment gives the times of words. scored: add the log probabilities of tokens.
    """
    tokens, logprobs = hypothesis.tokens, hypothesis.logprobs
    spans: list[tuple[float, float, list[int]]] = []
    words: list[Word] = []
    if timestamps is not None and any(token in timestamps for token in tokens):
        spans = _stamped_spans(tokens, timestamps, seconds)
    else:
        words = _canary_words(tokenizer.decode(tokens, special=True))
        begin, end = (words[0].start, words[-1].end) if words else (0.0, seconds)
        spans = [(begin, min(end, seconds), [*range(len(tokens))])]
    aligned = hypothesis.alignment is not None and not words
    if hypothesis.alignment and aligned:
        words = words_of(hypothesis.alignment, tokenizer)
    scores = (hypothesis.avg_logprob, hypothesis.temperature, hypothesis.no_speech)
    found: list[Segment] = []
    for begin, end, places in spans:
        part = tuple(tokens[place] for place in places)
        if text := tokenizer.decode(part).strip():
            more = token_scores_of(part, [logprobs[place] for place in places], tokenizer) if scored else ()
            found.append(Segment(begin, end, text, part, (), *scores, more))
    if not words:
        return found
    found = _with_words(found, words)
    return bounded(found) if aligned else found


def ended_early(
    hypothesis: Hypothesis, seconds: float, timestamps: TimestampTokens, voiced: np.ndarray | None = None
) -> float | None:
    """Return the time at which a hypothesis ended before its audio of ``seconds`` did, else None.

    Of a sentence that the end of the window divides, Whisper often writes only the first timestamp, and its command
    line begins the next window there (Radford et al., 2022, section 4.5). A single timestamp at the end, as OWSM always
    writes it, means that no speech follows; that is accepted unless ``voiced`` (F,) has speech there (see
    `WindowPolicy`).
    """
    tokens = hypothesis.tokens
    if not tokens or tokens[-1] not in timestamps:
        return None
    begins = timestamps.seconds(tokens[-1])
    if begins < MIN_WINDOW or seconds - begins <= MIN_WINDOW:
        return None
    if len(tokens) == 1 or tokens[-2] in timestamps:
        return begins
    left = round((seconds - begins) / FRAME)
    if voiced is None or not 0 < left <= len(voiced) or tokens[0] not in timestamps:
        return None
    after = np.flatnonzero(voiced[len(voiced) - left :])
    after = after[after * FRAME >= TAIL]  # the last word may end after its timestamp
    if len(after) * FRAME < MIN_SPEECH_AFTER:
        return None
    return max(begins, begins + after[0] * FRAME - TAIL)


def skipped(
    hypothesis: Hypothesis, tokenizer: Tokenizer, seconds: float, timestamps: TimestampTokens, voiced: np.ndarray | None
) -> float | None:
    """Return the time from which to decode on where the last segment of a hypothesis has next to no text for the speech
    in it, so that the model has skipped some: the first pause after the usual duration of the text. None where nothing
    was skipped."""
    tokens = hypothesis.tokens
    if voiced is None or not len(voiced) or not tokens or tokens[0] not in timestamps:
        return None
    spans = _stamped_spans(tokens, timestamps, seconds)
    if not spans:
        return None
    begin, end, part = spans[-1]
    here = voiced[max(0, len(voiced) - round(seconds / FRAME)) :]
    size = len(tokenizer.decode(part).encode())
    if here[round(begin / FRAME) : round(end / FRAME)].sum() * FRAME < max(MUCH_SPEECH, size / SPARSE_RATE):
        return None
    first = round((begin + max(MIN_SPEECH_AFTER, size / USUAL_RATE)) / FRAME)
    pauses = np.flatnonzero(~here[first:])
    place = (first + int(pauses[0])) * FRAME if len(pauses) else seconds
    return place if seconds - place > MUCH_SPEECH / 2 else None


def in_speech(segments: Sequence[Segment], voiced: np.ndarray) -> list[Segment]:
    """Return the segments without silence at their starts and ends; the first and the last word are adapted.

    voiced (F,): True for speech, in frames of FRAME seconds; empty if unknown.
    """
    places = np.flatnonzero(voiced) * FRAME
    if not len(places):
        return list(segments)
    return [_in_speech(segment, places) for segment in segments]


def _in_speech(segment: Segment, places: np.ndarray) -> Segment:
    inside = places[(places >= segment.start - FRAME) & (places < segment.end)]
    if not len(inside):
        return segment
    start, end, words = segment.start, segment.end, [*segment.words]
    if inside[0] - start > LONG_SILENCE:
        start = float(inside[0]) - AROUND
        if words and words[0].start < start < words[0].end:
            words[0] = replace(words[0], start=start)
        elif words:
            start = min(start, words[0].start)
    if end - inside[-1] > LONG_SILENCE:
        end = min(end, float(inside[-1]) + FRAME + AROUND)
        if words and words[-1].start < end < words[-1].end:
            words[-1] = replace(words[-1], end=end)
        elif words:
            end = max(end, words[-1].end)
    return replace(segment, start=start, end=end, words=tuple(words))


def is_anomalous(segment: Segment) -> bool:
    """Return True for a segment whose words look invented.

    The first eight words count, without punctuation: 1 for a probability below 0.15, 15 per second by which a word is
    shorter than 0.133 s, 1 per second by which it is longer than 2 s. A segment is anomalous at 3, or at 1 per word
    (openai-whisper 20250625, ``transcribe.py``).
    """
    words = [word for word in segment.words if plain_word(word.text)][:8]
    score = 0.0
    for word in words:
        seconds = word.end - word.start
        score += (word.probability < 0.15) + 15 * max(0.0, 0.133 - seconds) + max(0.0, seconds - 2.0)
    return bool(words) and (score >= 3 or score + 0.01 >= len(words))


def without_hallucinations(segments: Sequence[Segment], seconds: float, threshold: float) -> list[Segment]:
    """Return the segments of a chunk of ``seconds`` without anomalous ones between silence.

    Silence is a pause of more than ``threshold`` seconds, or less than 2 s between the segment and the start or the end
    of the chunk; another anomalous segment after it counts as silence (openai-whisper 20250625, ``transcribe.py``,
    which also decodes on from there).
    """
    kept: list[Segment] = []
    last = 0.0
    for place, segment in enumerate(segments):
        following = segments[place + 1] if place + 1 < len(segments) else None
        starts = following.start if following else seconds
        before = segment.start - last > threshold or segment.start < max(threshold, EDGE)
        after = (
            starts - segment.end > threshold
            or (following is not None and is_anomalous(following))
            or seconds - segment.end < EDGE
        )
        if before and after and is_anomalous(segment):
            continue
        kept.append(segment)
        last = segment.end
    return kept


def _stamped_spans(
    tokens: Sequence[int], timestamps: TimestampTokens, seconds: float
) -> list[tuple[float, float, list[int]]]:
    """Return start, end and places of the tokens of each segment."""
    spans: list[tuple[float, float, list[int]]] = []
    begin, part, is_text = 0.0, list[int](), False
    for place, token in enumerate(tokens):
        if token not in timestamps:
            part.append(place)
            is_text = True
            continue
        time = min(timestamps.seconds(token), seconds)
        if is_text:
            time = max(time, begin)  # a model without timestamps in its prompt may write any
            spans.append((begin, time, [*part, place]))
            begin, part, is_text = time, [], False
        else:
            begin, part = time, [place]
    if is_text:
        spans.append((begin, seconds, part))
    return spans


def _canary_words(text: str) -> list[Word]:
    """Return the words between pairs of Canary's timestamps, ``<|3|> word<|7|>``, in frames of 80 ms."""
    parts = _CANARY_STAMP.split(text)  # text, number, text, number, ...
    stamps = [int(number) * CANARY_FRAME for number in parts[1::2]]
    found = []
    for index, spoken in enumerate(parts[2::2]):
        if spoken.strip():
            end = stamps[index + 1] if index + 1 < len(stamps) else stamps[index]
            found.append(Word(stamps[index], max(end, stamps[index]), " " + spoken.strip(), 1.0))
    return found


def _with_words(segments: list[Segment], words: list[Word]) -> list[Segment]:
    """Return the segments with their words: each gets as many characters as its text has."""
    found, place = [], 0
    for number, segment in enumerate(segments):
        length, taken = _length(segment.text), 0
        begin = place
        while place < len(words) and (taken < length or number == len(segments) - 1):
            taken += _length(words[place].text)
            place += 1
        found.append(replace(segment, words=tuple(words[begin:place])))
    return found


def bounded(segments: list[Segment]) -> list[Segment]:
    """Return the segments with the times of their words.

    An alignment covers all audio, so that a segment's first word includes the pause before it, and its last word the
    one after it. A first word is limited to twice the median (at most LONG_WORD, as in openai-whisper), a last one to
    the end of its segment.
    """
    lengths = [word.end - word.start for word in _all_words(segments) if word.end > word.start]
    most = 2 * min(LONG_WORD, median(lengths)) if lengths else 0.0
    found = []
    for segment in segments:
        words = list(segment.words)
        if words and words[0].end - words[0].start > most:
            first = words[0]
            start = first.end - most
            words[0] = replace(first, start=max(start, segment.start) if segment.start < first.end else start)
        if words and words[-1].start < segment.end < words[-1].end:
            words[-1] = replace(words[-1], end=segment.end)
        start, end = (words[0].start, words[-1].end) if words else (segment.start, segment.end)
        found.append(replace(segment, start=start, end=max(start, end), words=tuple(words)))
    return found


def join_overlap(before: list[Word], after: list[Word], start: float, end: float) -> tuple[int, int]:
    """Return the number of words of ``before`` to keep, and the first of ``after`` to keep, where two chunks both have
    the audio from ``start`` to ``end``.

    They are joined in the middle of the longest run of words that both have at about the same time, because words at
    the edge of a chunk are the least reliable. Without such a run they are joined in the middle of the overlap, or
    where the text of one ends. All words are kept where one of them has none.
    """
    if not before or not after:
        return len(before), 0
    texts, other_texts = ([plain_word(word.text) for word in words] for words in (before, after))
    low = next((i for i, word in enumerate(before) if word.end > start - SAME_TIME), len(before))
    longest = (0, 0, 0)
    for one in range(low, len(before)):
        for other, word in enumerate(after):
            size = 0
            while (
                one + size < len(before)
                and other + size < len(after)
                and texts[one + size] == other_texts[other + size] != ""
                and abs(before[one + size].start - after[other + size].start) < SAME_TIME
            ):
                size += 1
            longest = max(longest, (size, one, other))
            if word.start > end + SAME_TIME:
                break
    size, one, other = longest
    if size:
        half = (size + 1) // 2
        return one + half, other + half
    middle = (start + end) / 2
    middle = max(min(middle, before[-1].end), after[0].start)
    kept = sum((word.start + word.end) / 2 < middle for word in before)
    return kept, sum((word.start + word.end) / 2 < middle for word in after)


class Assembly:
    """Segments of one recording, joined from those of its chunks, which may arrive in any order."""

    def __init__(self):
        self.total: int | None = None
        """Number of chunks, once it is known."""
        self.segments: list[Segment] = []
        """Segments in order; the texts of words have the space before them."""
        self._waiting: dict[int, tuple[list[Segment], float, float]] = {}
        self.final_until = 0.0
        """Seconds up to which the segments are final; infinite once they are complete."""
        self._next = 0
        self._last_begins = 0  # index of the latest chunk's segments, which the next chunk may still shorten

    @property
    def complete(self) -> bool:
        return self._next == self.total

    def add(self, number: int, segments: list[Segment], start: float, overlap: float) -> list[Segment]:
        """Add the segments of chunk ``number``, with times from its start at ``start`` seconds; the chunk before
        contains its first ``overlap`` seconds too. Return the segments that have become final."""
        self._waiting[number] = ([one.shifted(start) for one in segments], start, overlap)
        final = self._last_begins
        while self._next in self._waiting:
            new, start, overlap = self._waiting.pop(self._next)
            if overlap:
                last = self.segments[self._last_begins :]
                kept, first = join_overlap(_all_words(last), _all_words(new), start, start + overlap)
                self.segments[self._last_begins :] = _sliced(last, 0, kept)
                new = _sliced(new, first, None)
            self._last_begins = len(self.segments)
            self.segments += new
            self._next += 1
            self.final_until = start
        if self.complete:
            self._last_begins = len(self.segments)
            self.final_until = math.inf
        return [_stripped(one) for one in self.segments[final : self._last_begins]]

    def finished(self) -> tuple[str, tuple[Segment, ...]]:
        """Return the text and the segments."""
        return joined(self.segments), tuple(map(_stripped, self.segments))


def joined(segments: Sequence[Segment]) -> str:
    """Return the text of the segments."""
    text = ""
    for segment in segments:
        text += space_between(text, segment.text) + segment.text
    return text


def in_order_of_time(segments: Iterable[Segment]) -> list[Segment]:
    """Return segments of several channels by their starts, those with equal starts by their channels."""
    return sorted(segments, key=lambda one: (one.start, -1 if one.channel is None else one.channel))


class ChannelMerger:
    """Final segments of several channels, which leave in order of time."""

    def __init__(self, channels: int):
        self._waiting: list[Segment] = []
        self._until = [0.0] * channels

    def add(self, channel: int, segments: Sequence[Segment], until: float) -> list[Segment]:
        """Add final segments of a channel, whose further segments all begin at ``until`` seconds or later. Return the
        segments that come before all further ones of any channel."""
        self._waiting = in_order_of_time([*self._waiting, *segments])
        self._until[channel] = until
        ready = bisect_left(self._waiting, min(self._until), key=lambda one: one.start)
        found, self._waiting = self._waiting[:ready], self._waiting[ready:]
        return found


def space_between(text: str, more: str) -> str:
    """Return the space between two parts of a transcript; empty in scripts without spaces."""
    return " " if text and more and not (UNSPACED.match(more) and UNSPACED.search(text[-1:])) else ""


def _all_words(segments: list[Segment]) -> list[Word]:
    return [word for segment in segments for word in segment.words]


def _sliced(segments: list[Segment], first: int, end: int | None) -> list[Segment]:
    """Return the segments with the words from ``first`` to ``end``; a segment that loses words loses its tokens too."""
    found, place = [], 0
    for segment in segments:
        begin, stop = max(0, first - place), None if end is None else max(0, end - place)
        words = segment.words[begin:stop]
        place += len(segment.words)
        if words == segment.words:
            found.append(segment)
        elif words:
            text = "".join(word.text for word in words).strip()
            start = words[0].start if words[0] != segment.words[0] else segment.start
            till = words[-1].end if words[-1] != segment.words[-1] else segment.end
            before = sum(_length(word.text) for word in segment.words[:begin])
            scores = _scores_within(segment.token_scores, before, before + sum(_length(word.text) for word in words))
            found.append(
                replace(segment, start=start, end=till, text=text, tokens=(), words=words, token_scores=scores)
            )
    return found


def _scores_within(scores: Sequence[TokenScore], begin: int, end: int) -> tuple[TokenScore, ...]:
    """Return the tokens that begin between two numbers of characters, without counting spaces."""
    places = [0, *itertools.accumulate(_length(score.text) for score in scores)]
    return tuple(score for score, place in zip(scores, places) if begin <= place < end)


def _length(text: str) -> int:
    return sum(not character.isspace() for character in text)


def _stripped(segment: Segment) -> Segment:
    return replace(segment, words=tuple(replace(word, text=word.text.strip()) for word in segment.words))


def plain_word(text: str) -> str:
    """Return the letters and digits of a word, by which words are compared."""
    return "".join(one for one in text.casefold() if one.isalnum())
