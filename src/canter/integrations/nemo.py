"""Bins and batch sizes in the form of NeMo's Lhotse dataloader configuration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from canter.planning.bins import Bins
from canter.planning.budget import Budget
from canter.planning.lengths import RateLimits, rate_limit_at
from canter.planning.strategies.bucket_2d import batch_sizes


def bucketing_config(bins: Bins, budget: Budget, sizes: Sequence[int] | None = None, limits: RateLimits = None) -> str:
    """Return lines of YAML for `train_ds`: `bucket_duration_bins`, `bucket_batch_size` and, with ``limits``, `max_tps`.

    The bins are upper edges, [seconds, tokens] or only seconds for 1-D bins. The batch sizes are ``sizes``, or else
    the budget's. `max_tps` has a limit in tokens per second for each bin, equal in the sub-bins of a duration, as NeMo
    writes them.
    """
    two_d = any(len(row) > 1 for row in bins.tokens)
    # three decimals, rounded up: an edge belongs to its bin
    edges = [(-(-seconds * 1000 // 1) / 1000, tokens) for seconds, tokens in bins.edges]
    shown = [f"[{s:g},{u}]" if two_d else f"{s:g}" for s, u in edges]
    batches = ",".join(str(int(size)) for size in (batch_sizes(bins, budget) if sizes is None else sizes))
    rates = ""
    if limits is not None:
        at = np.broadcast_to(rate_limit_at(np.array([seconds for seconds, _ in bins.edges]), limits), len(bins))
        # one decimal, rounded up: a limit includes what is as fast
        rates = f"\nmax_tps: [{','.join(f'{-(-limit * 10 // 1) / 10:g}' for limit in at.tolist())}]"
    return (
        f"use_bucketing: true\nuse_lhotse: true\nbatch_duration: null\nnum_buckets: {len(bins)}\n"
        f"bucket_duration_bins: [{','.join(shown)}]\nbucket_batch_size: [{batches}]{rates}"
    )
