"""Packed micro-batches of utterances in shuffled order: no padding outside groups of like length, and no sorting.

A packed micro-batch has no batch axis (`canter.planning.groups`), so any utterances may share one, and its cost hardly
depends on which. The shuffled window is divided into runs of equal predicted time, as few as the memory allows. Steps
take runs of the same time, so that ranks wait for none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from canter.planning.budget import Budget
from canter.planning.groups import packed_terms
from canter.planning.lengths import Index, Lengths
from canter.planning.strategies.base import Cut, Cutter, Strategy, in_steps, least_batches, nothing, reorder

# factors on the mean time of the runs that are left: larger ones fill the memory early and leave room for the last runs
EARLY = (1.003, 1.03, 1.1)


@dataclass(frozen=True, slots=True)
class Packed(Strategy):
    """Packed micro-batches of shuffled utterances that fill the budget and are equal in predicted time.

    They must be trained without padding, as `canter train` does: padded they take several times the memory.
    """

    name: ClassVar[str] = "packed"
    packed: ClassVar[bool] = True
    fills_memory: ClassVar[bool] = True

    def prepare(self, index: Index, budget: Budget, grid: tuple[int, int] = (1, 1)) -> Cutter:
        def cut(lengths: Lengths, per_step: int, rng: np.random.Generator, least_steps: int = 1) -> Cut:
            if len(lengths) == 0:
                return nothing()
            batches, seconds = equal_runs(lengths, budget, per_step, least_batches(per_step, least_steps))
            return steps_of_equal_time(batches, seconds, per_step, rng)

        return cut


def equal_runs(lengths: Lengths, budget: Budget, multiple: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets of the fewest runs of about equal predicted time, and the seconds of each.

    Their number is a multiple of M, or ``least`` where fewer would do. No run of two or more utterances is over the
    budget. Where there are fewer utterances than runs, each is a run.
    """
    n = len(lengths)
    count = len(divided(lengths, budget, 1, math.inf)[1])
    count = max(least, math.ceil(count / multiple) * multiple)
    while True:
        for early in EARLY:
            batches, seconds = divided(lengths, budget, min(count, n), early)
            if len(seconds) <= count:
                return batches, seconds
        count = (count // multiple + 1) * multiple


def divided(lengths: Lengths, budget: Budget, count: int, early: float) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets of ``count`` runs, or more where these do not fit the memory, and the seconds of each.

    A run ends where its utterances take ``early`` times the mean of the runs left, or where the memory is full.
    """
    frames, tokens, n, room = lengths.frames, lengths.tokens, len(lengths), budget.room_bytes
    time, memory = (np.concatenate([[0.0], np.cumsum(cost(frames, tokens))]) for cost in (budget.time, budget.memory))
    offsets, found, start, padding = [0], [], 0, 1.0
    while start < n:
        left = max(1, count - len(found))
        last = n - left + 1  # leave an utterance for each run to come
        if left > 1 or early == math.inf:
            last = min(last, _nearest(time, time[start] + early * (time[n] - time[start]) / left))
        last = max(start + 1, min(last, _before(memory, memory[start] + room)))
        end = max(start + 1, min(last, _before(memory, memory[start] + room / padding)))
        fits, over, kept = start, last + 1, np.zeros(5, np.int64)
        while True:
            terms = packed_terms(frames[start:end], tokens[start:end])
            used = float(budget.memory.of_terms(terms))
            if used <= room or end == start + 1:
                fits, kept = end, terms
            else:
                over = end
            padding = used / (memory[end] - memory[start])
            end = min(_before(memory, memory[start] + room / padding), over - 1)
            if fits > start and end <= fits:
                break
            end = max(end, fits + 1)
        found.append(kept)
        offsets.append(fits)
        start = fits
    return np.array(offsets), budget.seconds_of_terms(np.array(found))


def _before(ascending: np.ndarray, value: float) -> int:
    """Return the position of the last element that is not above the value."""
    return int(ascending.searchsorted(value, "right")) - 1


def _nearest(ascending: np.ndarray, value: float) -> int:
    """Return the position of the element nearest to the value."""
    at = _before(ascending, value)
    return at + (at + 1 < len(ascending) and ascending[at + 1] - value < value - ascending[at])


def steps_of_equal_time(batches: np.ndarray, seconds: np.ndarray, per_step: int, rng: np.random.Generator) -> Cut:
    """Return steps of M micro-batches of nearly the same time, in random sequence; an incomplete one comes last."""
    count = len(seconds)
    quickest, by_time = np.split(np.argsort(seconds, kind="stable"), [count % per_step])
    table = by_time.reshape(-1, per_step)
    sequence = np.concatenate([table[rng.permutation(len(table))].ravel(), quickest])
    return reorder(np.arange(batches[-1]), batches, sequence, in_steps(count, per_step))
