"""Running a stack of layers in training: leaving some out, keeping less for the backward pass."""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from canter.models.norm import frozen_statistics


class Stack(nn.Module):
    """A module with ``layers`` that are run one after the other."""

    layers: nn.ModuleList
    recompute: bool = False
    """Whether the backward pass computes each layer again instead of keeping what is inside (Chen et al.,
    2016)."""

    compiled: bool = False
    """Whether the layers are, each for itself."""

    def run(self, x: Tensor, *context: Tensor | None, layer_drop: float = 0.0) -> Tensor:
        """x through all layers, each called with ``context`` too. In training each is left out with
        probability ``layer_drop`` (Fan et al., 2020), drawn from torch's generator."""
        layers: Iterable[nn.Module] = self.layers
        if layer_drop and self.training:
            keep = (torch.rand(len(self.layers)) >= layer_drop).tolist()
            layers = [layer for layer, kept in zip(self.layers, keep, strict=True) if kept]
        with self._as_written(len(x)):
            for layer in layers:
                if self.recompute and torch.is_grad_enabled():
                    x = checkpoint(layer, x, *context, use_reentrant=False, context_fn=_contexts)  # pyright: ignore[reportAssignmentType]
                else:
                    x = layer(x, *context)
        return x

    def _as_written(self, batch: int):
        """Has compiled layers run as they were written for a batch of one: to a compiler that is another shape, and
        compiling it takes longer than it ever runs."""
        if batch > 1 or not self.compiled or torch.compiler.is_compiling():
            return nullcontext()
        return torch.compiler.set_stance("force_eager")


def _contexts():
    # the second pass over a layer must not count its batch statistics again
    return nullcontext(), frozen_statistics()
