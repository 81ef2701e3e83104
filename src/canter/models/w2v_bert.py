"""The speech encoder of Seamless v2: w2v-BERT 2.0 and its adapter (Seamless Communication, 2023, arXiv 2312.05187).

B: utterances, F: feature frames (10 ms), M: mel bins, S: stacked frames (20 ms), T: encoder frames (160 ms), D: width,
H: heads, K: head width. Padding never changes a valid position: stacked frames past an utterance's end are masked in
attention and zeroed before every convolution. transformers computes an incomplete last stacked frame, of an odd number
of feature frames, without its features, and the adapter reads it; so it is computed here too.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canter.models.ebranchformer import DepthwiseConvolution, FeedForwardModule
from canter.models.features import Count, attention_mask
from canter.models.layers import Attention, Encoder, TransformerLayer

EPSILON = 1e-5
"""Epsilon of every LayerNorm."""
STACKED = 2
"""Feature frames in a stacked frame."""


@dataclass(frozen=True)
class W2vBertConfig:
    """Shape of the encoder; the defaults are those of seamless-m4t-v2-large."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    feedforward: int = 4096
    kernel_size: int = 31
    """Kernel size of the causal depthwise convolutions, in stacked frames."""
    mels: int = 80
    most_before: int = 64
    """Distance in stacked frames from which on all earlier keys have the same position."""
    most_after: int = 8
    """Distance from which on all later keys have the same position."""
    chunk_frames: int = 20000
    """Stacked frames of a chunk of attention, which sees no later chunk."""
    chunks_before: int = 128
    """Number of earlier chunks that a chunk sees; -1: all."""
    adapter_stride: int = 8
    """Stacked frames per encoder frame, and kernel size of the adapter's convolutions."""
    dropout: float = 0.0
    dropout_adapter: float = 0.0
    """Dropout in the adapter."""
    layer_drop: float = 0.0
    """Probability that training leaves a layer out."""

    def build(self) -> "W2vBert":
        return W2vBert(self)


class RelativeKeyAttention(Attention):
    """Self-attention with a learned key for every distance, clamped in both directions (Shaw et al., 2018)."""

    def __init__(self, config: W2vBertConfig):
        super().__init__(config.width, config.heads, config.dropout)
        self.before, self.after = config.most_before, config.most_after
        self.distances = nn.Embedding(self.before + self.after + 1, config.width // config.heads)

    def bias(self, query: Tensor, mask: Tensor | None) -> Tensor:
        """Return the scores (B, H, S, S) of the distances, for queries (B, H, S, K), very low where masked."""
        places = torch.arange(query.shape[2], device=query.device)
        distance = (places - places[:, None]).clamp(-self.before, self.after) + self.before
        scores = torch.matmul(query, self.distances.weight.T / math.sqrt(query.shape[3]))
        scores = scores.gather(3, distance.expand(*query.shape[:2], -1, -1))
        return scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


class W2vBertLayer(nn.Module):
    """Half feed-forward, attention, causal convolution, half feed-forward, each residual, then a norm."""

    def __init__(self, config: W2vBertConfig):
        super().__init__()
        d = config.width
        self.feed_forward1 = FeedForwardModule(d, config.feedforward, config.dropout, EPSILON)
        self.norm_attention = nn.LayerNorm(d)
        self.attention = RelativeKeyAttention(config)
        self.norm_conv = nn.LayerNorm(d)
        self.pointwise_conv1 = nn.Linear(d, 2 * d, bias=False)
        self.depthwise_conv = DepthwiseConvolution(d, config.kernel_size, causal=True)
        self.norm_depthwise = nn.LayerNorm(d)
        self.pointwise_conv2 = nn.Linear(d, d, bias=False)
        self.feed_forward2 = FeedForwardModule(d, config.feedforward, config.dropout, EPSILON)
        self.norm_out = nn.LayerNorm(d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, valid: Tensor | None) -> Tensor:
        """X (B, S, D), mask (B, 1, 1 or S, S), valid (B, S, 1); None where every position is valid -> (B, S, D)."""
        x = torch.add(x, self.dropout(self.feed_forward1(x)), alpha=0.5)
        h = self.norm_attention(x)
        x = x + self.dropout(self.attention(h, h, mask))
        h = self.depthwise_conv(F.glu(self.pointwise_conv1(self.norm_conv(x)), dim=-1), valid)
        h = F.silu(self.norm_depthwise(h), inplace=not torch.is_grad_enabled())
        x = x + self.dropout(self.pointwise_conv2(h))
        x = torch.add(x, self.dropout(self.feed_forward2(x)), alpha=0.5)
        return self.norm_out(x)


class Adapter(TransformerLayer):
    """A Transformer layer whose input and residual each come from a gated, strided convolution."""

    def __init__(self, config: W2vBertConfig):
        super().__init__()
        d, self.stride = config.width, config.adapter_stride
        self.norm_residual, self.norm_attention = nn.LayerNorm(d), nn.LayerNorm(d)
        self.conv_residual, self.conv_attention = (nn.Conv1d(d, 2 * d, self.stride, self.stride) for _ in range(2))
        self.attention = Attention(d, config.heads, config.dropout)
        dropout = config.dropout_adapter
        self.build_feed_forward(d, config.feedforward, "relu", dropout, dropout)

    def frames(self, stacked: Count) -> Count:
        """Return the encoder frames of a number of stacked frames, at least one."""
        return (stacked + 2 * (self.stride // 2) - self.stride) // self.stride + 1

    def _strided(self, x: Tensor, conv: nn.Conv1d) -> Tensor:
        """Return the gated convolution (B, T, D) of ``x`` (B, S, D): a matrix product, since windows do not overlap."""
        before, size = self.stride // 2, self.frames(x.shape[1])
        windows = F.pad(x, (0, 0, before, size * self.stride - before - x.shape[1])).unflatten(1, (size, -1))
        return F.glu(F.linear(windows.transpose(2, 3).flatten(2), conv.weight.flatten(1), conv.bias), dim=-1)

    def forward(self, x: Tensor, begun: Tensor | None, mask: Tensor | None) -> Tensor:
        """X (B, S, D), begun (B, S, 1) and mask (B, 1, 1, T), None where every position is valid -> (B, T, D)."""
        residual, h = self.norm_residual(x), self.norm_attention(x)
        if begun is not None:
            residual, h = residual * begun, h * begun
        h = self._strided(h, self.conv_attention)
        attended = self.dropout(self.attention(h, h, mask))
        return self.feed_forward(self._strided(residual, self.conv_residual) + attended)


class W2vBert(Encoder):
    """Features (B, F, M) and lengths (B,) in frames -> encoded (B, T, D) and lengths (B,) in encoder frames."""

    outputs = ("feed_forward1.down", "attention.out", "pointwise_conv2", "feed_forward2.down")
    last_norm = "norm_out"

    def __init__(self, config: W2vBertConfig):
        super().__init__()
        self.config = config
        d, stacked = config.width, STACKED * config.mels
        self.norm_input, self.input = nn.LayerNorm(stacked), nn.Linear(stacked, d)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(W2vBertLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, config.feedforward), nn.Linear(config.feedforward, d)
        self.adapter, self.inner_frames = Adapter(config), config.adapter_stride
        self.norm_out = nn.LayerNorm(d)

    def frames(self, feature_frames: Count) -> Count:
        """Return the number of encoder frames of ``feature_frames``."""
        return self.adapter.frames(_complete(feature_frames))

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        features = F.pad(features, (0, 0, 0, -features.shape[1] % STACKED))
        x = self.input(self.norm_input(features.unflatten(1, (-1, STACKED)).flatten(2)))
        size, complete, begun = x.shape[1], _complete(lengths), (lengths + STACKED - 1) // STACKED
        mask = attention_mask(complete, size)
        valid = _by_frame(mask)
        x = self.dropout(x if valid is None else x * valid).to(self.norm.weight.dtype)
        x = self.norm(self.run(x, self._in_chunks(mask, size, x.device), valid, layer_drop=self.config.layer_drop))
        x = torch.add(x, self.down(F.relu(self.up(x), inplace=not torch.is_grad_enabled())), alpha=0.5)
        lengths = self.adapter.frames(complete)
        x = self.adapter(x, _by_frame(attention_mask(begun, size)), attention_mask(lengths, self.adapter.frames(size)))
        return self.norm_out(x), lengths

    def _in_chunks(self, mask: Tensor | None, size: int, device: torch.device) -> Tensor | None:
        """Return the mask (B, 1, 1 or S, S) of keys in the chunks that each query sees."""
        if size <= self.config.chunk_frames:
            return mask
        chunks = torch.arange(size, device=device) // self.config.chunk_frames
        behind = chunks[:, None] - chunks
        most = self.config.chunks_before if self.config.chunks_before >= 0 else size
        near = ((behind >= 0) & (behind <= most))[None, None]
        return near if mask is None else near & mask


def _by_frame(mask: Tensor | None) -> Tensor | None:
    """Return an attention mask (B, 1, 1, S) as one of frames (B, S, 1)."""
    return None if mask is None else mask[:, 0].transpose(1, 2)


def _complete(frames: Count) -> Count:
    """Return the stacked frames that ``frames`` fill, at least one."""
    stacked = frames // STACKED
    return cast(Count, stacked.clamp(min=1) if isinstance(stacked, Tensor) else max(1, stacked))
