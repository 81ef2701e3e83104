"""Layers that the encoders and the decoder share: attention, feed-forward, and stacks of layers.

B: utterances, U: queries, N: keys, D: width, H: heads, K: head width, T: encoder frames, F: feature frames, M: mels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from canter.models.features import Count, attention_mask
from canter.models.norm import frozen_statistics
from canter.models.packing import PackedMask, Packing


def gelu(x: Tensor) -> Tensor:
    """Return GELU of ``x``, computed in place under no_grad: the widest tensor of a layer need not exist twice."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


ACTIVATIONS = {"relu": F.relu, "gelu": gelu}


def rates(width: int, device: torch.device | None = None) -> Tensor:
    """Return the D // 2 angular frequencies of position encodings, per position (Vaswani et al., 2017)."""
    return torch.exp(torch.arange(0, width, 2, device=device) * -(math.log(10000.0) / width))


def whisper_rates(width: int) -> Tensor:
    """Return D // 2 angular frequencies of which the last is exactly 1 / 10000, as in Whisper and fairseq."""
    half = width // 2
    return 10000 ** -(torch.arange(half) / max(1, half - 1))


def sinusoids(places: Tensor, rates: Tensor, alternate: bool = True) -> Tensor:
    """Return encodings (N, D) of ``places`` (N,): sines in even and cosines in odd columns, or all sines first."""
    angle = places[:, None] * rates
    if alternate:
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class KeyValues(NamedTuple):
    """Keys and values (B, H, N, K) in a cache, of which self-attention writes ``columns`` (U,) before it reads all."""

    keys: Tensor
    values: Tensor
    columns: slice | Tensor | None = None
    """Columns for the keys and values of new tokens; None: nothing is written (cross-attention)."""

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values (B, H, U, K) of new tokens to ``columns``."""
        for kept, new in ((self.keys, keys), (self.values, values)):
            if isinstance(self.columns, Tensor):
                kept.index_copy_(2, self.columns, new.to(kept.dtype))
            else:
                kept[:, :, self.columns] = new


class Attention(nn.Module):
    """Multi-head attention over keys and values of one of three sources.

    The source is the input itself (self-attention), the encoder's output (cross-attention), or a cache.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, key_bias: bool = True):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=key_bias)

    def split(self, x: Tensor) -> Tensor:
        """Return (B, N, D) as heads (B, H, N, K)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def project(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H, N, K) of ``source`` (B, N, D)."""
        keys, values = map(self.split, self._rows(source))
        return keys, values

    def forward(
        self, x: Tensor, source: Tensor | KeyValues, mask: Tensor | PackedMask | None = None, causal: bool = False
    ) -> Tensor:
        """Return what queries ``x`` (B, U, D) read from ``source`` (B, N, D), or from keys and values: (B, U, D).

        ``mask`` is boolean, true where attended, or added to the scores; it broadcasts to (B, H, U, N). With a
        `PackedMask` ``x`` and ``source`` are packed.
        """
        if isinstance(mask, PackedMask):
            assert isinstance(source, Tensor)
            keys, values = map(mask.keys.split, self._rows(source))
            masks = [None] * len(keys) if causal else mask.keys.masks
            groups = zip(mask.queries.split(self.query(x)), keys, values, masks)
            read = [self._read(self.split(q), self.split(k), self.split(v), one, causal) for q, k, v, one in groups]
            return self.out(mask.queries.pack(read))
        if isinstance(source, KeyValues):
            keys, values, columns = source
            if columns is not None:
                source.write(*self.project(x))
        else:
            keys, values = self.project(source)
        return self.out(self._read(self.split(self.query(x)), keys, values, mask, causal))

    def _rows(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return self.key(source), self.value(source)

    def _read(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Return what queries (B, H, U, K) read: (B, U, D)."""
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=self.bias(query, mask), dropout_p=dropout, is_causal=causal
        )
        return y.transpose(1, 2).flatten(2)

    def bias(self, query: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return what is added to the scores of queries (B, H, U, K), or a boolean mask; relative positions go here."""
        return mask

    def weights(self, x: Tensor, keys: Tensor) -> Tensor:
        """Return the attention weights (B, H, U, N), float32, of queries ``x`` (B, U, D) on keys (B, H, N, K)."""
        query = self.split(self.query(x)).float()
        return (query @ keys.float().transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(-1)


class TransformerLayer(nn.Module):
    """Residual, pre-norm sub-layers of Whisper's encoder and of the decoder, which call them in ``forward``."""

    def build_feed_forward(
        self, width: int, hidden: int, activation: str, dropout: float, dropout_activation: float
    ) -> None:
        """Make the modules of the feed-forward, and the dropout of all sub-layers."""
        self.norm_feed_forward = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)
        self.dropout_activation = nn.Dropout(dropout_activation)

    def attend(
        self,
        x: Tensor,
        norm: nn.Module,
        attention: Attention,
        source: Tensor | KeyValues | None = None,
        mask: Tensor | PackedMask | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Return ``x`` (B, U, D) plus what it reads by ``attention`` from ``source``, by default from itself."""
        h = norm(x)
        y = attention(h, h if source is None else source, mask, causal)
        return x + (self.dropout(y) if self.training else y)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, U, D) plus its feed-forward."""
        h = self.activation(self.up(self.norm_feed_forward(x)))
        if self.training:  # a decoding step spends a few per cent of its time on modules that do nothing
            return x + self.dropout(self.down(self.dropout_activation(h)))
        return x + self.down(h)


class Stack(nn.Module):
    """A module with ``layers`` that run one after the other."""

    layers: nn.ModuleList
    recompute: bool = False
    """Activation checkpointing: the backward pass computes each layer again (Chen et al., 2016)."""
    compiled: bool = False
    """True if each layer is compiled."""

    def run(self, x: Tensor, *context: Tensor | Packing | PackedMask | None, layer_drop: float = 0.0) -> Tensor:
        """Run ``x`` through all layers, each called with ``context`` too.

        Training leaves each out with probability ``layer_drop`` (Fan et al., 2020), drawn from torch's generator.
        """
        layers: Iterable[nn.Module] = self.layers
        if layer_drop and self.training:
            keep = (torch.rand(len(self.layers)) >= layer_drop).tolist()
            layers = [layer for layer, kept in zip(self.layers, keep, strict=True) if kept]
        with self._eager_if_single(len(x)):
            for layer in layers:
                if self.recompute and torch.is_grad_enabled():
                    x = cast(Tensor, checkpoint(layer, x, *context, use_reentrant=False, context_fn=_contexts))
                else:
                    x = layer(x, *context)
        return x

    def _eager_if_single(self, batch: int) -> AbstractContextManager[object]:
        # to a compiler a batch of one is another shape, and compiling it takes longer than it ever runs
        if batch > 1 or not self.compiled or torch.compiler.is_compiling():
            return nullcontext()
        return torch.compiler.set_stance("force_eager")


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    # the second pass over a layer must not count its batch statistics again
    return nullcontext(), frozen_statistics()


class Encoder(Stack):
    """Base of the encoders: features (B, F, M), lengths (B,) in feature frames -> (B, T, D), (B,) in encoder frames.

    What stands past an utterance's end, in features or batch, must not change its valid positions.
    """

    outputs: tuple[str, ...] = ()
    """Modules of a layer that write to the residual stream: with all of them zero, the layer is the identity."""
    inner_frames: int = 1
    """Frames in the layers per encoder frame, where an adapter after them reduces their number."""
    same_lengths: bool = False
    """True if every utterance fills its batch, because all are padded to one length; the model sets it."""
    last_norm: str = ""
    """The norm that a layer ends with, if it has one."""
    packs: bool = False
    """True if it has ``embed`` and ``contextualise``, and so encodes packed micro-batches too."""

    def frames(self, feature_frames: Count) -> Count:
        """Return the number of encoder frames of ``feature_frames``."""
        raise NotImplementedError

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x, lengths = self.embed(features, lengths)
        return self.contextualise(x, lengths), lengths

    def packed(self, groups: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Packing]:
        """Return the encoder's output (1, N, D) of groups of features and lengths, and where utterances stand in it."""
        embedded = [self.embed(*group) for group in groups]
        packing = Packing([lengths for _, lengths in embedded], [x.shape[1] for x, _ in embedded])
        return self.contextualise(packing.pack([x for x, _ in embedded]), packing), packing

    def embed(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input (B, T, D) of the layers, and lengths (B,) in encoder frames."""
        raise NotImplementedError

    def attention_mask(self, lengths: Tensor | Packing, size: int) -> Tensor | PackedMask | None:
        """Return the mask of self-attention over ``size`` positions; None where all are attended."""
        if isinstance(lengths, Packing):
            return PackedMask(lengths, lengths)
        return None if self.same_lengths else attention_mask(lengths, size)

    def contextualise(self, x: Tensor, lengths: Tensor | Packing) -> Tensor:
        """Run the layers on ``x`` (B, T, D) of lengths (B,), or (1, N, D) packed."""
        raise NotImplementedError


class EncoderConfig(Protocol):
    """A frozen dataclass of an encoder's settings, which builds its module."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        ...

    @property
    def width(self) -> int:
        """D."""
        ...

    def build(self) -> Encoder:
        """Return a new encoder of these settings."""
        ...
