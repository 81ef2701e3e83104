"""The defaults of other data loaders: a fixed batch size, a cap on padded seconds, the cap in 1-D buckets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from canter.errors import PlanError
from canter.planning.bins import Bins, estimate_bins
from canter.planning.budget import Budget
from canter.planning.lengths import Index, Lengths, sample
from canter.planning.strategies.base import Cut, Cutter, Strategy, enough_batches, in_steps, none_usable, shuffled_steps


@dataclass(frozen=True, slots=True)
class Random(Strategy):
    """Shuffled batches of `batch_size` utterances; None is the largest size that fits with any utterances."""

    batch_size: int | None = None
    name: ClassVar[str] = "random"

    def prepare(self, index: Index, budget: Budget, grid: tuple[int, int] = (1, 1)) -> Cutter:
        size = self.batch_size
        if size is None:
            lengths = sample(index, budget, grid)
            longest = (int(lengths.frames.max()), int(lengths.tokens.max())) if len(lengths) else (1, 1)
            size = max(1, budget.max_batch(*longest))
        if size < 1:
            raise PlanError(f"random: batch_size is {size}; it must be at least 1")

        def cut(lengths: Lengths, per_step: int, rng: np.random.Generator, least_steps: int = 1) -> Cut:
            n = len(lengths)

            def form(part: float) -> np.ndarray:
                return np.append(np.arange(0, n, max(1, int(part * size))), n)

            batches = enough_batches(form, n, per_step, least_steps)
            return Cut(np.arange(n), batches, in_steps(len(batches) - 1, per_step))

        return cut


@dataclass(frozen=True, slots=True)
class Duration(Strategy):
    """Batches of at most `max_seconds`: size times the longest effective duration, seconds + seconds^2 / quadratic.

    The bound holds for every batch of two or more utterances; a single utterance that exceeds it is a batch. None is
    360 seconds, or less where the budget holds less of the costliest utterances.
    """

    max_seconds: float | None = None
    quadratic: float | None = None
    name: ClassVar[str] = "duration"

    def prepare(self, index: Index, budget: Budget, grid: tuple[int, int] = (1, 1)) -> Cutter:
        return capped_cutter(seconds_cap(self.max_seconds, index, budget, grid), self.quadratic)


@dataclass(frozen=True, slots=True)
class Bucket1D(Strategy):
    """`Duration` within `buckets` bins of equal audio."""

    buckets: int = 30
    max_seconds: float | None = None
    quadratic: float | None = 30.0
    name: ClassVar[str] = "bucket_1d"

    def prepare(self, index: Index, budget: Budget, grid: tuple[int, int] = (1, 1)) -> Cutter:
        cap = seconds_cap(self.max_seconds, index, budget, grid)
        usable = sample(index, budget, grid)
        if len(usable) == 0:
            return none_usable
        return capped_cutter(cap, self.quadratic, estimate_bins(usable, self.buckets))


def capped_cutter(cap: float, quadratic: float | None, bins: Bins | None = None) -> Cutter:
    """Return a cutter into batches of at most `cap` effective seconds, each from one of the bins."""

    def cut(lengths: Lengths, per_step: int, rng: np.random.Generator, least_steps: int = 1) -> Cut:
        bucket = np.zeros(len(lengths), np.int64) if bins is None else bins.assign(lengths)
        order = np.argsort(bucket, kind="stable")
        effective = lengths.seconds[order].astype(np.float64)
        if quadratic is not None:
            effective += effective**2 / quadratic
        edges = np.flatnonzero(np.diff(bucket[order], prepend=-1, append=1 if bins is None else len(bins)))

        def form(part: float) -> np.ndarray:
            ends = [capped(effective[a:b], part * cap)[1:] + a for a, b in pairwise(edges)]
            return np.concatenate([[0], *ends]).astype(np.int64)

        return shuffled_steps(order, enough_batches(form, len(order), per_step, least_steps), per_step, rng)

    return cut


def seconds_cap(cap: float | None, index: Index, budget: Budget, grid: tuple[int, int]) -> float:
    if cap is None:
        lengths = sample(index, budget, grid)
        if len(lengths) == 0:
            return 360.0
        return float(min(360.0, (lengths.seconds * budget.max_batch(lengths.frames, lengths.tokens)).min()))
    if not cap > 0:
        raise PlanError(f"max_seconds is {cap}; it must be positive")
    return cap


def capped(effective: np.ndarray, cap: float) -> np.ndarray:
    """Return offsets of batches in order, each the largest whose size times its longest duration is within the cap."""
    offsets, start, n = [0], 0, len(effective)
    while start < n:
        guess = int(cap / effective[start]) + 2
        longest = np.maximum.accumulate(effective[start : start + guess])
        fits = np.searchsorted(longest * np.arange(1, len(longest) + 1), cap, side="right")
        while fits == len(longest) and start + len(longest) < n:  # all fitted: try more
            guess *= 2
            longest = np.maximum.accumulate(effective[start : start + guess])
            fits = np.searchsorted(longest * np.arange(1, len(longest) + 1), cap, side="right")
        start += max(1, int(fits))
        offsets.append(start)
    return np.array(offsets, np.int64)
