"""Decide which language is spoken where: pure functions of the probabilities that a model gives to speech."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

SURE = 0.5
"""Probability from which a piece's own language is believed."""
CHANGE = 0.7
"""Probability of a language, in the speech before a change and after it, for which audio is cut there ..."""
LEAST_SPEECH = 2.5
"""... and seconds of speech that either side has."""
SWITCH = 6.0
"""Price of a change, in seconds times natural-log probability: a second of certainty is worth 3.9 (see FAINT)."""
FAINT = 0.02
"""No language counts as less probable than this in a stretch of speech."""
STRETCH = 1.2
"""Seconds that a stretch of speech must last for its language to be told."""
PAUSE = 0.1
"""Seconds without speech between two stretches."""


def weighted(parts: Iterable[tuple[float, Sequence[float]]]) -> np.ndarray:
    """Return the mean of the probabilities (K,) of parts, each weighted with its seconds; empty without parts."""
    found = [(seconds, np.asarray(shares, float)) for seconds, shares in parts if len(shares)]
    if not found:
        return np.zeros(0)
    total = sum(seconds for seconds, _ in found)
    if total <= 0:
        return np.mean([shares for _, shares in found], axis=0)
    return np.sum([seconds * shares for seconds, shares in found], axis=0) / total


def spoken(parts: Iterable[tuple[float, Sequence[float]]]) -> tuple[int, float] | None:
    """Return which language a recording has by the probabilities of its parts and their seconds, and how probable it
    is; None where nothing was detected."""
    mean = weighted(parts)
    return (int(mean.argmax()), float(mean.max())) if len(mean) else None


def stretches(voiced: np.ndarray, frame: float, least: float = STRETCH) -> list[tuple[float, float]]:
    """Return stretches of speech, in seconds, whose languages can be told apart: parted by pauses, the shortest
    joined with a neighbour, across the shorter pause, until each lasts ``least`` seconds.

    voiced (F,): whether somebody speaks, in frames of ``frame`` seconds.
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
    """Return the stretches with half of the pause on either side, so that they cover all of the audio: what the encoder
    knows of a stretch stands in the frames beside it too."""
    edges = [0.0, *((before[1] + after[0]) / 2 for before, after in pairwise(places)), seconds]
    return [*pairwise(edges)]


def _pause(found: Sequence[tuple[float, float]], one: int, other: int) -> float:
    """Return the tenths of a second between two neighbours."""
    first, second = sorted((one, other))
    return round(found[second][0] - found[first][1], 1)


def change(places: Sequence[tuple[float, float]], shares: Sequence[Sequence[float]]) -> float | None:
    """Return the time at which the language first changes for certain, in the middle of the pause; None for no change.

    ``places``: stretches of speech in order, in seconds; ``shares``: the probabilities (K,) of each. The languages are
    those of the likeliest path through the stretches, at the price SWITCH a change.
    """
    if len(places) < 2:
        return None
    seconds = np.array([end - start for start, end in places])
    scores = seconds[:, None] * np.log(np.maximum(np.asarray(shares, float), FAINT))
    best, came = scores[0], []
    for row in scores[1:]:
        stays = best >= best.max() - SWITCH
        came.append(np.where(stays, np.arange(len(row)), best.argmax()))
        best = np.maximum(best, best.max() - SWITCH) + row
    path = [int(best.argmax())]
    for back in reversed(came):
        path.append(int(back[path[-1]]))
    path.reverse()
    first = next((place for place, one in enumerate(path) if one != path[0]), None)
    if first is None:
        return None
    after = next((place for place in range(first, len(path)) if path[place] != path[first]), len(path))
    for side in (slice(0, first), slice(first, after)):
        certain = weighted(zip(seconds[side], shares[side]))[path[side.start]]
        if seconds[side].sum() < LEAST_SPEECH or certain < CHANGE:
            return None
    return (places[first - 1][1] + places[first][0]) / 2
