"""Language detection: which language a recording has, and where it changes, from the probabilities of a model.

These are pure functions; `Engine` and `canter.inference.languages` call them.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

CERTAIN = 0.5
"""Minimum probability for which the language of a chunk is decided by that chunk only."""
CHANGE = 0.7
"""Minimum mean probability of the languages on both sides of a change."""
MIN_SPEECH = 2.5
"""Minimum seconds of speech on both sides of a change."""
SWITCH_COST = 6.0
"""Cost of a change, in seconds times natural-log probability: a certain second counts 3.9 (see MIN_PROBABILITY)."""
MIN_PROBABILITY = 0.02
"""Lower bound of the probability of any language in a span of speech."""
MIN_SPAN = 1.2
"""Minimum seconds of a span of speech in which the language is detected."""
PAUSE = 0.1
"""Minimum seconds without speech between two spans."""


def weighted_mean(parts: Iterable[tuple[float, Sequence[float]]]) -> np.ndarray:
    """Return the mean probabilities (K,) of parts, each weighted with its seconds; empty without parts."""
    found = [(seconds, np.asarray(probabilities, float)) for seconds, probabilities in parts if len(probabilities)]
    if not found:
        return np.zeros(0)
    total = sum(seconds for seconds, _ in found)
    if total <= 0:
        return np.mean([probabilities for _, probabilities in found], axis=0)
    return np.sum([seconds * probabilities for seconds, probabilities in found], axis=0) / total


def spoken(parts: Iterable[tuple[float, Sequence[float]]]) -> tuple[int, float] | None:
    """Return the index and the probability of a recording's language, from the seconds and the probabilities of its
    parts; None where nothing was detected."""
    mean = weighted_mean(parts)
    return (int(mean.argmax()), float(mean.max())) if len(mean) else None


def speech_spans(voiced: np.ndarray, frame: float, least: float = MIN_SPAN) -> list[tuple[float, float]]:
    """Return spans of speech, in seconds, that are long enough to detect their languages.

    Spans are separated by pauses. The shortest is merged with a neighbour, across the shorter pause, until each lasts
    at least ``least`` seconds. voiced (F,): True for speech, in frames of ``frame`` seconds.
    """
    edges = np.diff(np.r_[0, voiced.astype(int), 0])
    runs = zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist())
    found: list[tuple[float, float]] = []
    for start, end in ((first * frame, last * frame) for first, last in runs):
        if found and start - found[-1][1] < PAUSE:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    while len(found) > 1:
        short = min(range(len(found)), key=lambda place: found[place][1] - found[place][0])
        if found[short][1] - found[short][0] >= least:
            break
        neighbours = [one for one in (short - 1, short + 1) if 0 <= one < len(found)]
        other = min(neighbours, key=lambda one: (_pause(found, short, one), found[one][1] - found[one][0]))
        first = min(short, other)
        found[first : first + 2] = [(found[first][0], found[first + 1][1])]
    return found


def with_pauses(places: Sequence[tuple[float, float]], seconds: float) -> list[tuple[float, float]]:
    """Return the spans extended by half of the pause on either side, so that they cover the audio: encoder output of
    the frames beside a span depends on it too."""
    edges = [0.0, *((before[1] + after[0]) / 2 for before, after in pairwise(places)), seconds]
    return [*pairwise(edges)]


def _pause(found: Sequence[tuple[float, float]], one: int, other: int) -> float:
    """Return the seconds between two neighbours, rounded to tenths."""
    first, second = sorted((one, other))
    return round(found[second][0] - found[first][1], 1)


def change(places: Sequence[tuple[float, float]], probabilities: Sequence[Sequence[float]]) -> float | None:
    """Return the time of the first certain change of language, in the middle of the pause; None without one.

    ``places``: spans of speech in order, in seconds; ``probabilities``: those of the K languages in each. The languages
    are those of the most probable path through the spans (Viterbi), at SWITCH_COST a change.
    """
    if len(places) < 2:
        return None
    seconds = np.array([end - start for start, end in places])
    scores = seconds[:, None] * np.log(np.maximum(np.asarray(probabilities, float), MIN_PROBABILITY))
    best, came = scores[0], []
    for row in scores[1:]:
        stays = best >= best.max() - SWITCH_COST
        came.append(np.where(stays, np.arange(len(row)), best.argmax()))
        best = np.maximum(best, best.max() - SWITCH_COST) + row
    path = [int(best.argmax())]
    for back in reversed(came):
        path.append(int(back[path[-1]]))
    path.reverse()
    first = next((place for place, one in enumerate(path) if one != path[0]), None)
    if first is None:
        return None
    after = next((place for place in range(first, len(path)) if path[place] != path[first]), len(path))
    for side in (slice(0, first), slice(first, after)):
        certain = weighted_mean(zip(seconds[side], probabilities[side]))[path[side.start]]
        if seconds[side].sum() < MIN_SPEECH or certain < CHANGE:
            return None
    return (places[first - 1][1] + places[first][0]) / 2
