"""Bucket edges of equal audio, of equal audio and tokens, and of least expected padding by dynamic programming.

The first two are those of Zelasko et al. 2025, section 3.1: 1-D bins hold equal sums of seconds; 2-D bins divide
each of them into sub-bins of equal sums of tokens, after outliers in tokens per second are set aside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from canter.errors import PlanError
from canter.planning.budget import Budget
from canter.planning.lengths import GivenLimits, Index, Lengths, RateLimits, rate_limit_at, sample

BUCKETS = 30
"""Buckets of duration, as in the paper's recipe."""
Z_SCORE = 4.0
"""Standard deviations above the mean beyond which tokens per second are an outlier; NeMo's default."""
MIN_UTTERANCES = 50
"""Utterances of a bucket from which on its own mean and deviation are used."""


@dataclass(frozen=True, slots=True)
class Bins:
    """Buckets of durations up to `seconds[i]` and tokens up to `tokens[i][j]` (upper edges, inclusive).

    Bins with one sub-bin a row are 1-D.
    """

    seconds: np.ndarray  # (R,) float64, ascending
    tokens: tuple[np.ndarray, ...]  # R arrays of int64, ascending

    def __len__(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def edges(self) -> list[tuple[float, int]]:
        """(seconds, tokens) upper edges of every bucket, in order."""
        return [(float(s), int(u)) for s, row in zip(self.seconds, self.tokens) for u in row]

    def assign(self, lengths: Lengths) -> np.ndarray:
        """Return the bucket of each utterance, (n,) int64; beyond the last edge it is the last bucket of its row."""
        row = np.minimum(np.searchsorted(self.seconds, lengths.seconds), len(self.seconds) - 1)
        first = np.concatenate([[0], np.cumsum([len(t) for t in self.tokens])])
        bucket = np.empty(len(lengths), np.int64)
        for i, edges in enumerate(self.tokens):
            here = np.flatnonzero(row == i)
            bucket[here] = first[i] + np.minimum(np.searchsorted(edges, lengths.tokens[here]), len(edges) - 1)
        return bucket


def tokens_per_second_bound(lengths: Lengths, z_score: float = 3.0) -> float:
    """Return the bound on tokens per second beyond which an utterance is an outlier: mean + `z_score` x deviation."""
    rate = lengths.tokens / lengths.seconds
    return float(rate.mean() + z_score * rate.std())


def outlier_limits(lengths: Lengths, rows: int = BUCKETS, z_score: float = Z_SCORE) -> RateLimits:
    """Return a limit on tokens per second for each of ``rows`` buckets of equal audio, as (upper edge, limit) pairs.

    The limit of a bucket is the mean + ``z_score`` x standard deviation of its utterances, as NeMo's
    ``estimate_duration_bins_2d.py`` sets aside outliers. Buckets of fewer than 50 utterances count those that are
    nearest in duration too.
    """
    ordered = lengths.take(np.argsort(lengths.seconds, kind="stable"))
    edges = equal_sums(ordered.seconds.astype(np.float64), rows)
    ends = np.searchsorted(ordered.seconds, edges, side="right")
    found, begin = [], 0
    for edge, end in zip(edges.tolist(), ends.tolist()):
        first = max(0, min(begin, (begin + end - MIN_UTTERANCES) // 2))
        first = min(first, max(0, len(ordered) - MIN_UTTERANCES))
        inside = ordered.take(np.arange(min(begin, first), min(len(ordered), max(end, first + MIN_UTTERANCES))))
        found.append((edge, tokens_per_second_bound(inside, z_score)))
        begin = end
    return tuple(found)


def resolve_limits(given: GivenLimits, index: Index, budget: Budget) -> RateLimits:
    """Return limits on tokens per second, "auto" being those of `outlier_limits` for the index.

    Raises PlanError where no utterance of the index can be used.
    """
    if given != "auto":
        return given
    lengths = sample(index, budget)
    if len(lengths) == 0:
        raise PlanError("limits on tokens per second cannot be estimated: no utterance of the index can be used")
    return outlier_limits(lengths)


def describe_limits(limits: RateLimits) -> str:
    """Return the range of limits in words."""
    if not isinstance(limits, tuple):
        return "no limit" if limits is None else f"{limits:.1f} tokens/s"
    values = [limit for _, limit in limits]
    return f"{min(values):.1f} to {max(values):.1f} tokens/s in {len(limits)} buckets of duration"


def equal_sums(values: np.ndarray, bins: int) -> np.ndarray:
    """Return upper edges that divide the sum of `values` into `bins` equal parts; fewer where values repeat."""
    values = np.sort(values)
    total = np.cumsum(values, dtype=np.float64)
    at = np.searchsorted(total, total[-1] * np.arange(1, bins) / bins) if total[-1] > 0 else []
    return np.unique(np.append(values[np.asarray(at, np.int64)], values[-1]))


def estimate_bins(lengths: Lengths, rows: int, columns: int = 1, limits: RateLimits = None) -> Bins:
    """Return `rows` bins of equal audio, each divided into `columns` bins of equal tokens.

    Utterances above `limits` in tokens per second do not count for the edges in tokens.
    """
    if len(lengths) == 0:
        raise PlanError("bins cannot be estimated: no utterance of the index can be used")
    if rows < 1 or columns < 1:
        raise PlanError(f"bins {rows}x{columns}: both numbers must be at least 1")
    seconds = equal_sums(lengths.seconds.astype(np.float64), rows)
    row = np.searchsorted(seconds, lengths.seconds)
    usual = lengths.tokens <= lengths.seconds * rate_limit_at(lengths.seconds, limits)
    inside = ((row == i) & usual if (usual & (row == i)).any() else row == i for i in range(len(seconds)))
    return Bins(seconds, tuple(equal_sums(lengths.tokens[some], columns) for some in inside))


def optimal_bins(lengths: Lengths, budget: Budget, rows: int, columns: int = 1, resolution: int = 400) -> Bins:
    """Return bins of least expected padded cost: dynamic programming over duration edges, then over token edges.

    The cost of a bin is its count times the seconds of one utterance padded to the bin's corner. Candidate edges
    are `resolution` quantiles of the durations (and of the tokens inside a row).
    """
    if len(lengths) == 0:
        raise PlanError("bins cannot be estimated: no utterance of the index can be used")
    order = np.argsort(lengths.seconds, kind="stable")
    sorted_ = lengths.take(order)
    ends = _candidates(sorted_.seconds, resolution)
    typical = np.maximum.accumulate(np.array([np.median(sorted_.tokens[max(0, e - 2000) : e]) for e in ends]))
    corner = budget.utterance_seconds(sorted_.frames[ends - 1], typical)
    chosen = _least_cost(ends, corner, rows)
    tokens = []
    for begin, end in zip(np.concatenate([[0], chosen[:-1]]), chosen):
        inside = np.sort(sorted_.tokens[begin:end])
        cuts = _candidates(inside, resolution)
        cost = budget.utterance_seconds(sorted_.frames[end - 1], inside[cuts - 1])
        tokens.append(inside[_least_cost(cuts, cost, columns) - 1])
    return Bins(sorted_.seconds[chosen - 1].astype(np.float64), tuple(tokens))


def _candidates(values: np.ndarray, resolution: int) -> np.ndarray:
    """Return the ends of runs of equal values nearest to quantiles of sorted `values`; the last is len(values)."""
    at = np.unique(np.ceil(np.linspace(0, len(values), resolution + 1)[1:]).astype(np.int64))
    return np.unique(np.searchsorted(values, values[at - 1], side="right"))


def _least_cost(ends: np.ndarray, corner: np.ndarray, bins: int) -> np.ndarray:
    """Return at most `bins` of the `ends`, the last one included, with the least sum of count x corner cost."""
    starts = np.concatenate([[0], ends[:-1]])
    cost = (ends[None, :] - starts[:, None]) * corner[None, :]  # from candidate i through candidate j
    cost[np.tril_indices(len(ends), -1)] = np.inf
    best, choice = cost[0], []
    for _ in range(min(bins, len(ends)) - 1):
        through = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        through[0] = cost[0]  # fewer bins are allowed
        choice.append(np.argmin(through, axis=0))
        best = through.min(axis=0)
    at, picked = len(ends) - 1, [len(ends) - 1]
    for step in reversed(choice):
        begin = step[at]
        if begin == 0:
            break
        at = begin - 1
        picked.append(at)
    return ends[np.array(picked[::-1])]
