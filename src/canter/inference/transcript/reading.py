"""From hypotheses to segments and words: timestamps that the model wrote, times of words, joints of pieces."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from canter.inference.engine.alignment import Alignment
from canter.inference.engine.requests import Hypothesis
from canter.inference.transcript.segments import UNSPACED, Segment, Word
from canter.inference.transcript.vad import FRAME
from canter.text.sentencepiece import SentencePieceTokenizer
from canter.text.tokenizer import Tokenizer
from canter.text.whisper import TIMESTAMP_SECONDS

OPENING = "\"'“¿([{-"  # punctuation that belongs to the word after it (openai-whisper's lists)
CLOSING = "\"'.。,，!！?？:：”)]}、"
_CANARY_STAMP = re.compile(r"<\|(\d+)\|>")
CANARY_FRAME = 0.08  # seconds that a timestamp of Canary counts in
LONG_WORD = 0.7  # seconds that the usual word of an alignment lasts at most
TAIL = 0.3  # seconds after the end of a transcript that still belong to it
LEAST_SPEECH = 1.0  # seconds of speech after the end of a transcript that are decoded on their own
USUAL, SPARSE = (
    15.0,
    3.0,
)  # bytes of text a second of speech; a quarter of what slow speakers say in any script
MUCH_SPEECH = 5.0  # seconds of speech in a segment, from which it can be sparse
SILENT = 0.5  # seconds of silence at the start or end of a segment that are left out of its times ...
AROUND = 0.1  # ... but for so many
LEAST_REST = 0.5  # seconds before and after a Whisper's last timestamp that make a window of their own
NEAR = 1.0  # seconds by which two pieces may differ about when a word was said


def compression_ratio(text: str) -> float:
    """Bytes of the text for each byte of its zlib compression, as Whisper tells repetition by."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


@dataclass(frozen=True)
class Fallback:
    """When a Whisper's hypothesis is not believed and the audio is decoded once more, hotter (Radford et al.,
    2022, section 4.5)."""

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Of the attempts; the last is kept whatever it gives."""
    compression_ratio: float | None = 2.4
    """More repetitive than this is not believed."""
    logprob: float | None = -1.0
    """Less likely a token than this, on average, is not believed ..."""
    no_speech: float | None = 0.6
    """... unless no speech is likelier than this: then the audio is taken for silence."""

    def silent(self, hypothesis: Hypothesis) -> bool:
        """Whether the hypothesis is of silence."""
        unlikely = self.logprob is None or hypothesis.avg_logprob < self.logprob
        return self.no_speech is not None and hypothesis.no_speech > self.no_speech and unlikely

    def retry(self, hypothesis: Hypothesis, text: str) -> float | None:
        """The temperature of the next attempt, None where the hypothesis is kept."""
        doubtful = (self.compression_ratio is not None and compression_ratio(text) > self.compression_ratio) or (
            self.logprob is not None and hypothesis.avg_logprob < self.logprob
        )
        if not doubtful or self.silent(hypothesis):
            return None
        return next((one for one in self.temperatures if one > hypothesis.temperature), None)


def words_of(alignment: Alignment, tokenizer: Tokenizer) -> list[Word]:
    """The words of an alignment; in scripts without spaces every character that is whole is one. Their texts
    keep the space before them, so that they join to the text."""
    found: list[Word] = []
    begin = 0
    for end in range(1, len(alignment.tokens) + 1):
        text = _raw(tokenizer, alignment.tokens[begin:end])
        if "\ufffd" in text:  # a character is not whole yet
            continue
        shares = alignment.probabilities[begin:end]
        word = Word(alignment.starts[begin], alignment.starts[end], text, sum(shares) / len(shares))
        begin = end
        last = found[-1] if found else None
        if last is None or _begins_word(last.text, text):
            found.append(word)
        else:
            found[-1] = _merged(last, word)
    return found


def _raw(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text with its space in front, which ``decode`` takes away."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return "".join(map(tokenizer.piece, tokens)).replace("▁", " ")
    return tokenizer.decode(tokens, special=True)


def _begins_word(before: str, text: str) -> bool:
    if before.strip() and all(mark in OPENING for mark in before.strip()) and before.startswith(" "):
        return False
    if text.strip() and all(mark in CLOSING for mark in text.strip()):
        return False
    return text.startswith(" ") or bool(UNSPACED.match(text)) or bool(UNSPACED.search(before[-1:]))


def _merged(one: Word, other: Word) -> Word:
    longer = max(len(one.text) + len(other.text), 1)
    share = (one.probability * len(one.text) + other.probability * len(other.text)) / longer
    return Word(one.start, other.end, one.text + other.text, share)


def segments_of(
    hypothesis: Hypothesis, tokenizer: Tokenizer, seconds: float, first_timestamp: int | None = None
) -> list[Segment]:
    """The segments of one piece of audio of so many seconds, times from its start.

    Where the model wrote timestamps they are the segments' bounds: Whisper's, whose first has the id
    ``first_timestamp`` (an unfinished last segment ends with the audio), or Canary's, which stand around
    every word and make words. Else the piece is one segment, with the words of the alignment, if there is
    one.
    """
    tokens = hypothesis.tokens
    spans: list[tuple[float, float, list[int]]] = []
    words: list[Word] = []
    if first_timestamp is not None and any(token >= first_timestamp for token in tokens):
        spans = _whisper_spans(tokens, first_timestamp, seconds)
    else:
        words = _canary_words(tokenizer.decode(tokens, special=True))
        begin, end = (words[0].start, words[-1].end) if words else (0.0, seconds)
        spans = [(begin, min(end, seconds), list(tokens))]
    aligned = hypothesis.alignment is not None and not words
    if hypothesis.alignment and aligned:
        words = words_of(hypothesis.alignment, tokenizer)
    found = []
    for begin, end, part in spans:
        text = tokenizer.decode(part).strip()
        if text:
            found.append(
                Segment(
                    begin,
                    end,
                    text,
                    tuple(part),
                    avg_logprob=hypothesis.avg_logprob,
                    temperature=hypothesis.temperature,
                    no_speech_prob=hypothesis.no_speech,
                )
            )
    if not words:
        return found
    found = _with_words(found, words)
    return _bounded(found) if aligned else found


def ended_early(
    hypothesis: Hypothesis, seconds: float, first_timestamp: int, voiced: np.ndarray | None = None
) -> float | None:
    """Return where in so many seconds of audio a Whisper's hypothesis stopped, None if at their end.

    Of a sentence that the window's end cuts Whisper often writes the first timestamp alone, and its command line
    begins the next window there (Radford et al., 2022, section 4.5). One timestamp at the end says that nobody speaks
    after it; that is believed unless the detector hears speech there: ``voiced`` (F,), frames of FRAME seconds that end
    where the audio does; empty or None where that is not known.
    """
    tokens = hypothesis.tokens
    if not tokens or tokens[-1] < first_timestamp:
        return None
    begins = (tokens[-1] - first_timestamp) * TIMESTAMP_SECONDS
    if begins < LEAST_REST or seconds - begins <= LEAST_REST:
        return None
    if len(tokens) == 1 or tokens[-2] >= first_timestamp:
        return begins
    left = round((seconds - begins) / FRAME)
    if voiced is None or not 0 < left <= len(voiced) or tokens[0] < first_timestamp:
        return None
    after = np.flatnonzero(voiced[len(voiced) - left :])
    after = after[after * FRAME >= TAIL]  # the end of the last word may lie behind its timestamp
    if len(after) * FRAME < LEAST_SPEECH:
        return None
    return max(begins, begins + after[0] * FRAME - TAIL)


def skipped(
    hypothesis: Hypothesis,
    tokenizer: Tokenizer,
    seconds: float,
    first_timestamp: int,
    voiced: np.ndarray | None,
) -> float | None:
    """Return where to go on after the last segment of a Whisper's hypothesis, where that has next to no text for all
    the speech in it: the model has passed over what was said. That is the first pause after the time that the text
    takes. ``voiced``: as for `ended_early`. None where nothing was skipped."""
    tokens = hypothesis.tokens
    if voiced is None or not len(voiced) or not tokens or tokens[0] < first_timestamp:
        return None
    spans = _whisper_spans(tokens, first_timestamp, seconds)
    if not spans:
        return None
    begin, end, part = spans[-1]
    here = voiced[max(0, len(voiced) - round(seconds / FRAME)) :]
    size = len(tokenizer.decode(part).encode())
    if here[round(begin / FRAME) : round(end / FRAME)].sum() * FRAME < max(MUCH_SPEECH, size / SPARSE):
        return None
    said = round((begin + max(LEAST_SPEECH, size / USUAL)) / FRAME)
    pauses = np.flatnonzero(~here[said:])
    place = (said + int(pauses[0])) * FRAME if len(pauses) else seconds
    return place if seconds - place > MUCH_SPEECH / 2 else None


def in_speech(segments: Sequence[Segment], voiced: np.ndarray) -> list[Segment]:
    """Return the segments, times from the start of their audio, without the silence at their beginnings and ends.

    voiced (F,): whether somebody speaks, in frames of FRAME seconds; empty where that is not known. The first and the
    last word of a segment go with it.
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
    if inside[0] - start > SILENT:
        start = float(inside[0]) - AROUND
        if words and words[0].start < start < words[0].end:
            words[0] = replace(words[0], start=start)
        elif words:
            start = min(start, words[0].start)
    if end - inside[-1] > SILENT:
        end = min(end, float(inside[-1]) + FRAME + AROUND)
        if words and words[-1].start < end < words[-1].end:
            words[-1] = replace(words[-1], end=end)
        elif words:
            end = max(end, words[-1].end)
    return replace(segment, start=start, end=end, words=tuple(words))


def _whisper_spans(tokens: Sequence[int], first: int, seconds: float) -> list[tuple[float, float, list[int]]]:
    spans: list[tuple[float, float, list[int]]] = []
    begin, part = 0.0, list[int]()
    for token in tokens:
        if token < first:
            part.append(token)
            continue
        time = min((token - first) * TIMESTAMP_SECONDS, seconds)
        if any(one < first for one in part):
            time = max(time, begin)  # a model that was not asked for timestamps may write any
            spans.append((begin, time, [*part, token]))
            part = []
            begin = time
        else:
            begin, part = time, [token]
    if any(one < first for one in part):
        spans.append((begin, seconds, part))
    return spans


def _canary_words(text: str) -> list[Word]:
    """The words between pairs of Canary's timestamps, ``<|3|> word<|7|>``, in frames of 80 ms."""
    parts = _CANARY_STAMP.split(text)  # text, number, text, number, ...
    stamps = [int(number) * CANARY_FRAME for number in parts[1::2]]
    found = []
    for index, spoken in enumerate(parts[2::2]):
        if spoken.strip():
            end = stamps[index + 1] if index + 1 < len(stamps) else stamps[index]
            found.append(Word(stamps[index], max(end, stamps[index]), " " + spoken.strip(), 1.0))
    return found


def _with_words(segments: list[Segment], words: list[Word]) -> list[Segment]:
    """Words go to segments in order, as many characters as each segment's text has."""
    found, place = [], 0
    for number, segment in enumerate(segments):
        length, taken = sum(not one.isspace() for one in segment.text), 0
        begin = place
        while place < len(words) and (taken < length or number == len(segments) - 1):
            taken += sum(not one.isspace() for one in words[place].text)
            place += 1
        found.append(replace(segment, words=tuple(words[begin:place])))
    return found


def _bounded(segments: list[Segment]) -> list[Segment]:
    """Return the segments with the times of their words. An alignment covers all audio, so the pause before a segment
    falls to its first word, and what is after it to its last: a first word lasts no more than twice the usual (the
    median, at most LONG_WORD, as openai-whisper's), a last one no longer than its segment."""
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


def joined(before: list[Word], after: list[Word], start: float, end: float) -> tuple[int, int]:
    """Two pieces both have the audio from ``start`` to ``end``: how many words of ``before`` are kept, and
    the first of ``after`` that is.

    They part within the longest run of words that both heard there at about the same time (its middle: words
    at the very edge of a piece are heard worst); where they heard nothing alike, in the middle of the
    overlap, or where one of them fell silent before it. All words are kept where one of them heard none at all.
    """
    if not before or not after:
        return len(before), 0
    heard, again = ([_plain(word.text) for word in words] for words in (before, after))
    low = next((i for i, word in enumerate(before) if word.end > start - NEAR), len(before))
    longest = (0, 0, 0)
    for one in range(low, len(before)):
        for other, word in enumerate(after):
            size = 0
            while (
                one + size < len(before)
                and other + size < len(after)
                and heard[one + size] == again[other + size] != ""
                and abs(before[one + size].start - after[other + size].start) < NEAR
            ):
                size += 1
            longest = max(longest, (size, one, other))
            if word.start > end + NEAR:
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
    """The segments of one utterance, from hypotheses of its pieces in any order."""

    def __init__(self):
        self.total: int | None = None
        """How many pieces there are, once that is known."""
        self.segments: list[Segment] = []
        """In order; the words' texts have the space before them."""
        self.hypotheses: dict[int, Hypothesis] = {}
        self.languages: list[tuple[float, tuple[float, ...]]] = []
        """Seconds of each part of the audio whose language was detected, and the probabilities of the languages."""
        self._waiting: dict[int, tuple[list[Segment], float, float]] = {}
        self._next = 0
        self._last_begins = 0  # in ``segments``: of the latest piece, which the next may still shorten

    @property
    def complete(self) -> bool:
        return self._next == self.total

    def add(self, number: int, segments: list[Segment], start: float, overlap: float) -> list[Segment]:
        """The segments of piece ``number``, times from its own start, which is at ``start`` seconds; of the
        first ``overlap`` the piece before has the words too. Returns segments that nothing will change any
        more."""
        self._waiting[number] = ([one.shifted(start) for one in segments], start, overlap)
        settled = self._last_begins
        while self._next in self._waiting:
            new, start, overlap = self._waiting.pop(self._next)
            if overlap:
                last = self.segments[self._last_begins :]
                kept, first = joined(_all_words(last), _all_words(new), start, start + overlap)
                self.segments[self._last_begins :] = _sliced(last, 0, kept)
                new = _sliced(new, first, None)
            self._last_begins = len(self.segments)
            self.segments += new
            self._next += 1
        if self.complete:
            self._last_begins = len(self.segments)
        return [_stripped(one) for one in self.segments[settled : self._last_begins]]

    def finished(self) -> tuple[str, tuple[Segment, ...]]:
        """The text and the segments."""
        text = ""
        for segment in self.segments:
            close = UNSPACED.match(segment.text) and UNSPACED.search(text[-1:])
            text += segment.text if close or not text else " " + segment.text
        return text, tuple(map(_stripped, self.segments))


def _all_words(segments: list[Segment]) -> list[Word]:
    return [word for segment in segments for word in segment.words]


def _sliced(segments: list[Segment], first: int, end: int | None) -> list[Segment]:
    """The words from ``first`` to ``end`` of all; a segment that loses some has no tokens any more."""
    found, place = [], 0
    for segment in segments:
        words = segment.words[max(0, first - place) : None if end is None else max(0, end - place)]
        place += len(segment.words)
        if words == segment.words:
            found.append(segment)
        elif words:
            text = "".join(word.text for word in words).strip()
            start = words[0].start if words[0] != segment.words[0] else segment.start
            stop = words[-1].end if words[-1] != segment.words[-1] else segment.end
            found.append(replace(segment, start=start, end=stop, text=text, tokens=(), words=words))
    return found


def _stripped(segment: Segment) -> Segment:
    return replace(segment, words=tuple(replace(word, text=word.text.strip()) for word in segment.words))


def _plain(text: str) -> str:
    return "".join(one for one in text.casefold() if one.isalnum())
