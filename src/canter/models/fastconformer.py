"""The FastConformer encoder (Rekesh et al., 2023, arXiv 2305.05084), as in Canary.

B: utterances, F: feature frames (10 ms), M: mel bins, C: subsampling channels, T: encoder frames (80 ms),
D: width, H: heads, K: head width. Module names follow NeMo's, so that its state dict maps one to one.
Padding never changes a valid position: inputs are zeroed past their end before every convolution, masked in
attention, and left out of the BatchNorm statistics.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canter.models import kernels
from canter.models.features import length_mask
from canter.models.layers import Encoder, rates, sinusoids
from canter.models.norm import MaskedBatchNorm
from canter.models.packing import Packing

if kernels.AVAILABLE:
    from canter.models.kernels import conformer, subsampling

ALIGNED = 8  # numbers of two bytes that a GPU reads at a time


@dataclass(frozen=True)
class FastConformerConfig:
    """Shape of the encoder; the defaults are those of a small model."""

    layers: int = 6
    width: int = 144
    heads: int = 4
    feedforward: int = 576
    kernel_size: int = 9
    """Kernel of the depthwise convolution, in encoder frames."""
    subsampling_channels: int = 64
    mels: int = 80
    bias: bool = True
    """Biases in the linear layers and convolutions of the blocks."""
    xscaling: bool = False
    """Multiplication of the subsampled input by sqrt(width)."""
    norm: str = "batch"
    """Norm of the convolution module: 'batch' or 'layer'."""
    dropout: float = 0.0
    dropout_input: float = 0.0
    """Dropout after subsampling."""
    dropout_attention: float = 0.0
    layer_drop: float = 0.0
    """Probability of dropping a layer in training."""

    def build(self) -> "FastConformer":
        return FastConformer(self)


def subsampled_once(frames):
    """Return the frames that remain of ``frames`` after one convolution of stride 2."""
    return (frames - 1) // 2 + 1


def subsampled(frames):
    """Return the encoder frames of ``frames`` feature frames: three strided convolutions."""
    for _ in range(3):
        frames = subsampled_once(frames)
    return frames


class _StridedConvolution(torch.autograd.Function):
    """A 3x3 convolution of stride 2 of one channel as a matrix product, zero where it is not valid.

    Its columns are made again in the backward pass, which is cheaper than to keep them.
    """

    @staticmethod
    def columns(x: Tensor, valid: Tensor, mels: int) -> Tensor:
        """Return the columns (B F' M', 10), nine values of each window and 1 for the bias, of x (B, 1, F, M)."""
        mask = valid[:, None, :, None].expand(-1, 1, -1, mels).flatten(2).to(x.dtype)
        return torch.cat([F.unfold(x, 3, padding=1, stride=2) * mask, mask], dim=1).mT.flatten(0, 1)

    @staticmethod
    def forward(ctx, x, valid, mels, weight):
        """Return (B F' M', C) for a weight (C, 10), the bias last."""
        ctx.save_for_backward(x, valid)
        ctx.mels = mels
        return torch.mm(_StridedConvolution.columns(x, valid, mels).to(weight.dtype), weight.mT)

    @staticmethod
    def backward(ctx, gradient):
        x, valid = ctx.saved_tensors
        columns = _StridedConvolution.columns(x, valid, ctx.mels)
        # MKL takes a seventh of the time this way round
        return None, None, None, torch.mm(columns.to(gradient.dtype).mT, gradient).mT


class Subsampling(nn.Module):
    """One strided convolution and two depthwise-separable ones, 8x in time and frequency: (B, F, M) -> (B, T, D)."""

    def __init__(self, config: FastConformerConfig):
        super().__init__()
        c = config.subsampling_channels
        self.conv = nn.Sequential(
            nn.Conv2d(1, c, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(c, c, 3, stride=2, padding=1, groups=c),
            nn.Conv2d(c, c, 1),
            nn.ReLU(),
            nn.Conv2d(c, c, 3, stride=2, padding=1, groups=c),
            nn.Conv2d(c, c, 1),
            nn.ReLU(),
        )
        self.out = nn.Linear(c * subsampled(config.mels), config.width)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if kernels.can_run(features):
            return self._fused(features, lengths)
        x = (features * length_mask(lengths, features.shape[1])[:, :, None])[:, None]
        lengths = subsampled_once(lengths)
        x = self._first(x, lengths)
        for depthwise in (2, 5):
            lengths = subsampled_once(lengths)
            x = self._pointwise(cast(nn.Conv2d, self.conv[depthwise + 1]), self.conv[depthwise](x), lengths)
        return self.out(x.transpose(1, 2).flatten(2)), lengths

    def _fused(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the same with channels last, without the output of the first convolution in memory.

        That output is several times as large as anything in the layers.
        """
        first, _, second, pointwise, _, third, last, _ = cast(Iterable[Any], self.conv)
        x = subsampling.start(features, lengths, first.weight, first.bias, second.weight, second.bias)
        lengths = subsampled_once(subsampled_once(lengths))
        x = F.linear(x, pointwise.weight.flatten(1), pointwise.bias)
        x = subsampling.halve(x, lengths, third.weight, third.bias)
        lengths = subsampled_once(lengths)
        x = F.linear(x, last.weight.flatten(1), last.bias)
        x = F.relu_(x.mul_(length_mask(lengths, x.shape[1])[:, :, None, None]))
        return self.out(x.transpose(2, 3).flatten(2)), lengths

    def _first(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Apply the first convolution and ReLU to (B, 1, F, M); zero from ``lengths`` on.

        On a CPU a matrix product, with the mask among its columns, that leaves channels last in memory: the depthwise
        convolutions that follow are several times as fast on these.
        """
        conv = cast(nn.Conv2d, self.conv[0])
        frames, mels = map(subsampled_once, x.shape[2:])
        valid = length_mask(lengths, frames)
        if x.is_cuda or x.requires_grad or torch.compiler.is_compiling():
            return F.relu_(conv(x).mul_(valid[:, None, :, None]))
        weight = torch.cat([conv.weight.flatten(1), cast(Tensor, conv.bias)[:, None]], dim=1)
        y = F.relu_(cast(Tensor, _StridedConvolution.apply(x, valid, mels, weight)))
        return y.view(len(x), frames, mels, -1).permute(0, 3, 1, 2)

    def _pointwise(self, conv: nn.Conv2d, x: Tensor, lengths: Tensor) -> Tensor:
        """Apply a 1x1 convolution, mask and ReLU.

        Masked before ReLU, not after it: the backward pass then keeps one tensor of this size, not two.
        """
        valid = length_mask(lengths, x.shape[2])[:, :, None, None]
        if x.is_cuda:
            return F.relu_(conv(x).mul_(valid.transpose(1, 2)))
        y = F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)
        return F.relu_(y.mul_(valid)).permute(0, 3, 1, 2)


def relative_positions(size: int, width: int, device: torch.device) -> Tensor:
    """Return sinusoids (N, D) of the distances size-1 ... -(size-1) (Transformer-XL, Dai et al., 2019).

    N is rounded up to a multiple of ALIGNED: a GPU's matrix units need rows of scores that are.
    """
    distance = torch.arange(size - 1, size - 1 - _distances(size), -1, dtype=torch.float32, device=device)
    return sinusoids(distance, rates(width, device))


def _distances(size: int) -> int:
    return -(-(2 * size - 1) // ALIGNED) * ALIGNED


class RelativeAttention(nn.Module):
    """Self-attention with relative positions; content and position each have a learned bias per head."""

    def __init__(self, config: FastConformerConfig):
        super().__init__()
        d = config.width
        self.heads, self.dropout = config.heads, config.dropout_attention
        self.linear_q = nn.Linear(d, d, bias=config.bias)
        self.linear_k = nn.Linear(d, d, bias=config.bias)
        self.linear_v = nn.Linear(d, d, bias=config.bias)
        self.linear_out = nn.Linear(d, d, bias=config.bias)
        self.linear_pos = nn.Linear(d, d, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(config.heads, d // config.heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(config.heads, d // config.heads))

    def forward(self, x: Tensor, positions: Tensor, valid: Tensor | Packing) -> Tensor:
        """Return (B, T, D) for x (B, T, D), positions (N, D) with N at least 2T-1, valid (B, T).

        With a `Packing` as ``valid`` x is packed, and T is the longest utterance's.
        """
        q, k, v = self.linear_q(x), self.linear_k(x), self.linear_v(x)
        p = self.linear_pos(positions) * (x.shape[2] // self.heads) ** -0.5
        p = p.view(len(positions), self.heads, -1).permute(1, 2, 0)  # (H, K, N)
        if not isinstance(valid, Packing):
            return self.linear_out(self._read(q, k, v, p, valid))
        longest, read = max(valid.sizes), []
        groups = zip(valid.split(q), valid.split(k), valid.split(v), valid.valid, valid.masks)
        for queries, keys, values, mask, needed in groups:
            size = queries.shape[1]
            near = p[..., longest - size : longest - size + _distances(size)]
            read.append(self._read(queries, keys, values, near, mask if needed is not None else None))
        return self.linear_out(valid.pack(read))

    def _read(self, q: Tensor, k: Tensor, v: Tensor, p: Tensor, valid: Tensor | None) -> Tensor:
        """Return what queries (B, T, D) read from keys and values, for projected positions (H, K, N).

        valid: (B, T); None, on a CPU only, where every position is.
        """
        b, t, d = q.shape
        q = q.view(b, t, self.heads, -1)
        k, v = (one.view(b, t, self.heads, -1).transpose(1, 2) for one in (k, v))
        by_content, by_position = (q + self.pos_bias_u).transpose(1, 2), q + self.pos_bias_v
        if valid is not None and kernels.can_run(q):  # one product a head, of all rows
            scores = torch.bmm(by_position.view(b * t, self.heads, -1).transpose(0, 1), p)
            bias = conformer.relative_bias(scores.view(self.heads, b, t, -1), valid)
        else:
            bias = _shift(torch.matmul(by_position.transpose(1, 2), p))
            if valid is not None:
                bias = bias.masked_fill(~valid[:, None, None, :], torch.finfo(bias.dtype).min)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(by_content.to(v.dtype), k, v, attn_mask=bias, dropout_p=dropout)
        return y.transpose(1, 2).reshape(b, t, d)


def _shift(scores: Tensor) -> Tensor:
    """Return scores (B, H, T, N) by distance as a view (B, H, T, T) by key.

    Row i starts at place T-1-i, so that in all rows read as one line, from place T-1 on, rows that are one shorter
    begin where they should.
    """
    b, h, t, n = scores.shape
    line = scores.flatten(2)[..., t - 1 : t - 1 + t * (n - 1)]
    return line.view(b, h, t, n - 1)[..., :t]


class Convolution(nn.Module):
    """Gated pointwise, depthwise, norm, SiLU, pointwise; the pointwise convolutions are linear layers."""

    def __init__(self, config: FastConformerConfig):
        super().__init__()
        d, k = config.width, config.kernel_size
        self.pointwise_conv1 = nn.Linear(d, 2 * d, bias=config.bias)
        self.depthwise_conv = nn.Conv1d(d, d, k, padding=(k - 1) // 2, groups=d, bias=config.bias)
        self.batch_norm = MaskedBatchNorm(d) if config.norm == "batch" else nn.LayerNorm(d)
        self.pointwise_conv2 = nn.Linear(d, d, bias=config.bias)

    def forward(self, x: Tensor, valid: Tensor | Packing, count: Tensor) -> Tensor:
        x = F.glu(self.pointwise_conv1(x), dim=-1)
        conv, norm = self.depthwise_conv, self.batch_norm
        if not isinstance(norm, MaskedBatchNorm):
            x = norm(self._depthwise(x, valid, conv.weight, conv.bias))
        elif norm.training:  # not where its weights are frozen
            mask = valid.row if isinstance(valid, Packing) else valid
            x = norm(self._depthwise(x, valid, conv.weight, conv.bias), mask, count)
        elif kernels.can_run(x) and not torch.is_grad_enabled() and not isinstance(valid, Packing):
            statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
            x = conformer.depthwise_normed(x, valid, conv.weight, conv.bias, *statistics, norm.epsilon)
            return self.pointwise_conv2(x)
        else:
            x = self._depthwise(x, valid, *norm.folded(conv.weight, conv.bias))
        return self.pointwise_conv2(F.silu(x, inplace=not torch.is_grad_enabled()))

    def _depthwise(self, x: Tensor, valid: Tensor | Packing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the depthwise convolution, weight (D, 1, k), to x (B, T, D), valid (B, T), or to packed x (1, N, D).

        On a CPU it runs in two dimensions, one of them of size 1: those have kernels for channels last in memory, as
        they are here, and take half the time.
        """
        if isinstance(valid, Packing):
            gap = weight.shape[2] // 2
            return valid.gather(self._depthwise(*valid.spread(x, gap), weight, bias), gap)
        if kernels.can_run(x):
            return conformer.depthwise(x, valid, weight, bias)
        x, padding, groups = (x * valid[:, :, None]).transpose(1, 2), weight.shape[2] // 2, len(weight)
        if x.is_cuda:
            return F.conv1d(x, weight, bias, padding=padding, groups=groups).transpose(1, 2)
        y = F.conv2d(x[:, :, None], weight[:, :, None], bias, padding=(0, padding), groups=groups)
        return y[:, :, 0].transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, config: FastConformerConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.width, config.feedforward, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.linear2 = nn.Linear(config.feedforward, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.linear1(x), inplace=not torch.is_grad_enabled())
        return self.linear2(self.dropout(h))


class ConformerLayer(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, each residual, then a norm."""

    def __init__(self, config: FastConformerConfig):
        super().__init__()
        d = config.width
        self.norm_feed_forward1 = nn.LayerNorm(d)
        self.feed_forward1 = FeedForward(config)
        self.norm_self_att = nn.LayerNorm(d)
        self.self_attn = RelativeAttention(config)
        self.norm_conv = nn.LayerNorm(d)
        self.conv = Convolution(config)
        self.norm_feed_forward2 = nn.LayerNorm(d)
        self.feed_forward2 = FeedForward(config)
        self.norm_out = nn.LayerNorm(d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor, valid: Tensor | Packing, count: Tensor) -> Tensor:
        """Return the layer's output (B, T, D); ``count`` () is the number of valid frames.

        The count is the same for all layers, and a sum over (B, T) is a kernel for each range of sizes where layers are
        compiled.
        """
        x = torch.add(x, self.dropout(self.feed_forward1(self.norm_feed_forward1(x))), alpha=0.5)
        x = x + self.dropout(self.self_attn(self.norm_self_att(x), positions, valid))
        x = x + self.dropout(self.conv(self.norm_conv(x), valid, count))
        x = torch.add(x, self.dropout(self.feed_forward2(self.norm_feed_forward2(x))), alpha=0.5)
        return self.norm_out(x)


class FastConformer(Encoder):
    """FastConformer: features (B, F, M), lengths (B,) in frames -> (B, T, D), lengths (B,) in encoder frames.

    On a GPU T is a multiple of ALIGNED, and so up to 7 more than the longest utterance has.
    """

    outputs = ("feed_forward1.linear2", "self_attn.linear_out", "conv.pointwise_conv2", "feed_forward2.linear2")
    last_norm = "norm_out"
    packs = True

    def __init__(self, config: FastConformerConfig):
        super().__init__()
        self.config = config
        self.pre_encode = Subsampling(config)
        self.dropout = nn.Dropout(config.dropout_input)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.layers))

    def frames(self, feature_frames):
        return subsampled(feature_frames)

    def embed(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        kernels.look_at(features.device)
        x, lengths = self.pre_encode(features, lengths)
        if x.is_cuda:  # fused attention wants the rows of its bias aligned, and would pad them in every layer
            x = F.pad(x, (0, 0, 0, -x.shape[1] % ALIGNED))
        if self.config.xscaling:
            x = x * math.sqrt(self.config.width)
        return self.dropout(x), lengths

    def contextualise(self, x: Tensor, lengths: Tensor | Packing) -> Tensor:
        packed = isinstance(lengths, Packing)
        longest = max(lengths.sizes) if packed else x.shape[1]
        positions = relative_positions(longest, self.config.width, x.device).to(x.dtype)
        # as the norm at the end of every layer leaves it under autocast: so all layers are compiled as one
        x = x.to(self.pre_encode.out.weight.dtype)
        valid = lengths if packed else length_mask(lengths, x.shape[1])
        count = lengths.row.sum() if packed else lengths.sum()
        return self.run(x, positions, valid, count, layer_drop=self.config.layer_drop)
