"""Arithmetic in bf16 beside weights in float32: cast once a step, where autocast casts at every layer and casts norms'
outputs back and forth."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from canter.models.protocol import AnyModel, module_of


class Bf16Weights:
    """A context in which a model's parameters are copies in bf16; on leaving it they are what they were, with the
    gradients that ``collect`` summed in float32 (FSDP's MixedPrecisionPolicy does the same)."""

    def __init__(self, model: nn.Module):
        self.parameters = list(model.parameters())
        self.whole: list[Tensor] = []
        self.half: list[Tensor] = []  # kept: with a thousand parameters, making them anew takes a GPU's time
        self.sums: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> "Bf16Weights":
        self.whole = [parameter.data for parameter in self.parameters]
        self.half = self.half or [torch.empty_like(weight, dtype=torch.bfloat16) for weight in self.whole]
        torch._foreach_copy_(self.half, self.whole)
        for parameter, weight in zip(self.parameters, self.half):
            parameter.grad = None
            parameter.data = weight
        return self

    def __exit__(self, *_: object) -> None:
        for parameter, weight in zip(self.parameters, self.whole):
            parameter.grad = None
            parameter.data = weight
            parameter.grad = self.sums.get(parameter)
        self.whole = []
        self.sums = {}

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the gradients of a micro-batch to those of the step."""
        found = {parameter: grad for parameter in self.parameters if (grad := parameter.grad) is not None}
        new = [torch.empty_like(gradient, dtype=torch.float32) for gradient in found.values()]
        if new:
            torch._foreach_copy_(new, list(found.values()))
        before = [(self.sums[p], gradient) for p, gradient in zip(found, new) if p in self.sums]
        if before:
            torch._foreach_add_(*map(list, zip(*before)))
        for parameter, gradient in zip(found, new):
            self.sums.setdefault(parameter, gradient)
            parameter.grad = None

    def clear(self) -> None:
        """Forgets what was collected."""
        self.sums = {}


def bf16_weights(model: AnyModel, precision: str) -> Bf16Weights | None:
    """How a step of ``model`` computes in bf16 if not by autocast: Canter's own models on a GPU, whose layers compute
    in the type of their weights. Not shards of weights, which FSDP holds."""
    first = next(model.parameters())
    own = "bf16_weights" in model.supports and not isinstance(first, DTensor)
    return Bf16Weights(module_of(model)) if precision == "bf16" and own and first.is_cuda else None
