"""What training on several ranks adds to a step's memory, from the model's shape.

`canter train` sums gradients in flat copies, few at a time ('replicate'), or keeps a share of the optimiser state,
with weights and gradients whole during a step ('shard'). Elsewhere, DDP keeps a second copy of the gradients in its
buckets, unless they are views of them, and FSDP a share of weights, gradients and optimiser state: it gathers the
weights of the unit at work and of the next one, and a unit's gradients are whole until they are scattered.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import nn

from canter.errors import BudgetError
from canter.planning.budget import Budget
from canter.runtime import tensor_bytes

GATHERED = 2  # units whose weights are whole at a time: the one at work and the one fetched ahead
IN_FLIGHT_BYTES = 2 * 64 * 2**20  # of gradients that `canter train` has flat copies of at a time


@dataclass(frozen=True)
class Sharding:
    """How ranks share a model."""

    kind: Literal["none", "replicate", "shard", "ddp", "fsdp"] = "none"
    ranks: int = 1
    bucket_views: bool = False
    """DDP's gradients are views of its buckets (gradient_as_bucket_view)."""

    def __post_init__(self) -> None:
        if self.ranks < 1 or (self.kind in ("shard", "fsdp") and self.ranks < 2):
            raise BudgetError(f"--ranks is {self.ranks}; sharding needs 2 at least, everything else 1")

    def extra_bytes(self, model: nn.Module, state_bytes: float) -> float:
        """Bytes that a rank's step takes beyond those of a single process; negative where sharding saves.

        ``state_bytes`` are weights, buffers and optimiser state of the single process.
        """
        gradients = tensor_bytes(p for p in model.parameters() if p.requires_grad)
        if self.kind == "replicate" and self.ranks > 1:
            return float(min(gradients, IN_FLIGHT_BYTES))
        if self.kind == "ddp" and self.ranks > 1:
            return 0.0 if self.bucket_views else float(gradients)
        if self.kind == "shard":
            weights = tensor_bytes(model.parameters())
            optimizer = state_bytes - weights - tensor_bytes(model.buffers())
            # its own part of the weights beside them whole, and a unit's gradients copied flat to be scattered
            return weights / self.ranks + largest_unit(model) - optimizer * (1 - 1 / self.ranks)
        if self.kind == "fsdp":
            unit = largest_unit(model)
            kept = (state_bytes + gradients) / self.ranks
            return kept + (GATHERED + 1) * unit - state_bytes - gradients
        return 0.0


def largest_unit(model: nn.Module) -> int:
    """Bytes of the largest part that is gathered at once: a layer of a stack, or what belongs to no layer."""
    layers = [
        layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack if len(stack) > 1
    ]
    sizes = [tensor_bytes(layer.parameters()) for layer in layers]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = tensor_bytes(p for p in model.parameters() if id(p) not in inside)
    return max([rest, *sizes])


def with_sharding(budget: Budget, sharding: Sharding, model: nn.Module, state_bytes: float) -> Budget:
    """``budget``, measured in one process, for a rank of several. Raises BudgetError where nothing is left."""
    extra = sharding.extra_bytes(model, state_bytes)
    if sharding.kind == "none":
        return budget
    told = {**budget.measured_on, "sharding": sharding.kind, "ranks": sharding.ranks}
    return dataclasses.replace(budget, fixed_bytes=max(0.0, budget.fixed_bytes + float(int(extra))), measured_on=told)
