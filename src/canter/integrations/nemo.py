"""Bins and batch sizes in the form that NeMo's Lhotse dataloader configuration wants."""

from __future__ import annotations

from collections.abc import Sequence

from canter.planning.bins import Bins
from canter.planning.budget import Budget
from canter.planning.strategies.bucket_2d import batch_sizes


def bucketing_config(bins: Bins, budget: Budget, sizes: Sequence[int] | None = None) -> str:
    """Lines of YAML for `train_ds`: `bucket_duration_bins` ([seconds, tokens] upper edges, or seconds alone for 1-D
    bins) and `bucket_batch_size`, one for each bin: ``sizes``, or what the budget says."""
    two_d = any(len(row) > 1 for row in bins.tokens)
    # three decimals, rounded up: an edge belongs to its bin
    edges = [(-(-seconds * 1000 // 1) / 1000, tokens) for seconds, tokens in bins.edges]
    shown = [f"[{s:g},{u}]" if two_d else f"{s:g}" for s, u in edges]
    batches = ",".join(str(int(size)) for size in (batch_sizes(bins, budget) if sizes is None else sizes))
    return (
        f"use_bucketing: true\nuse_lhotse: true\nbatch_duration: null\nnum_buckets: {len(bins)}\n"
        f"bucket_duration_bins: [{','.join(shown)}]\nbucket_batch_size: [{batches}]"
    )
