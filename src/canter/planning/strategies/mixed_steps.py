"""Sizes of batches with which a step can hold short and long utterances together.

Ranks wait for the slowest, so the batches of a step must take equally long. Full batches do not: with most budgets one
of short utterances takes longer than one of long utterances, and steps of full batches are steps of like lengths.
Therefore some batches are made smaller. A batch that, full, takes longer than a fraction F of all is shrunk, with
probability F^2, to the time of one of those below it, drawn evenly: the rarest lengths, which differ most from the
rest, spread over the steps of the others. What room the last step leaves, since their number is whole, lowers the
longest times.
"""

from __future__ import annotations

import math
from bisect import bisect_right

import numpy as np

from canter.planning.budget import Budget

# their multiples modulo 1 spread evenly over [0, 1)
GOLDEN, SILVER = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1
HALVINGS = 40


def mixed_sizes(
    frames: np.ndarray,
    tokens: np.ndarray,
    budget: Budget,
    full: np.ndarray,
    multiple: int,
    least: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the size of each batch as a fraction of a full one: (count,), a multiple of M or `least`.

    frames, tokens: (n,) of a sequence of alike neighbours. full: (n + 1,) full batches before each utterance.
    """
    n, total = len(frames), float(full[-1])
    edges = np.unique(np.searchsorted(full, np.arange(math.ceil(total) + 1)).clip(0, n))
    edges[-1] = n
    t, u = (np.maximum.reduceat(values, edges[:-1]) for values in (frames, tokens))
    seconds = budget.time(t, u) * (budget.limit_bytes - budget.fixed_bytes) / budget.memory(t, u)
    ascending = np.sort(seconds)
    below = np.searchsorted(ascending, seconds, side="left")
    chance = (below / len(seconds)) ** 2
    worth = np.diff(full[edges])

    def batches(longest: float) -> float:
        """Return the expected number of batches of which none takes longer than `longest`."""
        capped = np.minimum(ascending, longest)
        mean_below = np.concatenate([[capped[0]], np.cumsum(capped) / np.arange(1, len(capped) + 1)])[below]
        mean = (1 - chance) * np.minimum(seconds, longest) + chance * np.minimum(mean_below, seconds)
        return float((worth * seconds / mean).sum())

    high = float(ascending[-1])
    count = max(least, multiple * max(1, math.ceil((batches(high) - 0.25) / multiple)))
    low = 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if batches(middle) > count - 0.25 else (low, middle)

    first, second = rng.random(2)
    begins, sizes, done = full[edges].tolist(), np.empty(count), 0.0
    for number in range(count):
        here = min(max(bisect_right(begins, done) - 1, 0), len(seconds) - 1)
        wanted = min(seconds[here], high)
        if (first + number * GOLDEN) % 1 < chance[here]:
            wanted = min(wanted, ascending[int((second + number * SILVER) % 1 * below[here])])
        sizes[number] = wanted / seconds[here]
        done += sizes[number]
    return sizes
