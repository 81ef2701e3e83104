"""What is done about a micro-batch that does not fit in memory, and what the plan learns from it."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from canter.models.norm import MaskedBatchNorm
from canter.planning.budget import Budget
from canter.planning.lengths import Index, exclusions
from canter.planning.lengths import Lengths as PlanLengths

TIGHTER = 0.9  # of what a micro-batch would have used, the limit of those to come


@dataclass(frozen=True)
class SplitMicroBatch:
    """A micro-batch that ran out of memory, and how it is computed instead."""

    number: int
    """Its place in the step."""
    parts: int
    """Pieces that go through the encoder one after the other."""
    decoder_parts: int
    """Pieces that each of these goes through decoder and CTC head in."""
    recompute: bool
    """Whether layers are computed again in the backward pass instead of kept."""

    def as_json(self) -> dict[str, int | bool]:
        return dataclasses.asdict(self)


def split_more(model: torch.nn.Module, number: int, before: SplitMicroBatch | None) -> SplitMicroBatch:
    """The next smaller way to compute a micro-batch.

    Cutting in two gives the same gradient unless BatchNorm takes its statistics of all utterances at once. Then the
    encoder first stays in one piece, with its layers computed again in the backward pass (a fraction of the memory, a
    third more time), and only decoder and heads are cut; where that does not fit either, halves of their own follow.
    """
    if before is None:
        if any(isinstance(module, MaskedBatchNorm) and module.training for module in model.modules()):
            return SplitMicroBatch(number, 1, 2, True)
        return SplitMicroBatch(number, 2, 1, False)
    return SplitMicroBatch(number, 2 * before.parts, before.decoder_parts, True)


def tightened(budget: Budget, index: Index, limits: list[float]) -> Budget:
    """``budget`` with the lowest of these limits in bytes, but never so low that an utterance which fitted is left
    out."""
    if not limits:
        return budget
    lengths = PlanLengths.of(index, slice(None), budget)
    usable = exclusions(lengths, budget, None) == 0
    alone = budget.bytes(1, lengths.frames[usable], lengths.tokens[usable])
    least = float(np.max(alone)) if usable.any() else budget.limit_bytes
    return dataclasses.replace(budget, limit_bytes=min(budget.limit_bytes, max(min(limits), least)))


def next_limit(budget: Budget, needed: float) -> float:
    """The limit that a micro-batch of ``needed`` predicted bytes teaches, which did not fit."""
    return budget.fixed_bytes + TIGHTER * (min(needed, budget.limit_bytes) - budget.fixed_bytes)
