"""One interface for all strategies: a window's lengths in, its steps out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from canter.errors import PlanError
from canter.planning.budget import Budget
from canter.planning.lengths import Index, Lengths


@dataclass(frozen=True, slots=True)
class Cut:
    """A window cut into steps: two nested ragged arrays.

    order: (n,) positions in the window; micro-batch b is ``order[batches[b]:batches[b + 1]]``, step s the
    micro-batches ``steps[s] .. steps[s + 1] - 1``, at most M of them.
    """

    order: np.ndarray
    batches: np.ndarray
    steps: np.ndarray

    def batch(self, number: int) -> np.ndarray:
        return self.order[self.batches[number] : self.batches[number + 1]]


# (lengths of the window in shuffled order, M, generator of the window, least number of steps) -> its steps
Cutter = Callable[[Lengths, int, np.random.Generator, int], Cut]


class Strategy(Protocol):
    """A named way to batch. Frozen dataclasses: their fields are the strategy's options."""

    name: ClassVar[str]
    default_window: ClassVar[int | None]  # utterances; None is the whole epoch

    def prepare(self, index: Index, budget: Budget, grid: tuple[int, int]) -> Cutter:
        """Look at the index once (bins, outlier bounds) and return what cuts a window.

        The cutter makes at least the number of steps that it is asked for, with smaller batches where need be, as
        long as there are utterances enough.
        """
        ...

    def tokens_per_second(self, index: Index, budget: Budget) -> float | None:
        """The outlier bound this strategy asks for, if any."""
        ...


def nothing() -> Cut:
    return Cut(np.empty(0, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64))


def none_usable(lengths: Lengths, per_step: int, rng: np.random.Generator, least_steps: int = 1) -> Cut:
    """Cutter of an index whose sample has not one usable utterance, from which bins could be estimated."""
    if len(lengths):
        raise PlanError("bins cannot be estimated: hardly an utterance fits the budget; raise its limit")
    return nothing()


def least_batches(per_step: int, steps: int) -> int:
    """Return the least number of batches that make so many steps: the last one is at least half full.

    With fewer the last update would be one of a few utterances; with more, a rank that takes all micro-batches of a
    step would pay their fixed time more often than it need.
    """
    return steps * per_step - per_step // 2


def enough_batches(form: Callable[[float], np.ndarray], utterances: int, per_step: int, least_steps: int) -> np.ndarray:
    """Return offsets of the largest batches that make at least `least_steps` steps, or a batch for each utterance.

    form: makes the offsets of batches that are filled to a share, from 0 to 1, of what the strategy fills them to.
    """
    least = 1 if least_steps == 1 else min(least_batches(per_step, least_steps), utterances)
    batches = form(1.0)
    if len(batches) - 1 >= least:
        return batches
    low, high = 0.0, 1.0  # shares that make enough batches, and too few
    batches = np.arange(utterances + 1)
    share = 0.5
    while high - low > 0.002 * high and high > 1e-9 and len(batches) - 1 > least:
        tried = form(share)
        if len(tried) - 1 >= least:
            low, batches = share, tried
        else:
            high = share
        share = (low + high) / 2 if low else high / 4
    return batches


def reorder(order: np.ndarray, batches: np.ndarray, sequence: np.ndarray, steps: np.ndarray) -> Cut:
    """The Cut whose micro-batches are those of (order, batches) in another sequence."""
    sizes = np.diff(batches)[sequence]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    take = np.arange(ends[-1]) + np.repeat(batches[:-1][sequence] - ends[:-1], sizes)
    return Cut(order[take], ends, steps)


def in_steps(batches: int, per_step: int) -> np.ndarray:
    """Offsets of steps of `per_step` micro-batches; the last may have fewer."""
    return np.append(np.arange(0, batches, per_step), batches)


def shuffled_steps(order: np.ndarray, batches: np.ndarray, per_step: int, rng: np.random.Generator) -> Cut:
    """Micro-batches in random sequence, M to a step."""
    count = len(batches) - 1
    return reorder(order, batches, rng.permutation(count), in_steps(count, per_step))


def maxima(values: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """(batches,) maximum of each segment."""
    return np.maximum.reduceat(values, batches[:-1]) if len(batches) > 1 else values[:0]
