"""The Transformer decoder and its key/value cache.

B: utterances, T: encoder frames, U: tokens, D: width, H: heads, K: head width, V: vocabulary, L: layers.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canter.models.features import length_mask
from canter.models.stack import Stack


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
    learned_positions: bool = False
    """Whether positions are learned (Whisper) or sinusoids (Canary)."""
    embedding_norm: bool = True
    """Whether embedded tokens are normalised (Canary)."""
    activation: str = "relu"
    """Of the feed-forward: 'relu' (Canary) or 'gelu' (Whisper)."""
    key_bias: bool = True
    """Whether attention keys have a bias; Whisper's have none."""
    head_bias: bool = True
    """Whether the head has a bias beside the embedding's weight; Whisper's has none."""
    dropout: float = 0.0
    """Of embeddings and of what each sub-layer adds."""
    dropout_attention: float = 0.0
    dropout_activation: float = 0.0
    """Inside the feed-forward."""
    layer_drop: float = 0.0
    """Probability that training leaves a layer out."""


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def sinusoids(positions: int, width: int) -> Tensor:
    """(positions, D): sine on even, cosine on odd columns (Vaswani et al., 2017)."""
    rate = torch.exp(torch.arange(0, width, 2) * -(math.log(10000.0) / width))
    angle = torch.arange(positions)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


class DecoderCache:
    """Keys and values of live rows in every layer: the encoder output's, projected once, and the tokens' so
    far.

    Rows fill slots 0 ... rows-1 of buffers with room for C: ``cross`` (L, 2, C, H, T, K), ``own`` (L, 2, C,
    H, U, K). All rows write their next token at the same ``column``, one that entered later simply starts
    later (``starts``), so a step reads and writes slices alone, whatever the ages of its rows.
    ``cross_mask`` (C, T) and ``own_mask`` (C, U) are 0 where a row attends and -inf where it does not; they
    change only when rows come or go.
    """

    def __init__(self, config: DecoderConfig, like: Tensor):
        """An empty cache of the device of ``like``, and of its type or autocast's; it grows as rows come."""
        if torch.is_autocast_enabled(like.device.type):
            like = like.new_empty(0, dtype=torch.get_autocast_dtype(like.device.type))
        self.cross = like.new_zeros(config.layers, 2, 0, config.heads, 0, config.width // config.heads)
        self.own = self.cross.clone()
        self.cross_mask = self.own_mask = like.new_zeros(0, 0)
        self.start = torch.zeros(0, dtype=torch.long, device=like.device)
        self.starts: list[int] = []  # of live rows, as ``start``, where Python can see them
        self.frames: list[int] = []  # encoder frames of live rows
        self.column = 0

    @property
    def rows(self) -> int:
        return len(self.starts)

    def reserve(self, rows: int, frames: int, before: int, after: int) -> None:
        """Makes room for ``rows`` more rows of so many encoder frames, and for ``before`` columns to the
        left of ``column``, ``after`` to the right."""
        _, _, slots, _, size, _ = self.cross.shape
        more, longer = max(0, self.rows + rows - slots), max(0, frames - size)
        if more or longer:
            self.cross = F.pad(self.cross, (0, 0, 0, longer, 0, 0, 0, more))
            self.cross_mask = F.pad(self.cross_mask, (0, longer, 0, more), value=-math.inf)
            self.own = F.pad(self.own, (0, 0, 0, 0, 0, 0, 0, more))
            self.own_mask = F.pad(self.own_mask, (0, 0, 0, more))
            self.start = F.pad(self.start, (0, more))
        if before > self.column or self.column + after > self.own.shape[4]:
            self._move_columns(before, after)

    def _move_columns(self, before: int, after: int) -> None:
        """Moves live rows to the leftmost columns possible, in longer buffers if need be."""
        live = slice(0, self.rows)
        used = self.own[:, :, live, :, min(self.starts, default=self.column) : self.column].clone()
        column = max(before, used.shape[4])
        # Twice what is needed, so that the rows of a long queue move once in many steps.
        if 2 * (column + after) > self.own.shape[4]:
            self.own = self.own.new_zeros(*self.own.shape[:4], 2 * (column + after), self.own.shape[5])
            self.own_mask = self.own.new_zeros(self.own.shape[2], self.own.shape[4])
        self.own[:, :, live, :, column - used.shape[4] : column] = used
        self.starts = [start + column - self.column for start in self.starts]
        self.column = column
        self._write_starts(0)

    def add(self, prompt_lengths: list[int], frames: list[int]) -> None:
        """New live rows, whose prompts are about to end at ``column``."""
        first = self.rows
        self.starts += [self.column - length for length in prompt_lengths]
        self.frames += frames
        self._write_starts(first)
        lengths = torch.tensor(frames, device=self.start.device)
        attended = length_mask(lengths, self.cross.shape[4])
        self.cross_mask[first : self.rows] = torch.where(attended, 0.0, -math.inf).to(self.cross.dtype)

    def remove(self, slots: list[int]) -> None:
        """Rows leave; the last ones move into their slots, so that live rows stay together."""
        for slot in sorted(slots, reverse=True):
            last = self.rows - 1
            if slot != last:
                used, frames = slice(self.starts[last], self.column), slice(0, self.frames[last])
                self.cross[:, :, slot, :, frames] = self.cross[:, :, last, :, frames]
                self.own[:, :, slot, :, used] = self.own[:, :, last, :, used]
                for table in (self.start, self.cross_mask, self.own_mask):
                    table[slot] = table[last]
                self.starts[slot], self.frames[slot] = self.starts[last], self.frames[last]
            self.starts.pop()
            self.frames.pop()

    def keep(self, rows: Tensor) -> None:
        """Keeps these live rows (indices), in this order and as often as they are named: beams are
        reordered."""
        order = rows.tolist()
        for name in ("cross", "own"):
            setattr(self, name, getattr(self, name)[:, :, rows])
        for name in ("start", "cross_mask", "own_mask"):
            setattr(self, name, getattr(self, name)[rows])
        self.starts, self.frames = [self.starts[row] for row in order], [self.frames[row] for row in order]

    def _write_starts(self, first: int) -> None:
        rows = slice(first, self.rows)
        self.start[rows] = torch.tensor(self.starts[first:], dtype=torch.long)
        before = length_mask(self.start[rows], self.own.shape[4])
        self.own_mask[rows] = torch.where(before, -math.inf, 0.0).to(self.own.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float = 0.0, key_bias: bool = True):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=key_bias)

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
        attention = (d, config.heads, config.dropout_attention, config.key_bias)
        self.norm_self, self.self_attention = nn.LayerNorm(d), Attention(*attention)
        self.norm_cross, self.cross_attention = nn.LayerNorm(d), Attention(*attention)
        self.norm_feed_forward = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, config.feedforward), nn.Linear(config.feedforward, d)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)
        self.dropout_activation = nn.Dropout(config.dropout_activation)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout_activation(self.activation(self.up(self.norm_feed_forward(x)))))

    def forward(self, x: Tensor, encoded: Tensor, encoded_mask: Tensor) -> Tensor:
        """Teacher forcing: x (B, U, D), encoded (B, T, D), encoded_mask (B, 1, 1, T) -> (B, U, D)."""
        h = self.norm_self(x)
        x = x + self.dropout(self.self_attention(h, *self.self_attention.project(h), causal=True))
        h = self.norm_cross(x)
        y = self.cross_attention(h, *self.cross_attention.project(encoded), mask=encoded_mask)
        x = x + self.dropout(y)
        return x + self.dropout(self.feed_forward(x))

    def step(
        self, x: Tensor, own: Tensor, cross: Tensor, own_mask: Tensor | None, cross_mask: Tensor | None
    ) -> Tensor:
        """New tokens x (B, N, D), whose keys and values go to the last N columns of ``own`` (2, B, H, U, K);
        ``cross`` (2, B, H, T, K); additive masks, or None where all is attended."""
        h = self.norm_self(x)
        keys, values = own.unbind(0)
        new_keys, new_values = self.self_attention.project(h)
        keys[:, :, -x.shape[1] :] = new_keys
        values[:, :, -x.shape[1] :] = new_values
        x = x + self.self_attention(h, keys, values, mask=own_mask)
        x = x + self.cross_attention(self.norm_cross(x), *cross.unbind(0), mask=cross_mask)
        return x + self.feed_forward(x)


class Decoder(Stack):
    """Tokens and encoder output to scores of the next token; the head shares the embedding's weight."""

    positions: Tensor
    head_bias: Tensor | None

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width, padding_idx=config.pad)
        # NeMo divides the sinusoids by sqrt(width) instead of multiplying the embedding by it.
        table = sinusoids(config.positions, config.width) / math.sqrt(config.width)
        if config.learned_positions:
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table, persistent=False)
        self.embedding_norm = nn.LayerNorm(config.width) if config.embedding_norm else nn.Identity()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        bias = nn.Parameter(torch.zeros(config.vocabulary)) if config.head_bias else None
        self.register_parameter("head_bias", bias)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions[positions]
        return self.dropout(self.embedding_norm(x))

    def head(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embedding.weight, self.head_bias)

    def forward(self, tokens: Tensor, encoded: Tensor, encoded_lengths: Tensor) -> Tensor:
        """tokens (B, U), encoded (B, T, D), encoded_lengths (B,) -> logits (B, U, V). Padding sits at the
        end, where causal attention never looks. ValueError for more tokens than there are positions."""
        if tokens.shape[1] > self.config.positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens are more than the decoder's {self.config.positions} positions"
            )
        x = self.embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        mask = length_mask(encoded_lengths, encoded.shape[1])[:, None, None, :]
        return self.head(self.run(x, encoded, mask, layer_drop=self.config.layer_drop))

    @property
    def blocks(self) -> Iterable[DecoderLayer]:
        """The layers, by their type."""
        return cast(Iterable[DecoderLayer], self.layers)

    def cache(self) -> DecoderCache:
        """An empty cache, for ``admit`` to fill."""
        return DecoderCache(self.config, like=self.embedding.weight)

    def admit(
        self,
        prompts: list[list[int]],
        encoded: Tensor,
        encoded_lengths: list[int],
        cache: DecoderCache,
    ) -> Tensor:
        """New rows enter the next free slots: the encoder output (m, T, D) is projected to every layer's
        keys and values, once, and the prompts (of any lengths) are read.

        Returns the logits (m, V) of the first token after each prompt.
        """
        first, size, frames = cache.rows, max(map(len, prompts)), max(encoded_lengths)
        cache.reserve(len(prompts), frames, before=size, after=1)
        cache.add([len(prompt) for prompt in prompts], encoded_lengths)
        encoded = encoded[:, :frames]
        for layer, cross in zip(self.blocks, cache.cross.unbind(0)):
            keys, values = layer.cross_attention.project(encoded)
            cross[0, first : cache.rows, :, :frames] = keys
            cross[1, first : cache.rows, :, :frames] = values
        padding = self.config.pad
        tokens = torch.tensor([[padding] * (size - len(prompt)) + prompt for prompt in prompts])
        cache.column -= size
        return self.head(self._advance(tokens.to(encoded.device), cache, first)[:, -1:])[:, 0]

    def step(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """The next tokens (B, N) of all live rows, after those cached -> logits (B, N, V); the cache grows
        by N."""
        cache.reserve(0, 0, before=0, after=tokens.shape[1])
        return self.head(self._advance(tokens, cache))

    def _advance(self, tokens: Tensor, cache: DecoderCache, first: int = 0) -> Tensor:
        """tokens (B, N) of live rows ``first`` on -> hidden states (B, N, D)."""
        rows, column, n = slice(first, cache.rows), cache.column, tokens.shape[1]
        starts, frames = cache.starts[first:], cache.frames[first:]
        oldest, size = min(starts), max(frames)
        steps = torch.arange(column, column + n, device=tokens.device)
        place = steps - cache.start[rows, None]  # (B, N)
        own_mask = cross_mask = None
        if n > 1:
            columns = torch.arange(oldest, column + n, device=tokens.device)
            own_mask = cache.own_mask[rows, None, None, oldest : column + n]
            own_mask = own_mask.masked_fill(columns > steps[:, None], -math.inf)
            # A prompt's left padding attends to itself alone, so that no row of scores is empty.
            own_mask = own_mask.masked_fill(columns == steps[:, None], 0.0)
            place = place.clamp(min=0)
        elif max(starts) > oldest:
            own_mask = cache.own_mask[rows, None, None, oldest : column + 1]
        if min(frames) < size:
            cross_mask = cache.cross_mask[rows, None, None, :size]
        own = cache.own[:, :, rows, :, oldest : column + n]
        cross = cache.cross[:, :, rows, :, :size]
        x = self.embed(tokens, place)
        for layer, layer_own, layer_cross in zip(self.blocks, own.unbind(0), cross.unbind(0)):
            x = layer.step(x, layer_own, layer_cross, own_mask, cross_mask)
        cache.column += n
        return x
