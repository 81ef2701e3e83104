"""The linear layers that see many rows at once in int8, on a CPU: those of the encoder, and those that project its
output to the decoder's keys and values.

Weights are stored in int8 and activations rounded row by row: there int8 multiplies about twice as fast as float32,
even with no more than AVX2. A decoder step on a few rows gains nothing without VNNI, so its layers stay as they are.
Rows are rounded apart and sums are of whole numbers, so a row's result does not depend on the others. N: outputs,
K: inputs.
"""

import torch
from torch import Tensor, nn

from canter.errors import ConfigError
from canter.models.model import SpeechModel

# Processors without VNNI add two products in 16 bits: 2 x 255 x 63 fits there, 2 x 255 x 127 does not.
WEIGHTS, INPUTS, ZERO = 63, 127, 128


class Int8Linear(nn.Module):
    """x (..., K) -> x times the transpose of a weight (N, K), plus bias. The weight's rows are scaled to -63 ... 63,
    those of x to 1 ... 255 around 128."""

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
            rounded,
            1.0,
            ZERO,
            self.weight,
            self.scale,
            self.zero,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        y = torch.addcmul(self.bias, product, largest, value=1 / INPUTS, out=product)
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def quantize(model: SpeechModel) -> SpeechModel:
    """Replaces, in place, the linear layers of the encoder and the projections to cross-attention's keys and values
    by int8 ones. For inference on a CPU alone: the model can no longer be trained or saved. Raises ConfigError for a
    model on another device, and where torch comes without oneDNN."""
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
