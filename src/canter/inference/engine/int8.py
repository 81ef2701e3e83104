"""Linear layers in int8 on a CPU: those of the encoder, and the projections to cross-attention's keys and values.

Weights are stored in int8 and activations are quantised row by row. With many rows, int8 multiplies about twice as fast
as float32, even with AVX2 only. A decoder step on a few rows gains nothing without VNNI, so its layers stay in float32.
Each row has its own scale and sums are integers, so a row's result does not depend on the others. N: outputs,
K: inputs.
"""

import torch
from torch import Tensor, nn

from canter.errors import ConfigError
from canter.models.model import SpeechModel

# Processors without VNNI add two products in 16 bits: 2 x 255 x 63 fits there, 2 x 255 x 127 does not.
WEIGHTS, INPUTS, ZERO = 63, 127, 128


class Int8Linear(nn.Module):
    """Linear layer with a weight (N, K) whose rows are scaled to -63 ... 63, on x (..., K) scaled to 1 ... 255."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        weight = weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / WEIGHTS
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().float()
        self.register_buffer("weight", torch.ops.onednn.qlinear_prepack(rounded, None))  # in oneDNN's order
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(weight), dtype=torch.int32))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        largest = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True)).clamp_(min=1e-12)
        rounded = (rows * (INPUTS / largest)).round_().add_(ZERO).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, ZERO, self.weight, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = torch.addcmul(self.bias, product, largest, value=1 / INPUTS, out=product)
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def quantize(model: SpeechModel) -> SpeechModel:
    """Replace the linear layers of the encoder and the projections to cross-attention's keys and values by int8 ones.

    The model is changed in place and can no longer be trained or saved. Raises ConfigError for a model that is not on a
    CPU, and where torch was built without oneDNN.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ConfigError(f"int8 runs on a CPU; this model is on {device}: use bf16 there")
    if not torch.backends.mkldnn.is_available():
        raise ConfigError("int8 needs a torch that was built with oneDNN (MKLDNN): use float32")
    for parent in [*model.encoder.layers.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child.weight, child.bias))
    for layer in model.decoder.blocks:
        for name in ("key", "value"):
            child = getattr(layer.cross_attention, name)
            setattr(layer.cross_attention, name, Int8Linear(child.weight, child.bias))
    return model
