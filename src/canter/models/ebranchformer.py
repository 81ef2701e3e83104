"""The E-Branchformer encoder (Kim et al., 2022, arXiv 2210.00077), as in OWSM.

B: utterances, F: feature frames (10 ms), M: mel bins, T: encoder frames, D: width, G: units of the cgMLP. ESPnet always
pads utterances to 30 s; here padding never changes a valid position, so that utterances may keep their own lengths:
what stands past an end is zeroed before every convolution and masked in attention.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canter.models.features import Count, length_mask
from canter.models.layers import Attention, Encoder, rates, sinusoids
from canter.models.packing import PackedMask, Packing

EPSILON = 1e-12
"""Epsilon of every LayerNorm, as in ESPnet."""


@dataclass(frozen=True)
class EBranchformerConfig:
    """Shape of the encoder; the defaults are those of OWSM v4 base."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    feedforward: int = 1536
    cgmlp_units: int = 1536
    """Units of the convolutional gating MLP, half of which are the gate."""
    kernel_size: int = 31
    """Kernel size of the gate's depthwise convolution, in encoder frames."""
    merge_kernel_size: int = 31
    """Kernel size of the depthwise convolution that merges both branches."""
    mels: int = 128
    subsampling: int = 8
    """Feature frames per encoder frame: 4 (OWSM v3.1) or 8 (v4)."""
    positions: int = 5000
    """Maximum number of encoder frames."""
    dropout: float = 0.0
    dropout_input: float = 0.0
    """Dropout of the input with its positions."""
    dropout_attention: float = 0.0
    layer_drop: float = 0.0
    """Probability that training leaves a layer out."""

    def build(self) -> "EBranchformer":
        return EBranchformer(self)


def unpadded_half(frames: Count) -> Count:
    """Return the frames that a convolution of kernel 3 and stride 2 without padding leaves."""
    return (frames - 1) // 2


class ConvolutionalSubsampling(nn.Module):
    """(B, F, M) -> (B, T, D): strided convolutions without padding, so that no valid frame sees what follows the
    utterance."""

    def __init__(self, config: EBranchformerConfig):
        super().__init__()
        halvings, d = int(math.log2(config.subsampling)), config.width
        self.conv = nn.ModuleList(nn.Conv2d(d if n else 1, d, 3, stride=2) for n in range(halvings))
        mels = config.mels
        for _ in range(halvings):
            mels = unpadded_half(mels)
        self.out = nn.Linear(d * mels, d)
        self.factor = config.subsampling

    def forward(self, features: Tensor) -> Tensor:
        """Compute the silence that pads all utterances once: its frames are equal, and so are their outputs.

        Only on a CPU: a GPU would have to wait for the number of frames.
        """
        if features.device.type != "cpu":
            return self.convolve(features)
        window, frames = 2 * self.factor - 1, features.shape[1]
        last = (features != features[:, -1:]).any(-1).any(0).nonzero()[-1:]  # frame before the silence
        silent = -(-(int(last) + 1 if len(last) else 0) // self.factor)  # the first output that hears nothing else
        heard = min(frames, silent * self.factor + window)
        x, size = self.convolve(features[:, :heard]), (frames - window) // self.factor + 1
        return torch.cat([x, x[:, -1:].expand(-1, size - x.shape[1], -1)], dim=1)

    def convolve(self, features: Tensor) -> Tensor:
        x = features[:, None]
        for convolution in self.conv:
            x = F.relu(convolution(x), inplace=not torch.is_grad_enabled())
        return self.out(x.transpose(1, 2).flatten(2))


class FeedForwardModule(nn.Module):
    """Norm, two linear layers with a SiLU between them."""

    def __init__(self, width: int, units: int, dropout: float, epsilon: float = EPSILON):
        super().__init__()
        self.norm = nn.LayerNorm(width, epsilon)
        self.up, self.down = nn.Linear(width, units), nn.Linear(units, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.silu(self.up(self.norm(x)), inplace=not torch.is_grad_enabled())))


class DepthwiseConvolution(nn.Module):
    """A depthwise convolution over time that zeroes its input past the utterances' ends; a causal one has no bias."""

    bias: Tensor | None

    def __init__(self, channels: int, kernel_size: int, causal: bool = False):
        super().__init__()
        self.before = kernel_size - 1 if causal else kernel_size // 2
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.register_parameter("bias", None if causal else nn.Parameter(torch.zeros(channels)))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, valid: Tensor | Packing | None) -> Tensor:
        """X (B, T, C), valid (B, T, 1) or None where everything is -> (B, T, C); or packed x (1, N, C)."""
        if isinstance(valid, Packing):
            spread, within = valid.spread(x, self.before)
            return valid.gather(self(spread, within[:, :, None]), self.before)
        x = (x if valid is None else x * valid).transpose(1, 2)
        padding, groups, frames = self.before, len(self.weight), x.shape[2]
        if x.is_cuda:
            y = F.conv1d(x, self.weight, self.bias, padding=padding, groups=groups)
        else:  # in two dimensions, of which one is empty: those have kernels for channels that are last in memory
            y = F.conv2d(x[:, :, None], self.weight[:, :, None], self.bias, padding=(0, padding), groups=groups)[
                :, :, 0
            ]
        return y[:, :, :frames].transpose(1, 2)


class ConvolutionalGatingMLP(nn.Module):
    """The local branch: units of a wide layer are gated by a convolution over the others (cgMLP)."""

    def __init__(self, config: EBranchformerConfig):
        super().__init__()
        half = config.cgmlp_units // 2
        self.norm = nn.LayerNorm(config.width, EPSILON)
        self.up = nn.Linear(config.width, config.cgmlp_units)
        self.norm_gate = nn.LayerNorm(half, EPSILON)
        self.conv = DepthwiseConvolution(half, config.kernel_size)
        self.down = nn.Linear(half, config.width)
        self.dropout = nn.Dropout(config.dropout)
        assert self.conv.bias is not None
        with torch.no_grad():  # the gate begins as one, so that a new layer passes its input through
            self.conv.weight.normal_(std=1e-6)
            self.conv.bias.fill_(1.0)

    def forward(self, x: Tensor, valid: Tensor | Packing | None) -> Tensor:
        units, gate = F.gelu(self.up(self.norm(x))).chunk(2, dim=-1)
        return self.down(self.dropout(units * self.conv(self.norm_gate(gate), valid)))


class EBranchformerLayer(nn.Module):
    """Half feed-forward; attention beside a convolutional gating MLP, merged by a convolution; half feed-forward; norm.

    Every part is residual.
    """

    def __init__(self, config: EBranchformerConfig):
        super().__init__()
        d = config.width
        self.feed_forward1 = FeedForwardModule(d, config.feedforward, config.dropout)
        self.norm_attention = nn.LayerNorm(d, EPSILON)
        self.attention = Attention(d, config.heads, config.dropout_attention)
        self.cgmlp = ConvolutionalGatingMLP(config)
        self.merge_conv = DepthwiseConvolution(2 * d, config.merge_kernel_size)
        self.merge = nn.Linear(2 * d, d)
        self.feed_forward2 = FeedForwardModule(d, config.feedforward, config.dropout)
        self.norm_out = nn.LayerNorm(d, EPSILON)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | PackedMask | None, valid: Tensor | Packing | None) -> Tensor:
        """X (B, T, D), mask (B, 1, 1, T), valid (B, T, 1); None where every position is valid -> (B, T, D)."""
        x = torch.add(x, self.dropout(self.feed_forward1(x)), alpha=0.5)
        h = self.norm_attention(x)
        attended = self.dropout(self.attention(h, h, mask))
        both = torch.cat([attended, self.dropout(self.cgmlp(x, valid))], dim=-1)
        x = x + self.dropout(self.merge(both + self.merge_conv(both, valid)))
        x = torch.add(x, self.dropout(self.feed_forward2(x)), alpha=0.5)
        return self.norm_out(x)


class EBranchformer(Encoder):
    """Features (B, F, M) and lengths (B,) in frames -> encoded (B, T, D) and lengths (B,) in encoder frames."""

    positions: Tensor
    outputs = ("feed_forward1.down", "merge", "feed_forward2.down")
    last_norm = "norm_out"
    packs = True

    def __init__(self, config: EBranchformerConfig):
        super().__init__()
        self.config = config
        self.subsampling = ConvolutionalSubsampling(config)
        self.register_buffer(
            "positions", sinusoids(torch.arange(config.positions), rates(config.width)), persistent=False
        )
        self.dropout = nn.Dropout(config.dropout_input)
        self.layers = nn.ModuleList(EBranchformerLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, EPSILON)

    def frames(self, feature_frames: Count) -> Count:
        """Return the number of encoder frames of ``feature_frames``, at least one."""
        frames = feature_frames
        for _ in range(int(math.log2(self.config.subsampling))):
            frames = unpadded_half(frames)
        return cast(Count, frames.clamp(min=1) if isinstance(frames, Tensor) else max(1, frames))

    def embed(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        shortest = 2 * self.config.subsampling - 1  # feature frames of one encoder frame
        if features.shape[1] < shortest:
            features = F.pad(features, (0, 0, 0, shortest - features.shape[1]))
        x = self.subsampling(features)
        if x.shape[1] > self.config.positions:
            raise ValueError(f"{x.shape[1]} encoder frames are more than the {self.config.positions} positions")
        lengths = self.frames(lengths)
        return self.dropout(x * math.sqrt(self.config.width) + self.positions[: x.shape[1]].to(x.dtype)), lengths

    def contextualise(self, x: Tensor, lengths: Tensor | Packing) -> Tensor:
        mask, valid = self.attention_mask(lengths, x.shape[1]), lengths
        if not isinstance(valid, Packing):
            valid = None if mask is None else length_mask(valid, x.shape[1])[:, :, None]
        return self.norm(self.run(x, mask, valid, layer_drop=self.config.layer_drop))
