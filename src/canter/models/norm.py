"""BatchNorm whose statistics are the valid positions' alone, merged once an optimiser step.

B: utterances, T: frames, D: width.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MaskedBatchNorm(nn.Module):
    """Normalises (B, T, D) over the valid positions of the micro-batch.

    In training the running statistics do not move during a forward pass: each pass appends its (mean,
    variance) to ``pending``, and ``merge`` folds them in, in the order given, once a step. So the running
    statistics are those of the plan's order whoever computed which micro-batch.
    """

    frozen = False

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, width: int, epsilon: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.epsilon, self.momentum = epsilon, momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.pending: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x (B, T, D), valid (B, T) boolean -> (B, T, D)."""
        dtype = x.dtype
        x = x.float()
        if self.training:
            kept = valid[:, :, None].to(x.dtype)
            count = kept.sum()
            mean = (x * kept).sum((0, 1)) / count
            centred = x - mean
            variance = (centred.square() * kept).sum((0, 1)) / count
            unbiased = variance.detach() * (count / (count - 1).clamp(min=1))
            if not MaskedBatchNorm.frozen:
                self.pending.append((mean.detach(), unbiased))
        else:
            centred, variance = x - self.running_mean, self.running_var
        return (centred * (variance + self.epsilon).rsqrt() * self.weight + self.bias).to(dtype)

    def merge(self, statistics: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Folds the (mean, variance) of micro-batches, in plan order, into the running statistics."""
        for mean, variance in statistics:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
            self.num_batches_tracked += 1


@contextmanager
def frozen_statistics() -> Iterator[None]:
    """No MaskedBatchNorm notes statistics in this context: a layer is being computed a second time."""
    MaskedBatchNorm.frozen = True
    try:
        yield
    finally:
        MaskedBatchNorm.frozen = False


def merge_pending(model: nn.Module) -> None:
    """Folds what every MaskedBatchNorm of ``model`` has pending into its running statistics, in order."""
    for module in model.modules():
        if isinstance(module, MaskedBatchNorm):
            module.merge(module.pending)
            module.pending.clear()
