"""Sharing the micro-batches of a step out to any number of ranks."""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np

from canter.errors import PlanError


def share_out(seconds: np.ndarray, ranks: int, most: int | None = None) -> list[list[int]]:
    """Return the micro-batches of each rank: longest first to the rank with the least time so far (Graham 1969).

    seconds: (M,) predicted time of each micro-batch. most: maximum number for a rank, for loops that accumulate a
    fixed number. Every rank computes the same result. Some ranks get none where there are more ranks than
    micro-batches; they run an empty batch of weight zero.
    """
    if ranks < 1:
        raise PlanError(f"ranks is {ranks}; it must be at least 1")
    if most is not None and most * ranks < len(seconds):
        raise PlanError(f"{ranks} ranks of at most {most} cannot take {len(seconds)} micro-batches")
    loads = [(0.0, 0, rank) for rank in range(ranks)]  # on a tie, the rank with fewer micro-batches
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for number in np.argsort(-np.asarray(seconds), kind="stable"):
        load, taken, rank = heapq.heappop(loads)
        shares[rank].append(int(number))
        if most is None or taken + 1 < most:
            heapq.heappush(loads, (load + float(seconds[number]), taken + 1, rank))
    return [sorted(share) for share in shares]


def slowest_rank(seconds: np.ndarray, steps: np.ndarray, ranks: int) -> np.ndarray:
    """Return the slowest rank's seconds of each step, (S,); seconds: (micro-batches,), steps: offsets (S + 1,)."""
    sizes = np.diff(steps)
    if np.all(sizes <= ranks):  # at most one micro-batch a rank
        return np.maximum.reduceat(seconds, steps[:-1]) if len(sizes) else np.empty(0)
    slowest = np.empty(len(sizes))
    for step, (begin, end) in enumerate(pairwise(steps)):
        inside = seconds[begin:end]
        slowest[step] = max(float(inside[share].sum()) for share in share_out(inside, ranks))
    return slowest
