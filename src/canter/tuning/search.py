"""OOMptimizer (Żelasko et al. 2025, section 3.2): the largest batch of each bucket, found by running out of memory.

Buckets are taken longest first. Each starts from the result of its neighbour, which is doubled until a step does not
fit (or halved until one does); bisection then closes the gap to 5 %.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from canter.errors import BudgetError
from canter.planning.bins import Bins
from canter.planning.budget import Budget
from canter.runtime import gib
from canter.tuning.fit import fit
from canter.tuning.probe import Prober

GAP = 0.05  # between the largest batch that fits and the smallest that does not, relative to the latter
FIRST = 32  # utterances of the first batch of the first bucket


@dataclass(frozen=True)
class BucketSizes:
    """Batch sizes by bucket, in the order of the bins."""

    bins: Bins
    sizes: np.ndarray  # (buckets,) int64; 0 where not even one utterance fits
    steps: int
    out_of_memory: int


def search(prober: Prober, bins: Bins, *, first: int = FIRST, most_batch: int = 4096) -> BucketSizes:
    """Find the largest batch of each of ``bins`` that fits when padded to its corner, to within 5 %.

    Every step runs under the cap. Sizes stop at ``most_batch``. Raises BudgetError if no bucket can hold one utterance.
    """
    frame_seconds = prober.step.frame_seconds
    corners = [(max(1, int(np.ceil(np.float64(s) / frame_seconds))), max(2, u)) for s, u in bins.edges]
    order = sorted(range(len(corners)), key=lambda i: corners[i], reverse=True)
    sizes, neighbour = np.zeros(len(corners), np.int64), first
    shortest = corners[order[-1]]
    prober.warm_up(1, *shortest)
    for bucket in prober.events.progress(order, "measuring"):
        sizes[bucket] = _largest(prober, *corners[bucket], neighbour, most_batch)
        neighbour = max(1, int(sizes[bucket]))
    if not sizes.any():
        asked = prober(1, *shortest).bytes
        raise BudgetError(
            f"not one bucket can hold an utterance: the shortest, {shortest[0] * frame_seconds:.1f} s and "
            f"{shortest[1]} tokens, asked for {gib(asked)} of {gib(prober.limit_bytes)}; raise the limit"
        )
    return BucketSizes(bins, sizes, prober.steps, prober.out_of_memory)


def _largest(prober: Prober, frames: int, tokens: int, start: int, most: int) -> int:
    fits, breaks, batch = 0, most + 1, min(max(1, start), most)
    while breaks - fits > 1 and (not fits or breaks > most or (breaks - fits) / breaks > GAP):
        if prober(batch, frames, tokens).fits:
            fits = batch
        else:
            breaks = batch
        if breaks > most:
            batch = min(2 * fits, most)
        elif not fits:
            batch = max(1, breaks // 2)
        else:
            batch = (fits + breaks) // 2
    return fits


def budget_of(prober: Prober, found: BucketSizes) -> Budget:
    """Return the budget that explains the steps of a search; ``measured_on`` holds the batch sizes that it found."""
    buckets = [[s, u, int(size)] for (s, u), size in zip(found.bins.edges, found.sizes, strict=True)]
    measured_on = {
        **prober.measured_on,
        "method": "search",
        "probes": found.steps,
        "out_of_memory": found.out_of_memory,
        "buckets": buckets,
    }
    state = prober.step.state_bytes
    budget = fit(prober.probes, prober.limit_bytes, prober.step.frame_seconds, measured_on, state)
    return dataclasses.replace(budget, limit_bytes=float(int(budget.limit_bytes)))
