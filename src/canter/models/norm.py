"""BatchNorm over the valid positions only, whose running statistics are merged once an optimiser step.

B: utterances, T: frames, D: width.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class _Normalise(torch.autograd.Function):
    """Normalisation by the statistics of the valid positions.

    Written out so that only its input is kept for the backward pass; the composed operations keep five tensors of that
    size.
    """

    @staticmethod
    def forward(ctx, x, valid, count, weight, bias, epsilon):
        kept = valid[:, :, None].to(torch.float32)
        values = x.float()
        mean = (values * kept).sum((0, 1)) / count
        centred = values - mean
        variance = (centred.square() * kept).sum((0, 1)) / count
        rate = (variance + epsilon).rsqrt()
        ctx.save_for_backward(x, valid, count, weight, mean, rate)
        ctx.mark_non_differentiable(mean, variance)
        return (centred * (rate * weight) + bias).to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx, gradient, *_):
        x, valid, count, weight, mean, rate = ctx.saved_tensors
        gradient = gradient.float()
        normal = (x.float() - mean) * rate
        share = valid[:, :, None].to(torch.float32) / count
        for_bias, for_weight = gradient.sum((0, 1)), (gradient * normal).sum((0, 1))
        for_x = (gradient - share * (for_bias + normal * for_weight)) * (rate * weight)
        return for_x.to(x.dtype), None, None, for_weight, for_bias, None


class MaskedBatchNorm(nn.Module):
    """BatchNorm of (B, T, D) over the valid positions of the micro-batch.

    In training the running statistics do not move during a forward pass: each pass appends its (mean, variance) to
    ``pending``, and ``merge`` applies them in the order given, once a step. So the running statistics are those of the
    plan's order, whichever rank computed which micro-batch.
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
        self.pending: list[tuple[Tensor, Tensor] | None] = []

    def forward(self, x: Tensor, valid: Tensor, count: Tensor) -> Tensor:
        """Return x (B, T, D) normalised by the statistics of its ``count`` () valid (B, T) positions, in training.

        In evaluation the convolution before it does its work (``folded``).
        """
        y, mean, variance = _Normalise.apply(x, valid, count, self.weight, self.bias, self.epsilon)
        if not MaskedBatchNorm.frozen:
            self.pending.append((mean, variance * (count / (count - 1).clamp(min=1))))
        return y

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return weight (D, 1, k) and bias (D,) of a depthwise convolution with this norm folded into it."""
        scale = (self.running_var.float() + self.epsilon).rsqrt() * self.weight
        shift = self.bias - self.running_mean * scale
        if bias is not None:
            shift = shift + bias * scale
        return (weight * scale[:, None, None]).to(weight.dtype), shift.to(weight.dtype)

    def merge(self, statistics: Iterable[tuple[Tensor, Tensor] | None]) -> None:
        """Merge (mean, variance) of micro-batches, in plan order; None: the layer was dropped."""
        for mean, variance in filter(None, statistics):
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
            self.num_batches_tracked += 1


@contextmanager
def frozen_statistics() -> Iterator[None]:
    """Context manager in which no MaskedBatchNorm records statistics: a layer is being computed a second time."""
    MaskedBatchNorm.frozen = True
    try:
        yield
    finally:
        MaskedBatchNorm.frozen = False


def merge_pending(model: nn.Module) -> None:
    """Merge the pending statistics of every MaskedBatchNorm of ``model``, in order."""
    for module in model.modules():
        if isinstance(module, MaskedBatchNorm):
            module.merge(module.pending)
            module.pending.clear()
