"""The interface of the strategies, which take a window's lengths and return its steps, and their common parts."""

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
    """A window divided into steps: two nested ragged arrays.

    order: (n,) positions in the window; micro-batch b is ``order[batches[b]:batches[b + 1]]``, step s the
    micro-batches ``steps[s] .. steps[s + 1] - 1``, at most M of them.
    """

    order: np.ndarray
    batches: np.ndarray
    steps: np.ndarray


# (lengths of the window in shuffled order, M, generator of the window, minimum number of steps) -> its steps
Cutter = Callable[[Lengths, int, np.random.Generator, int], Cut]


class Strategy(Protocol):
    """A named way to batch. Strategies are frozen dataclasses whose fields are the strategy's options."""

    name: ClassVar[str]
    default_window: ClassVar[int | None] = None  # number of utterances; None is the complete epoch
    packed: ClassVar[bool] = False  # micro-batches have no batch axis: see `canter.planning.groups`
    fills_memory: ClassVar[bool] = False  # as far as the utterances allow

    def prepare(self, index: Index, budget: Budget, grid: tuple[int, int]) -> Cutter:
        """Look at the index once (bins, outlier bounds) and return what divides a window into steps.

        The cutter makes at least the number of steps that it is asked for, with smaller batches if necessary, as long
        as there are enough utterances.
        """
        ...

    def tokens_per_second(self, index: Index, budget: Budget) -> float | None:
        """Return the strategy's bound on outliers in tokens per second, if it has one."""
        return None


def nothing() -> Cut:
    return Cut(np.empty(0, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64))


def none_usable(lengths: Lengths, per_step: int, rng: np.random.Generator, least_steps: int = 1) -> Cut:
    """Take the place of a cutter whose bins cannot be estimated. Raises PlanError for a window with utterances."""
    if len(lengths):
        raise PlanError("bins cannot be estimated: hardly an utterance fits the budget; raise its limit")
    return nothing()


def least_batches(per_step: int, steps: int) -> int:
    """Return the minimum number of batches that make `steps` steps: the last step is at least half full.

    With fewer, the last update would have only a few utterances; with more, a rank that takes all micro-batches of a
    step would pay their fixed time more often than necessary.
    """
    return steps * per_step - per_step // 2


def enough_batches(form: Callable[[float], np.ndarray], utterances: int, per_step: int, least_steps: int) -> np.ndarray:
    """Return offsets of the largest batches that make at least `least_steps` steps, or a batch for each utterance.

    form: returns the offsets of batches that are filled to a fraction, from 0 to 1, of the strategy's full batches.
    """
    least = 1 if least_steps == 1 else min(least_batches(per_step, least_steps), utterances)
    batches = form(1.0)
    if len(batches) - 1 >= least:
        return batches
    low, high = 0.0, 1.0  # fractions that make enough batches, and too few
    batches = np.arange(utterances + 1)
    fraction = 0.5
    while high - low > 0.002 * high and high > 1e-9 and len(batches) - 1 > least:
        tried = form(fraction)
        if len(tried) - 1 >= least:
            low, batches = fraction, tried
        else:
            high = fraction
        fraction = (low + high) / 2 if low else high / 4
    return batches


def reorder(order: np.ndarray, batches: np.ndarray, sequence: np.ndarray, steps: np.ndarray) -> Cut:
    """Return the Cut whose micro-batches are those of (order, batches) in another sequence."""
    sizes = np.diff(batches)[sequence]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    take = np.arange(ends[-1]) + np.repeat(batches[:-1][sequence] - ends[:-1], sizes)
    return Cut(order[take], ends, steps)


def in_steps(batches: int, per_step: int) -> np.ndarray:
    """Return offsets of steps of `per_step` micro-batches; the last may have fewer."""
    return np.append(np.arange(0, batches, per_step), batches)


def shuffled_steps(order: np.ndarray, batches: np.ndarray, per_step: int, rng: np.random.Generator) -> Cut:
    """Return the micro-batches in random sequence, M to a step."""
    count = len(batches) - 1
    return reorder(order, batches, rng.permutation(count), in_steps(count, per_step))


def maxima(values: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Return the maximum of each segment, (batches,)."""
    return np.maximum.reduceat(values, batches[:-1]) if len(batches) > 1 else values[:0]
