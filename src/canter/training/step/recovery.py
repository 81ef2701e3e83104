"""What is done about a micro-batch that does not fit in memory, and what the plan learns from it."""

import dataclasses
from dataclasses import dataclass

import torch

from canter.models.norm import MaskedBatchNorm


@dataclass(frozen=True)
class Cut:
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


def cut_more(model: torch.nn.Module, number: int, before: Cut | None) -> Cut:
    """The next smaller way to compute a micro-batch.

    Cutting in two gives the same gradient unless BatchNorm takes its statistics of all utterances at once. Then the
    encoder first stays in one piece, with its layers computed again in the backward pass (a fraction of the memory, a
    third more time), and only decoder and heads are cut; where that does not fit either, halves of their own follow.
    """
    if before is None:
        if any(isinstance(module, MaskedBatchNorm) and module.training for module in model.modules()):
            return Cut(number, 1, 2, True)
        return Cut(number, 2, 1, False)
    return Cut(number, 2 * before.parts, before.decoder_parts, True)
