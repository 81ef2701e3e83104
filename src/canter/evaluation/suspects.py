"""Rows of a manifest whose text does not fit their audio, by the scores that a model gives the texts.

Three measures decide, each with a limit. A row is a suspect if one of them reaches its limit:

- improbable: the mean log probability of its tokens lies far below the median of the rows in its language, in robust
  standard deviations: 1.4826 times the median distance from the median, of the rows above it, because bad rows would
  widen it;
- unfinished: the model gives a low probability to the end of the text, because more is said after it;
- rate: the logarithm of its characters per second of audio is far from the median of its language, in robust standard
  deviations of rows on both sides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from canter.inference.align import TextScore

Reason = Literal["improbable", "unfinished", "rate"]
IMPROBABLE = 3.0  # robust standard deviations below the median log probability
UNFINISHED = -math.log(0.01)  # minus the log probability of the end
RATE = 5.0  # robust standard deviations of the logarithm of characters per second
LANGUAGE_ROWS = 20  # minimum number of rows of a language for medians of its own
LEAST_DEVIATION = 0.1  # minimum standard deviation, where more than half of the rows score alike


@dataclass(frozen=True)
class Suspicion:
    """Measure of how little a row's text fits its audio."""

    value: float
    """The measure that is largest in relation to its limit, divided by that limit; a suspect has 1 or more."""
    reason: Reason
    """That measure."""

    @property
    def is_suspect(self) -> bool:
        """True if a measure reaches its limit."""
        return self.value >= 1


def suspicions(scores: Sequence[TextScore], languages: Sequence[str | None]) -> list[Suspicion]:
    """Return the suspicion of each row, from the score of its text and its language.

    Languages with few rows are judged by the medians of all rows.
    """
    logprobs = np.array([score.logprob for score in scores])
    rates = np.log([max(1, score.characters) / max(score.seconds, 1e-3) for score in scores])
    improbable, unusual = np.zeros(len(scores)), np.zeros(len(scores))
    groups: dict[str | None, list[int]] = {}
    for row, language in enumerate(languages):
        groups.setdefault(language, []).append(row)
    everything = list(range(len(scores)))
    for rows in groups.values():
        judges = rows if len(rows) >= LANGUAGE_ROWS else everything
        improbable[rows] = -_deviations(logprobs[rows], logprobs[judges], above=True)
        unusual[rows] = np.abs(_deviations(rates[rows], rates[judges]))
    found: list[Suspicion] = []
    for score, low, far in zip(scores, improbable.tolist(), unusual.tolist()):
        measures: list[tuple[float, Reason]] = [
            (low / IMPROBABLE, "improbable"),
            (-score.end_logprob / UNFINISHED, "unfinished"),
            (far / RATE, "rate"),
        ]
        found.append(Suspicion(*max(measures)))
    return found


def _deviations(values: np.ndarray, judges: np.ndarray, above: bool = False) -> np.ndarray:
    """Return values (N,) minus the median of ``judges`` (M,), in robust standard deviations of these, or of those at
    least as large as the median."""
    middle = np.median(judges)
    distances = np.abs(judges - middle)[judges >= middle if above else ...]
    deviation = 1.4826 * np.median(distances)
    return (values - middle) / max(float(deviation), LEAST_DEVIATION)
