"""Smaller batches after a micro-batch ran out of memory."""

import dataclasses

import numpy as np

from canter.planning.budget import Budget
from canter.planning.lengths import Index, exclusions
from canter.planning.lengths import Lengths as PlanLengths

TIGHTER = 0.9  # new limit, as a fraction of what the micro-batch would have used


def tightened(budget: Budget, index: Index, limits: list[float]) -> Budget:
    """Return ``budget`` with the lowest of these limits in bytes, but high enough for every utterance that fitted."""
    if not limits:
        return budget
    lengths = PlanLengths.of(index, slice(None), budget)
    usable = exclusions(lengths, budget, None) == 0
    alone = budget.bytes(1, lengths.frames[usable], lengths.tokens[usable])
    least = float(np.max(alone)) if usable.any() else budget.limit_bytes
    return dataclasses.replace(budget, limit_bytes=min(budget.limit_bytes, max(min(limits), least)))


def next_limit(budget: Budget, needed: float) -> float:
    """Return the limit for later micro-batches after one of ``needed`` predicted bytes did not fit."""
    return budget.fixed_bytes + TIGHTER * (min(needed, budget.limit_bytes) - budget.fixed_bytes)
