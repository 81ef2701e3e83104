"""Which language is spoken where: pure functions of the probabilities that a model gives to stretches of audio."""

from collections.abc import Iterable, Sequence

import numpy as np

SURE = 0.5
"""Probability from which a piece's own language is believed."""
CHANGE = 0.7
"""Probability of a language, in stretches on both sides, for which audio is cut at a change of language ..."""
APART = 8.0
"""... which must be so many times that of the other side's language: neighbours such as Norwegian and Nynorsk do not
make a change."""
LEAST_SPEECH = 3.0
"""Seconds that a stretch must last for its language to be told."""
PAUSE = 0.2
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


def stretches(voiced: np.ndarray, frame: float, least: float = LEAST_SPEECH) -> list[tuple[float, float]]:
    """Return stretches of speech, in seconds, whose languages can be told apart: parted by pauses, the shorter ones
    joined across the shorter pauses until each lasts ``least`` seconds.

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
        before = found[short][0] - found[short - 1][1] if short else np.inf
        after = found[short + 1][0] - found[short][1] if short + 1 < len(found) else np.inf
        first = short - 1 if before <= after else short
        found[first : first + 2] = [(found[first][0], found[first + 1][1])]
    return found


def change(places: Sequence[tuple[float, float]], shares: Sequence[Sequence[float]]) -> float | None:
    """Return the time at which the language first changes for certain, in the middle of the pause; None for no change.

    ``places``: stretches of speech in order, in seconds; ``shares``: the probabilities (K,) of each. A stretch whose
    language is not certain belongs to the one before.
    """
    current: int | None = None
    for number, one in enumerate(shares):
        language = int(np.argmax(one))
        if one[language] < CHANGE:
            continue
        if current is not None and language != current and one[language] >= APART * one[current]:
            return (places[number - 1][1] + places[number][0]) / 2
        if current is None:
            current = language
    return None
