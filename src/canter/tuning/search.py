"""OOMptimizer (Zelasko et al. 2025, section 3.2): the largest batch of each bucket, found by running out of memory.

Buckets are taken longest first. Each starts from its neighbour's answer, which is doubled until a step does not fit (or
halved until one does); bisection then closes the gap to 5 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from canter.errors import BudgetError
from canter.planning.bins import Bins
from canter.planning.budget import Budget
from canter.tuning.fit import fit, with_limit
from canter.tuning.probe import Prober, gib

GAP = 0.05  # between the largest batch that fits and the smallest that does not, relative to the latter
FIRST = 32  # utterances, of the first bucket


@dataclass(frozen=True)
class Found:
    """Batch sizes by bucket, in the bins' order."""

    bins: Bins
    sizes: np.ndarray  # (buckets,) int64; 0 where not even one utterance fits
    steps: int
    out_of_memory: int


def search(
    prober: Prober,
    bins: Bins,
    frame_seconds: float,
    *,
    first: int = FIRST,
    most_batch: int = 4096,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """The largest batch of each of ``bins`` that fits when padded to its corner, to within 5 %.

    Every step runs under the cap. Sizes stop at ``most_batch``. Raises BudgetError where no bucket can hold one
    utterance.
    """
    edges = bins.edges
    corners = [(max(1, int(np.ceil(np.float64(s) / frame_seconds))), max(2, u)) for s, u in edges]
    order = sorted(range(len(corners)), key=lambda i: corners[i], reverse=True)
    sizes, neighbour = np.zeros(len(corners), np.int64), first
    shortest = corners[order[-1]]
    prober.warm_up(1, *shortest)
    for done, bucket in enumerate(order, 1):
        sizes[bucket] = _largest(prober, *corners[bucket], neighbour, most_batch)
        neighbour = max(1, int(sizes[bucket]))
        told(done, len(order))
    if not sizes.any():
        asked = prober(1, *shortest).bytes
        raise BudgetError(
            f"not one bucket can hold an utterance: the shortest, {shortest[0] * frame_seconds:.1f} s and "
            f"{shortest[1]} tokens, asked for {gib(asked)} of {gib(prober.limit_bytes)}; raise the limit"
        )
    return Found(bins, sizes, prober.steps, prober.out_of_memory)


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


def budget_of(prober: Prober, found: Found, frame_seconds: float) -> Budget:
    """What the search's steps tell of costs, as a budget; the batch sizes that it found are in ``measured_on``."""
    buckets = [[s, u, int(size)] for (s, u), size in zip(found.bins.edges, found.sizes, strict=True)]
    told = {
        **prober.measured_on,
        "method": "search",
        "probes": found.steps,
        "out_of_memory": found.out_of_memory,
        "buckets": buckets,
    }
    budget = fit(prober.probes, prober.limit_bytes, frame_seconds, told, prober.step.state_bytes)
    return with_limit(budget, budget.limit_bytes, dict(budget.measured_on))
