"""The Transformer decoder and its key/value cache.

B: utterances, T: encoder frames, U: tokens, D: width, H: heads, K: head width, V: vocabulary, L: layers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canter.models.features import length_mask


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the decoder; the defaults are those of a small model."""

    layers: int = 2
    width: int = 144
    heads: int = 4
    feedforward: int = 576
    vocabulary: int = 512
    positions: int = 512
    """The longest sequence, prompt and end token included."""
    pad: int = 0
    """Id of the padding token."""
    dropout: float = 0.0
    dropout_attention: float = 0.0


def sinusoids(positions: int, width: int) -> Tensor:
    """(positions, D): sine on even, cosine on odd columns (Vaswani et al., 2017)."""
    rate = torch.exp(torch.arange(0, width, 2) * -(math.log(10000.0) / width))
    angle = torch.arange(positions)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


class DecoderCache:
    """Keys and values of B rows in every layer: the encoder output's, projected once, and the tokens' so far.

    ``cross`` (L, 2, B, H, T, K), ``own`` (L, 2, B, H, U, K) preallocated, ``encoded_lengths`` (B,) in frames and
    ``used`` (B,), the tokens each row has cached. Rows are independent, so they may be of different ages.
    """

    def __init__(self, cross: Tensor, encoded_lengths: Tensor, positions: int):
        layers, _, rows, heads, _, width = cross.shape
        self.cross, self.encoded_lengths = cross, encoded_lengths
        self.own = cross.new_zeros(layers, 2, rows, heads, positions, width)
        self.used = torch.zeros(rows, dtype=torch.long, device=cross.device)

    def keep(self, rows: Tensor) -> None:
        """Keeps these rows (indices), in this order: finished rows leave, beams are reordered."""
        self.cross = self.cross[:, :, rows]
        self.own = self.own[:, :, rows]
        self.encoded_lengths = self.encoded_lengths[rows]
        self.used = self.used[rows]


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        d = config.width
        self.heads, self.dropout = config.heads, config.dropout_attention
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, K)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def project(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, D) -> keys, values (B, H, N, K)."""
        return self.split(self.key(source)), self.split(self.value(source))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """x (B, U, D), keys and values (B, H, N, K), mask boolean, true where attended -> (B, U, D)."""
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            self.split(self.query(x)), keys, values, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )
        return self.out(y.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Pre-norm self-attention, cross-attention and feed-forward, each residual."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        d = config.width
        self.norm_self, self.self_attention = nn.LayerNorm(d), Attention(config)
        self.norm_cross, self.cross_attention = nn.LayerNorm(d), Attention(config)
        self.norm_feed_forward = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, config.feedforward), nn.Linear(config.feedforward, d)
        self.dropout = nn.Dropout(config.dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.relu(self.up(self.norm_feed_forward(x)))))

    def forward(self, x: Tensor, encoded: Tensor, encoded_mask: Tensor) -> Tensor:
        """Teacher forcing: x (B, U, D), encoded (B, T, D), encoded_mask (B, 1, 1, T) -> (B, U, D)."""
        h = self.norm_self(x)
        x = x + self.dropout(self.self_attention(h, *self.self_attention.project(h), causal=True))
        h = self.norm_cross(x)
        y = self.cross_attention(h, *self.cross_attention.project(encoded), mask=encoded_mask)
        x = x + self.dropout(y)
        return x + self.dropout(self.feed_forward(x))

    def step(
        self, x: Tensor, own: Tensor, cross: Tensor, place: Tensor, own_mask: Tensor, cross_mask: Tensor
    ) -> Tensor:
        """One or a few new tokens: writes their keys and values into ``own`` (2, B, H, U, K) at ``place`` (B, N)."""
        h = self.norm_self(x)
        keys, values = self.self_attention.project(h)
        rows = torch.arange(len(x), device=x.device)[:, None]
        own[0][rows, :, place] = keys.transpose(1, 2).to(own.dtype)
        own[1][rows, :, place] = values.transpose(1, 2).to(own.dtype)
        size = own_mask.shape[-1]
        x = x + self.self_attention(h, own[0, :, :, :size], own[1, :, :, :size], mask=own_mask)
        x = x + self.cross_attention(self.norm_cross(x), cross[0], cross[1], mask=cross_mask)
        return x + self.feed_forward(x)


class Decoder(nn.Module):
    """Tokens and encoder output to scores of the next token; the head shares the embedding's weight."""

    sinusoids: Tensor

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width, padding_idx=config.pad)
        # NeMo divides the sinusoids by sqrt(width) instead of multiplying the embedding by it.
        table = sinusoids(config.positions, config.width) / math.sqrt(config.width)
        self.register_buffer("sinusoids", table, persistent=False)
        self.embedding_norm = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head_bias = nn.Parameter(torch.zeros(config.vocabulary))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.sinusoids[positions]
        return self.dropout(self.embedding_norm(x))

    def head(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embedding.weight, self.head_bias)

    def forward(self, tokens: Tensor, encoded: Tensor, encoded_lengths: Tensor) -> Tensor:
        """tokens (B, U), encoded (B, T, D), encoded_lengths (B,) -> logits (B, U, V). Padding sits at the end,
        where causal attention never looks."""
        x = self.embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        mask = length_mask(encoded_lengths, encoded.shape[1])[:, None, None, :]
        for layer in self.layers:
            x = layer(x, encoded, mask)
        return self.head(x)

    def cache(self, encoded: Tensor, encoded_lengths: Tensor, positions: int | None = None) -> DecoderCache:
        """Projects the encoder output (B, T, D) to every layer's cross-attention keys and values, once."""
        cross = torch.stack([torch.stack(layer.cross_attention.project(encoded)) for layer in self.layers])
        return DecoderCache(cross, encoded_lengths, positions or self.config.positions)

    def step(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """The next tokens (B, N) of each row, after those cached -> logits (B, N, V); the cache grows by N."""
        place = cache.used[:, None] + torch.arange(tokens.shape[1], device=tokens.device)  # (B, N)
        size = int(place.max()) + 1
        own_mask = (torch.arange(size, device=tokens.device) <= place[:, :, None])[:, None]  # (B, 1, N, size)
        cross_mask = length_mask(cache.encoded_lengths, cache.cross.shape[4])[:, None, None, :]
        x = self.embed(tokens, place)
        for index, layer in enumerate(self.layers):
            x = layer.step(x, cache.own[index], cache.cross[index], place, own_mask, cross_mask)
        cache.used = cache.used + tokens.shape[1]
        return self.head(x)
