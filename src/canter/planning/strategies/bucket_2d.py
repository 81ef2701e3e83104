"""2-D bucketing with a batch size for each bucket (Zelasko et al. 2025): the published state of the art."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from canter.planning.bins import BUCKETS, Bins, estimate_bins, optimal_bins, tokens_per_second_bound
from canter.planning.budget import Budget
from canter.planning.lengths import Index, Lengths, RateLimits, rate_limit_at, sample
from canter.planning.strategies.base import (
    Cut,
    Cutter,
    Strategy,
    enough_batches,
    in_steps,
    none_usable,
    nothing,
    reorder,
)


@dataclass(frozen=True, slots=True)
class Bucket2D(Strategy):
    """`buckets` bins of equal audio, each in `sub_buckets` of equal tokens, with batch sizes by the budget.

    synchronised: the micro-batches of a step come from one bucket, so that ranks take equally long.
    optimal: place the edges by dynamic programming instead of by equal sums.
    z_score: leave out utterances whose tokens per second are this many standard deviations above the mean.
    """

    buckets: int = BUCKETS
    sub_buckets: int = 2
    synchronised: bool = True
    optimal: bool = False
    z_score: float | None = None
    name: ClassVar[str] = "bucket_2d"

    def tokens_per_second(self, index: Index, budget: Budget) -> float | None:
        if self.z_score is None:
            return None
        return tokens_per_second_bound(sample(index, budget), self.z_score)

    def bins(self, index: Index, budget: Budget, grid: tuple[int, int] = (1, 1), limits: RateLimits = None) -> Bins:
        """Estimate the bins of an index, whose utterances above ``limits`` in tokens per second are left out.

        Raises PlanError where no utterance can be used.
        """
        lengths = sample(index, budget, grid)
        if self.optimal:
            usual = lengths.tokens <= lengths.seconds * rate_limit_at(lengths.seconds, limits)
            return optimal_bins(lengths.take(np.flatnonzero(usual)), budget, self.buckets, self.sub_buckets)
        return estimate_bins(lengths, self.buckets, self.sub_buckets, limits)

    def prepare(self, index: Index, budget: Budget, grid: tuple[int, int] = (1, 1)) -> Cutter:
        if len(sample(index, budget, grid)) == 0:
            return none_usable
        bins = self.bins(index, budget, grid)
        sizes = batch_sizes(bins, budget)

        def cut(lengths: Lengths, per_step: int, rng: np.random.Generator, least_steps: int = 1) -> Cut:
            if len(lengths) == 0:
                return nothing()
            bucket = bins.assign(lengths)
            order = np.argsort(bucket, kind="stable")
            # the last bucket of a row also takes utterances beyond its corner: their batches must fit too
            count = np.bincount(bucket, minlength=len(bins))
            first = np.concatenate([[0], np.cumsum(count)])
            used = np.flatnonzero(count)
            corners = (np.maximum.reduceat(values[order], first[used]) for values in (lengths.frames, lengths.tokens))
            most = np.minimum(sizes[used], budget.max_batch(*corners))

            def form(part: float) -> np.ndarray:
                size = np.maximum(1, (part * most).astype(np.int64))
                starts = [np.arange(first[b], first[b + 1], n) for b, n in zip(used, size)]
                return np.append(np.concatenate(starts), len(order))

            batches = enough_batches(form, len(order), per_step, least_steps)
            return bucket_steps(order, batches, bucket[order[batches[:-1]]], per_step, self.synchronised, rng)

        return cut


def batch_sizes(bins: Bins, budget: Budget) -> np.ndarray:
    """Return the largest batch of each bucket that fits when padded to its corner, (buckets,), at least 1."""
    edges = np.array(bins.edges)
    return np.maximum(1, budget.max_batch(budget.frames(edges[:, 0]), edges[:, 1].astype(np.int64)))


def bucket_steps(
    order: np.ndarray,
    batches: np.ndarray,
    owner: np.ndarray,
    per_step: int,
    synchronised: bool,
    rng: np.random.Generator,
) -> Cut:
    """Return steps in random sequence. Synchronised steps have one bucket; the remainders of buckets share steps."""
    shuffled = rng.permutation(len(owner))
    if not synchronised or per_step == 1:
        return reorder(order, batches, shuffled, in_steps(len(owner), per_step))
    shuffled = shuffled[np.argsort(owner[shuffled], kind="stable")]
    place = np.arange(len(owner)) - np.searchsorted(owner[shuffled], owner[shuffled])
    total = np.bincount(owner)[owner[shuffled]]
    complete = place < total // per_step * per_step
    full = shuffled[complete].reshape(-1, per_step)
    remainder = shuffled[~complete]
    tail = remainder[len(remainder) // per_step * per_step :]
    full = np.concatenate([full, remainder[: len(remainder) - len(tail)].reshape(-1, per_step)])
    full = full[rng.permutation(len(full))]
    return reorder(order, batches, np.concatenate([full.ravel(), tail]), in_steps(len(owner), per_step))
