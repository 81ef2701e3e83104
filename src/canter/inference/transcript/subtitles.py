"""Layout of subtitles: cues from the segments and words of a transcript.

By default cues end at sentence ends, last at most seven seconds and have at most two lines of 42 columns.
`SubtitleStyle` sets other limits, or selects the cues of the Whisper command line.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import inf
from typing import Literal

from canter.errors import ConfigError
from canter.inference.transcript.segments import UNSPACED, Segment, Word, spaced

WIDTH, LINES = 42, 2  # columns per line and lines per cue in broadcasters' guides
LONGEST_CUE = 7.0  # seconds
SHORTEST_CUE = 1.0  # seconds, unless the next cue begins earlier
PAUSE = 1.0  # seconds of silence that end every cue
LONGEST_WORD = 1.4  # seconds; an alignment adds the pause after a word to the word
WHISPER_PAUSE = 3.0  # seconds between the starts of two words that divide Whisper's cues
SECONDS_PER_COLUMN = 0.06  # for text without duration

# Costs of ending a cue or line after a word; the lowest sum is chosen.
SENTENCE, CLAUSE, SEGMENT, ANYWHERE = 0.0, 3.0, 5.0, 8.0
SHORT_WORD = 2.0  # extra after a word of at most three letters, such as articles and prepositions
FILLED = 3.0  # of a full cue, by the square of its fill, so that the cues of a sentence are equally long
HURRIED = 3.0  # of a cue of no duration, less for longer ones
ANOTHER, BEGUN = 1.0, 4.0  # of a sentence end within a cue that ends at a sentence end, and one that does not

_TERMINAL = re.compile(r"[.!?…。！？।؟۔][\"'”’»)\]」』]*$")
_CLAUSE = re.compile(r"[,;:—–、，；：][\"'”’»)\]」』]*$")
_ABBREVIATED = re.compile(r"^\W*((mr|mrs|ms|dr|st|prof|sr|jr|vs|gen|capt|col|hon|rev)|[^\W\d_](\.[^\W\d_])*)\.$", re.I)
_TOKEN = re.compile(rf"\s*(?:{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})\S)+)[。、，！？：”)\]」』]*")


@dataclass(frozen=True)
class SubtitleStyle:
    """Layout of words as cues. Raises ConfigError for limits below 1."""

    cues: Literal["auto", "sentence", "whisper"] = "auto"
    """`sentence`: cues end at sentence ends; `whisper`: one cue per segment, or the cues of Whisper's command with the
    options below; `auto`: `whisper` with one of these options, else `sentence`."""
    max_line_width: int | None = None
    """Maximum number of characters in a line (default: 42 for `sentence`, no limit for `whisper`)."""
    max_line_count: int | None = None
    """Maximum number of lines in a cue (default: 2 for `sentence`); `whisper` needs ``max_line_width`` with it."""
    max_words_per_line: int | None = None
    """Maximum number of words in a line (default: no limit)."""
    highlight_words: bool = False
    """Underline each word while it is spoken, with one cue per word."""

    def __post_init__(self) -> None:
        for name in ("max_line_width", "max_line_count", "max_words_per_line"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name.replace('_', ' ')} {value}: at least 1")

    @property
    def shaped(self) -> bool:
        """True if an option of Whisper's command is set."""
        limits = (self.max_line_width, self.max_line_count, self.max_words_per_line)
        return self.highlight_words or any(limit is not None for limit in limits)

    @property
    def by_sentence(self) -> bool:
        """True if cues end at sentence ends."""
        return self.cues == "sentence" or (self.cues == "auto" and not self.shaped)

    @property
    def needs_words(self) -> bool:
        """True if the times of words are required."""
        return self.highlight_words or (self.shaped and not self.by_sentence)

    @property
    def ignored(self) -> str | None:
        """Message about an option without effect, or None."""
        if self.by_sentence:
            return None
        if self.max_line_count and not self.max_line_width:
            return "max-line-count has no effect on Whisper's cues without max-line-width"
        if self.max_line_count and self.max_line_width and self.max_words_per_line:
            return "max-words-per-line has no effect on Whisper's cues with max-line-width and max-line-count"
        return None


SENTENCES = SubtitleStyle("sentence")
WHISPER = SubtitleStyle("whisper")


@dataclass(frozen=True)
class Cue:
    """One subtitle, with times in seconds."""

    start: float
    end: float
    words: tuple[str, ...]
    """Words, or the complete text, each with the white space before it; a newline begins a line."""
    underlined: int | None = None
    """Index of the underlined word."""
    channel: int | None = None
    """Channel of its segments."""


def cues_of(segments: Sequence[Segment], style: SubtitleStyle = SENTENCES) -> list[Cue]:
    """Return the cues of the segments, in order. Each has the words of one channel.

    Segments without times of words are divided at sentence ends, at times in proportion to their characters; Whisper's
    cues do not divide them.
    """
    channels = {segment.channel for segment in segments if segment.channel is not None}
    if channels:
        found: list[Cue] = []
        for channel in sorted(channels):
            here = [replace(segment, channel=None) for segment in segments if segment.channel == channel]
            found += [replace(cue, channel=channel) for cue in cues_of(here, style)]
        return sorted(found, key=lambda cue: cue.start)
    cues = _sentences(segments, style) if style.by_sentence else [*_as_whisper(segments, style)]
    if style.highlight_words:
        return [cue for words in cues for cue in _highlighted(words)]
    return [Cue(words[0].start, words[-1].end, tuple(word.text for word in words)) for words in cues]


def _timed(segment: Segment) -> list[Word]:
    """Return the words, each with the space before it; the segment as one word where they do not join to its text."""
    if "".join("".join(word.text.split()) for word in segment.words) != "".join(segment.text.split()):
        complete = spaced(segment.text, [segment.text])[0]
        return [Word(segment.start, segment.end, complete, 0.0)] if segment.text.strip() else []
    texts = spaced(segment.text, [word.text for word in segment.words])
    return [replace(word, text=text) for word, text in zip(segment.words, texts)]


def _highlighted(words: Sequence[Word]) -> Iterator[Cue]:
    """Yield a cue for each word and for each pause."""
    texts = tuple(word.text for word in words)
    last = words[0].start
    for index, word in enumerate(words):
        if round(1000 * last) < round(1000 * word.start):
            yield Cue(last, word.start, texts)
        yield Cue(word.start, word.end, texts, index)
        last = word.end


# Whisper's cues, as openai-whisper 20250625 writes them: a test compares the files.


def _as_whisper(segments: Sequence[Segment], style: SubtitleStyle) -> Iterator[list[Word]]:
    width, rows = style.max_line_width or 1000, style.max_line_count
    every = style.max_words_per_line or 1000
    separate = style.max_line_width is None or rows is None  # every segment begins a cue
    cue: list[Word] = []
    used, row = 0, 1  # columns of the line, and its number
    last = 0.0
    for segment in segments:
        for number, word in enumerate(_timed(segment)):
            paused = bool(cue) and not separate and word.start - last > WHISPER_PAUSE
            apart = bool(cue) and separate and number % every == 0
            last = word.start
            if used and used + len(word.text) <= width and not paused and not apart:
                cue.append(word)
                used += len(word.text)
                continue
            text = word.text.strip()
            full = rows is not None and (paused or row >= rows)
            if cue and (apart or full):
                yield cue
                cue, row = [], 1
            elif used:
                row += 1
            cue.append(replace(word, text=f"\n{text}" if cue else text))
            used = len(text)
    if cue:
        yield cue


# Cues that end where sentences end.


def _sentences(segments: Sequence[Segment], style: SubtitleStyle) -> list[list[Word]]:
    found = [cue for words, aligned, ends in _stretches(segments) for cue in _shaped(words, aligned, ends, style)]
    starts = [*(cue[0].start for cue in found[1:]), inf]
    for cue, latest in zip(found, starts):
        cue[-1] = replace(cue[-1], end=min(max(cue[-1].end, cue[0].start + SHORTEST_CUE), latest))
    return found


def _stretches(segments: Sequence[Segment]) -> Iterator[tuple[list[Word], bool, list[bool]]]:
    """Yield runs of words without a pause: the words, a flag for known times, and a flag per word that ends a
    segment."""
    words: list[Word] = []
    known: list[bool] = []
    ends: list[bool] = []
    for segment in segments:
        timed = _timed(segment)
        aligned = bool(segment.words) and len(timed) == len(segment.words)
        if not aligned and timed:
            timed = _spread(_TOKEN.findall(spaced(segment.text, [segment.text])[0]), segment.start, segment.end)
        words += timed
        known += [aligned] * len(timed)
        ends += [False] * (len(timed) - 1) + [True] * bool(timed)
    words = _in_order(words, known)
    first = 0
    for place in range(1, len(words) + 1):
        pause = place == len(words) or words[place].start - words[place - 1].end >= PAUSE
        if pause or known[place] != known[first]:
            yield words[first:place], known[first], ends[first:place]
            first = place


def _spread(texts: Sequence[str], start: float, end: float) -> list[Word]:
    """Return the texts as words, with times in proportion to their columns."""
    places = [*accumulate((_columns(text) for text in texts), initial=0)]
    times = [start + (end - start) * place / max(1, places[-1]) for place in places]
    return [Word(*pair, text, 0.0) for pair, text in zip(pairwise(times), texts)]


def _in_order(words: Sequence[Word], known: Sequence[bool]) -> list[Word]:
    """Return the words with times that never decrease; words with the same start share the time up to the next one."""
    starts = [*accumulate((word.start for word in words), max)]
    found: list[Word] = []
    while (first := len(found)) < len(words):
        start, place = starts[first], first + 1
        while place < len(words) and starts[place] == start:
            place += 1
        end = max(words[place - 1].end, start)
        if known[first]:
            end = min(end, start + (place - first) * LONGEST_WORD)
        texts = [word.text for word in words[first:place]]
        if end == start:
            end += SECONDS_PER_COLUMN * sum(map(_columns, texts))
        if place < len(words):
            end = min(end, starts[place])
        found += _spread(texts, start, end)
    return found


def _shaped(words: Sequence[Word], aligned: bool, ends: Sequence[bool], style: SubtitleStyle) -> Iterator[list[Word]]:
    """Yield the words of each cue, with its line breaks."""
    width, lines = style.max_line_width or WIDTH, style.max_line_count or LINES
    layout = _Layout(words, width, style.max_words_per_line)
    after = [_cost_after(words, place, ends[place]) for place in range(len(words))]
    sentences = [*accumulate((cost == SENTENCE for cost in after), initial=0)]
    reach = [layout.reach(place, lines) for place in range(len(words))]

    def cue_cost(first: int, end: int) -> float:
        seconds = words[end - 1].end - words[first].start
        if end > first + 1 and (end > reach[first] or (aligned and seconds > LONGEST_CUE)):
            return inf
        inside = sentences[end - 1] - sentences[first]
        others = inside * (ANOTHER if after[end - 1] == SENTENCE else BEGUN)
        filled = layout.columns(first, end) / (width * lines)
        hurried = max(0.0, 1 - seconds / SHORTEST_CUE)
        return after[end - 1] + others + FILLED * filled**2 + HURRIED * hurried

    for first, end in _divided(0, len(words), cue_cost):
        yield _broken(words, first, end, layout, after)


def _broken(words: Sequence[Word], first: int, end: int, layout: "_Layout", after: Sequence[float]) -> list[Word]:
    """Return the words of a cue in the fewest lines, of similar lengths, with breaks after punctuation if possible."""

    def line_cost(one: int, other: int) -> float:
        if other > max(layout.line_ends[one], one + 1):
            return inf
        uneven = (layout.columns(one, other) / layout.width) ** 2
        return 10 + uneven + (after[other - 1] / ANYWHERE / 4 if other < end else 0.0)

    starts = {one for one, _ in _divided(first, end, line_cost)}
    found = []
    for place in range(first, end):
        text = words[place].text
        if place in starts:
            text = ("\n" if place > first else "") + text.strip()
        found.append(replace(words[place], text=text))
    return found


class _Layout:
    """Columns of words, and the end of the line that begins at each word."""

    def __init__(self, words: Sequence[Word], width: int, most: int | None):
        self.width = width
        self._before = [_columns(word.text) - _columns(word.text.lstrip()) for word in words]
        self._places = [*accumulate((_columns(word.text) for word in words), initial=0)]
        self.line_ends: list[int] = []
        end = 0
        for first in range(len(words)):
            end = max(end, first + 1)
            while end < len(words) and self.columns(first, end + 1) <= width:
                end += 1
            self.line_ends.append(end if most is None else min(end, first + most))

    def columns(self, first: int, end: int) -> int:
        """Return the number of columns of the words in one line."""
        return self._places[end] - self._places[first] - self._before[first]

    def reach(self, first: int, lines: int) -> int:
        """Return the end of the words that fit on ``lines`` lines."""
        for _ in range(lines):
            if first < len(self.line_ends):
                first = self.line_ends[first]
        return first


def _columns(text: str) -> int:
    """Return the number of columns of the text; East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text)


def ends_sentence(word: str, following: str) -> bool:
    """Return whether a sentence ends with a word, given the word after it, or "" at the end of the text."""
    return bool(_TERMINAL.search(word)) and not _ABBREVIATED.search(word) and not following[:1].islower()


def _cost_after(words: Sequence[Word], place: int, segment_ends: bool) -> float:
    """Return the cost of ending a cue after a word."""
    if place + 1 == len(words):
        return SENTENCE
    text, following = words[place].text.strip(), words[place + 1].text.strip()
    if ends_sentence(text, following):
        return SENTENCE
    if ends_sentence(text, "") or _CLAUSE.search(text):
        return CLAUSE
    return (SEGMENT if segment_ends else ANYWHERE) + (SHORT_WORD if len(text) <= 3 else 0.0)


def _divided(first: int, end: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Return the division of ``first`` to ``end`` into parts (i, j) with the lowest sum of costs.

    ``cost(i, j)`` is infinite for a part that is too long, and then for every longer one with the same end.
    """
    best, begins = [0.0], [first]
    for stop in range(first + 1, end + 1):
        total, begin = inf, stop - 1
        for one in range(stop - 1, first - 1, -1):
            here = cost(one, stop)
            if here == inf:
                break
            if best[one - first] + here < total:
                total, begin = best[one - first] + here, one
        best.append(total)
        begins.append(begin)
    parts: list[tuple[int, int]] = []
    while end > first:
        parts.append((begins[end - first], end))
        end = begins[end - first]
    return parts[::-1]
