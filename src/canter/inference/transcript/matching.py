"""Division of a long recording and its text into pieces that fit the model, by the words that the model recognises.

The words of the text and the recognised words, which have times, are aligned by edit distance. Where both agree, time
and text are known, and the recording is cut there in the quietest moment (Moreno et al., 1998, "A recursive algorithm
for the forced alignment of very long audio segments", in one pass). W: words of the text, H: recognised words, F:
frames.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np

from canter.inference.transcript.reading import USUAL_RATE, plain_word
from canter.inference.transcript.segments import Word
from canter.inference.transcript.subtitles import LONGEST_WORD
from canter.inference.transcript.vad import FRAME

EDGE = 1.0  # seconds of audio kept before the first recognised word of a part, and after the last one
MIN_FILL = 0.5  # minimum fraction of the window that a piece should fill
FASTEST = 30.0  # characters per second of the fastest speech; missing words at a higher rate are not in the audio
MISSING = 4  # minimum number of missing words in a row to align them separately
ADDED, ADDED_SECONDS = 4, 2.0  # minimum number and seconds of recognised words in a row that the text lacks
SHORTEST = 0.2  # minimum seconds of a piece
SMOOTHED = 5  # frames of a level
EQUAL = 3.0  # dB by which two pauses may differ, of which the later one makes the longer piece


@dataclass(frozen=True)
class GivenWord:
    """Word of the text to align."""

    text: str
    """Text with its punctuation, and with a space before it unless it continues a word in a script without spaces."""
    tokens: tuple[int, ...]
    line: int = 0
    """Number of its line in the text."""


@dataclass(frozen=True)
class Piece:
    """Span of the recording with the words of the text that are aligned in it."""

    start: float
    """Seconds from the start of the recording."""
    end: float
    first: int
    """Index of its first word."""
    last: int
    """Index after its last word."""


def levels(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return the smoothed level in dB (F,) of audio (S,), in frames of FRAME seconds."""
    size = round(FRAME * rate)
    padded = np.pad(samples, (0, -len(samples) % size)).reshape(-1, size)
    energy = np.einsum("fs,fs->f", padded, padded) / size
    smooth = np.convolve(energy, np.ones(SMOOTHED) / SMOOTHED, mode="same")[: len(energy)]
    return 10 * np.log10(smooth + 1e-10)


def pieces_of(
    words: Sequence[GivenWord], spoken: Sequence[Word], level: np.ndarray, window: float, most_tokens: int
) -> list[Piece]:
    """Return the pieces of a recording in order; together they have every word of the text once.

    words (W,): the text. spoken (H,): words that the model recognises, with their times. level (F,): see `levels`.
    window: maximum length of a piece in seconds. most_tokens: maximum number of tokens in a piece, if a single word
    does not have more.

    A run of words that the model does not recognise, too long for the time between its neighbours, gets a piece of that
    time. A passage of recognised words that are not in the text belongs to no piece.
    """
    seconds = len(level) * FRAME
    if not words:
        return []
    # the word before a passage that the model has skipped takes the time of that passage
    spoken = [replace(word, end=min(word.end, word.start + LONGEST_WORD)) for word in spoken]
    if not any(plain_word(word.text) for word in spoken):
        found = [*_evenly(words, seconds, window)]
    else:
        found = [piece for part in _parts(words, spoken, seconds) for piece in part.cut(level, window)]
    return [one for piece in found for one in _limited(piece, words, most_tokens)]


@dataclass(frozen=True)
class _Node:
    """Step of the edit path: ``given`` words of the text and ``heard`` recognised words come before it."""

    given: int
    heard: int
    agreed: bool = False
    """True where the words before it are equal."""


def _edit_path(words: Sequence[GivenWord], spoken: Sequence[Word]) -> list[_Node]:
    """Return the cheapest path from no word to all words of both; words without letters and digits join the word
    before them."""
    import jiwer

    left, right = ([plain_word(word.text) for word in some] for some in (words, spoken))
    kept, heard = ([n for n, text in enumerate(texts) if text] for texts in (left, right))
    # in each, the places between words, by the number of words with letters or digits that come before
    given_at = [0, *kept[1:], len(words)] if kept else [0]
    heard_at = [0, *heard[1:], len(spoken)]
    if not kept:
        return [_Node(0, 0), _Node(0, len(spoken)), _Node(len(words), len(spoken))]
    made = jiwer.process_words(" ".join(left[n] for n in kept), " ".join(right[n] for n in heard))
    path = [_Node(0, 0)]
    for chunk in made.alignments[0]:
        i, j, end_i, end_j = chunk.ref_start_idx, chunk.hyp_start_idx, chunk.ref_end_idx, chunk.hyp_end_idx
        while i < end_i or j < end_j:
            i, j = i + (i < end_i), j + (j < end_j)
            path.append(_Node(given_at[i], heard_at[j], chunk.type == "equal"))
    return path


@dataclass(frozen=True)
class _Part:
    """Words of the text and the recognised words that stand for them, with the nodes of the edit path between.

    Without recognised words it has the time between its neighbours.
    """

    words: Sequence[GivenWord]
    spoken: Sequence[Word]
    nodes: Sequence[_Node]
    start: float
    end: float

    def cut(self, level: np.ndarray, window: float) -> Iterator[Piece]:
        """Yield pieces of at most ``window`` seconds, cut in the quietest moments between words that agree."""
        first, last = self.nodes[0], self.nodes[-1]
        if first.given == last.given:
            return
        inner = [
            (node, _quietest(self.spoken, node.heard, level), node.agreed and after.agreed)
            for before, node, after in zip(self.nodes, self.nodes[1:], self.nodes[2:])
            if first.heard < node.heard < last.heard and node.heard > before.heard
        ]
        times = [at for _, at, _ in inner]
        begin, start = first.given, self.start
        while self.end - start > window:
            near = slice(bisect_right(times, start + SHORTEST), bisect_right(times, start + window))
            reach = [one for one in inner[near] if one[0].given > begin]
            sure = [one for one in reach if one[2]]
            late = start + MIN_FILL * window
            choice = [one for one in sure if one[1] >= late] or sure[-1:] or [one for one in reach if one[1] >= late]
            choice = choice or reach[-1:]
            if not choice:
                break
            depths = [level[min(round(one[1] / FRAME), len(level) - 1)] for one in choice]
            quiet = [one for one, depth in zip(choice, depths) if depth <= min(depths) + EQUAL]
            node, at, _ = quiet[-1]
            yield Piece(start, at, begin, node.given)
            begin, start = node.given, at
        if self.end - start <= window:
            yield Piece(start, max(self.end, start + SHORTEST), begin, last.given)
        else:  # nothing says which words are where
            for one in _evenly(self.words[begin : last.given], self.end - start, window):
                yield Piece(one.start + start, one.end + start, one.first + begin, one.last + begin)


def _parts(words: Sequence[GivenWord], spoken: Sequence[Word], seconds: float) -> Iterator[_Part]:
    """Yield the parts of the edit path: without passages that the text lacks, and with runs of missing words by
    themselves."""
    path = _edit_path(words, spoken)
    bounds = [0]
    kinds: list[str] = []
    for first, last, kind in _runs(path):
        before, after = path[first], path[last]
        gap = _time(spoken, after.heard, seconds, True) - _time(spoken, before.heard, seconds, False)
        count = after.given - before.given if kind == "missing" else after.heard - before.heard
        characters = sum(len(word.text) for word in words[before.given : after.given])
        missing = kind == "missing" and count >= MISSING and characters > FASTEST * max(gap, 0.0)
        added = kind == "added" and count >= ADDED
        added = added and spoken[after.heard - 1].end - spoken[before.heard].start >= ADDED_SECONDS
        if missing or added:
            bounds += [first, last]
            kinds += ["spoken", kind]
    kinds.append("spoken")
    bounds.append(len(path) - 1)
    for (first, last), kind in zip(pairwise(bounds), kinds):
        nodes = path[first : last + 1]
        if kind == "added" or nodes[0].given == nodes[-1].given:
            continue
        begin, end = nodes[0].heard, nodes[-1].heard
        if begin == end:
            start, stop = _time(spoken, begin, seconds, False), _time(spoken, begin, seconds, True)
            middle, half = (start + stop) / 2, max(stop - start, SHORTEST) / 2
            yield _Part(words, spoken, nodes, max(0.0, middle - half), min(seconds, middle + half))
            continue
        start, stop = spoken[begin].start, spoken[end - 1].end
        early, late = (_unrecognised(words, some) for some in (nodes, nodes[::-1]))
        yield _Part(
            words,
            spoken,
            nodes,
            max(_time(spoken, begin, seconds, False), start - EDGE - early),
            min(_time(spoken, end, seconds, True), stop + EDGE + late),
        )


def _runs(path: Sequence[_Node]) -> Iterator[tuple[int, int, str]]:
    """Yield first and last node of the runs of missing and of added words."""
    first = 0
    kind = ""
    for place, (before, after) in enumerate(pairwise(path)):
        now = "missing" if after.heard == before.heard else "added" if after.given == before.given else ""
        if now != kind:
            if kind:
                yield first, place, kind
            first, kind = place, now
    if kind:
        yield first, len(path) - 1, kind


def _unrecognised(words: Sequence[GivenWord], nodes: Sequence[_Node]) -> float:
    """Return the seconds that words at the start of ``nodes`` usually take which the model did not recognise."""
    place = next((n for n, node in enumerate(nodes) if node.heard != nodes[0].heard), len(nodes)) - 1
    first, last = sorted((nodes[0].given, nodes[place].given))
    return sum(len(word.text) for word in words[first:last]) / USUAL_RATE


def _time(spoken: Sequence[Word], place: int, seconds: float, following: bool) -> float:
    """Return the start of the recognised word after a place between words, or the end of the one before it."""
    if following:
        return spoken[place].start if place < len(spoken) else seconds
    return spoken[place - 1].end if place else 0.0


def _quietest(spoken: Sequence[Word], place: int, level: np.ndarray) -> float:
    """Return the quietest time from the middle of the recognised word before a place to the middle of the next."""
    first, last = (round((word.start + word.end) / 2 / FRAME) for word in spoken[place - 1 : place + 1])
    part = level[first : max(first + 1, last)]
    return (first + int(part.argmin())) * FRAME if len(part) else first * FRAME


def _evenly(words: Sequence[GivenWord], seconds: float, window: float) -> Iterator[Piece]:
    """Yield equal pieces of the time, with words in proportion to their characters."""
    count = max(1, int(np.ceil(seconds / window)))
    places = [*accumulate((len(word.text) for word in words), initial=0)]
    bounds = np.searchsorted(places, np.arange(count + 1) * places[-1] / count)
    for number, (first, last) in enumerate(pairwise(bounds.tolist())):
        if last > first:
            yield Piece(number * seconds / count, (number + 1) * seconds / count, first, last)


def _limited(piece: Piece, words: Sequence[GivenWord], most: int) -> Iterator[Piece]:
    """Yield the piece, in several with the same time if it has more than ``most`` tokens."""
    first, tokens = piece.first, 0
    for place in range(piece.first, piece.last):
        count = len(words[place].tokens)
        if place > first and tokens + count > most:
            yield replace(piece, first=first, last=place)
            first, tokens = place, 0
        tokens += count
    yield replace(piece, first=first)
