"""The decoder's linear layers in int8 on a CPU: weights are stored so, activations are rounded row by row.

A decoder step on a few rows spends its time reading weights; int8 has a quarter of the bytes of float32, and
AVX-512 VNNI multiplies four at once. Where many rows come at once, in the encoder and in what projects its
output, rounding activations costs as much as the multiplication saves (measured on whisper-tiny.en), so they
stay as they are. N: outputs, K: inputs.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from canter.errors import ConfigError
from canter.models.checkpoint import load_model
from canter.models.model import SpeechModel

Precision = Literal["float32", "bf16", "int8"]


class Int8Matrix(nn.Module):
    """x (..., K) -> x times the transpose of a weight (N, K), whose rows are scaled to -127 ... 127 each."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        scale = weight.detach().float().abs().amax(1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight.detach().float() / scale[:, None]).round().to(torch.int8).t())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        size = rows.abs().amax(1, keepdim=True).clamp_(min=1e-12) / 127
        product = torch._int_mm((rows * (1 / size)).round_().to(torch.int8), self.weight)
        y = product.float().mul_(size).mul_(self.scale)
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], -1).to(x.dtype)


def quantize(model: SpeechModel) -> SpeechModel:
    """Replaces, in place, the linear layers that a decoder step runs, its head included, by int8 ones; norms,
    embeddings, attention and the encoder stay as they are. For inference on a CPU alone: the model can no
    longer be trained or saved. Raises ValueError for a model on another device."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"int8 runs on a CPU; this model is on {device}: use bf16 there")
    for layer in model.decoder.blocks:
        kept = (layer.cross_attention.key, layer.cross_attention.value)
        for parent in (layer, layer.self_attention, layer.cross_attention):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and child not in kept:
                    setattr(parent, name, Int8Matrix(child.weight, child.bias))
    model.decoder.out = Int8Matrix(model.decoder.embedding.weight, model.decoder.head_bias)
    return model


def load_in(precision: Precision, path: str | Path, device: str) -> SpeechModel:
    """The model at ``path`` for inference. Raises ConfigError for int8 anywhere but on a CPU, CheckpointError as
    ``load_model``."""
    if precision == "int8" and device != "cpu":
        raise ConfigError(f"--precision int8 runs on a CPU alone, not on {device}: use bf16 there")
    model = load_model(path, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return quantize(model) if precision == "int8" else model
