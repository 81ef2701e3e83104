"""The Transformer decoder.

B: utterances, T: encoder frames, U: tokens, D: width, H: heads, K: head width, V: vocabulary, L: layers.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canter.models.cache import ROUND, DecoderCache
from canter.models.features import attention_mask
from canter.models.stack import Stack
from canter.runtime import upload


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


def gelu(x: Tensor) -> Tensor:
    """In place where no gradient is asked for: the widest tensor of a layer need not exist twice."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


ACTIVATIONS = {"relu": F.relu, "gelu": gelu}
FEW = 5  # rows, up to which a product with a vocabulary's matrix is faster the other way round
PROJECTED = 2  # rows whose keys and values are made together on a CPU: more are no faster, and take memory


def sinusoids(positions: int, width: int) -> Tensor:
    """(positions, D): sine on even, cosine on odd columns (Vaswani et al., 2017)."""
    rate = torch.exp(torch.arange(0, width, 2) * -(math.log(10000.0) / width))
    angle = torch.arange(positions)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


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

    def forward(self, x: Tensor, encoded: Tensor, encoded_mask: Tensor | None) -> Tensor:
        """Teacher forcing: x (B, U, D), encoded (B, T, D), encoded_mask (B, 1, 1, T) or None -> (B, U, D)."""
        h = self.norm_self(x)
        x = x + self.dropout(self.self_attention(h, *self.self_attention.project(h), causal=True))
        h = self.norm_cross(x)
        y = self.cross_attention(h, *self.cross_attention.project(encoded), mask=encoded_mask)
        x = x + self.dropout(y)
        return x + self.dropout(self.feed_forward(x))

    def step(self, x: Tensor, own: Tensor, cross: Tensor, own_mask: Tensor | None, cross_mask: Tensor | None) -> Tensor:
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
        x = (self.embedding(tokens) + self.positions[positions]).to(self.embedding.weight.dtype)
        return self.dropout(self.embedding_norm(x))

    def head(self, x: Tensor) -> Tensor:
        """x (B, U, D) -> logits (B, U, V)."""
        x, weight = self.norm(x), self.embedding.weight
        rows = x.shape[0] * x.shape[1]
        if 1 < rows <= FEW and x.device.type == "cpu" and not torch.is_grad_enabled():
            # MKL copies the right-hand matrix, 80 MB in Whisper, before it multiplies; so that is to be the small one.
            logits = (weight @ x.flatten(0, 1).T).T.contiguous().unflatten(0, x.shape[:2])
            return logits if self.head_bias is None else logits + self.head_bias
        return F.linear(x, weight, self.head_bias)

    def forward(self, tokens: Tensor, encoded: Tensor, encoded_lengths: Tensor) -> Tensor:
        """tokens (B, U), encoded (B, T, D), encoded_lengths (B,) -> logits (B, U, V). Padding sits at the
        end, where causal attention never looks. ValueError for more tokens than there are positions."""
        if tokens.shape[1] > self.config.positions:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the decoder's {self.config.positions} positions")
        x = self.embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        mask = attention_mask(encoded_lengths, encoded.shape[1])
        return self.head(self.run(x, encoded, mask, layer_drop=self.config.layer_drop))

    @property
    def blocks(self) -> Iterable[DecoderLayer]:
        """The layers, by their type."""
        return cast(Iterable[DecoderLayer], self.layers)

    def cache(self, beams: int = 1, rows: int = 0) -> DecoderCache:
        """Return an empty cache, for ``admit`` to fill, of so many beams a row and usually at most ``rows`` rows."""
        return DecoderCache(self.config, like=self.embedding.weight, beams=beams, most=rows)

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
        return self.head(self.read(prompts, encoded, encoded_lengths, cache)[:, -1])

    def read(
        self,
        prompts: list[list[int]],
        encoded: Tensor,
        encoded_lengths: list[int],
        cache: DecoderCache,
    ) -> Tensor:
        """As ``admit``, but returns hidden states (m, P, D) of the prompts, which end at the last of P."""
        first, size, frames = cache.rows, max(map(len, prompts)), max(encoded_lengths)
        cache.reserve(len(prompts), frames, before=size, after=cache.beams)
        cache.add([len(prompt) for prompt in prompts], encoded_lengths)
        together = PROJECTED if cache.on_cpu else len(prompts)
        for begin in range(first, cache.rows, together):
            some = slice(begin, min(begin + together, cache.rows))
            part = encoded[begin - first : some.stop - first, :frames]
            for layer, cross in zip(self.blocks, cache.cross.unbind(0)):
                keys, values = layer.cross_attention.project(part)
                cross[0, some, :, :frames] = keys
                cross[1, some, :, :frames] = values
        padding = self.config.pad
        tokens = upload([[padding] * (size - len(prompt)) + prompt for prompt in prompts], encoded.device)
        cache.column -= size
        return self._advance(tokens, cache, first)

    def step(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """The next tokens (B, N) of all live rows, after those cached -> logits (B, N, V); the cache grows
        by N. N tokens follow one another; in a cache of N beams they are one token of each beam."""
        cache.reserve(0, 0, before=0, after=tokens.shape[1])
        cache.branch()
        return self.head(self._advance(tokens, cache))

    def _advance(self, tokens: Tensor, cache: DecoderCache, first: int | None = None) -> Tensor:
        """tokens (B, N) of all live rows, or the prompts of those from slot ``first`` on -> hidden states
        (B, N, D)."""
        rows, column, n = slice(first or 0, cache.rows), cache.column, tokens.shape[1]
        starts, frames = cache.starts[rows], cache.frames[rows]
        oldest, size = min(starts), max(frames)
        # a GPU's kernels read a mask in aligned pieces; what is before a row's start is masked
        if tokens.is_cuda:
            oldest -= oldest % ROUND
        beams = cache.beams > 1 and first is None
        own_mask = cross_mask = None
        if beams:
            place = cache.prompt[rows, None]
            place = place + (column - cache.start[rows, None] - place) // n
            own_mask = cache.own_mask[rows, None, :, oldest : column + n]
        else:
            steps = torch.arange(column, column + n, device=tokens.device)
            place = steps - cache.start[rows, None]  # (B, N)
            if n > 1:
                columns = torch.arange(oldest, column + n, device=tokens.device)
                own_mask = cache.own_mask[rows, None, :1, oldest : column + n]
                own_mask = own_mask.masked_fill(columns > steps[:, None], -math.inf)
                # A prompt's left padding attends to itself alone, so that no row of scores is empty.
                own_mask = own_mask.masked_fill(columns == steps[:, None], 0.0)
                place = place.clamp(min=0)
            elif max(starts) > oldest:
                own_mask = cache.own_mask[rows, None, :1, oldest : column + 1]
        if min(frames) < size:
            cross_mask = cache.cross_mask[rows, None, None, :size]
        own = cache.own[:, :, rows, :, oldest : column + n]
        cross = cache.cross[:, :, rows, :, :size]
        x = self.embed(tokens, place)
        for layer, layer_own, layer_cross in zip(self.blocks, own.unbind(0), cross.unbind(0)):
            x = layer.step(x, layer_own, layer_cross, own_mask, cross_mask)
        cache.column += n
        return x

    def cross_weights(self, tokens: Tensor, cross: Tensor, heads: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Where the tokens (U,) of one row look: ``cross`` (L, 2, H, T, K) of its cache, ``heads`` pairs of
        layer and head -> weights (heads, U, T), float32, and logits (U, V)."""
        x = self.embed(tokens[None], torch.arange(len(tokens), device=tokens.device))
        found: dict[tuple[int, int], Tensor] = {}
        for number, (layer, (keys, values)) in enumerate(zip(self.blocks, cross.unbind(0))):
            h = layer.norm_self(x)
            x = x + layer.self_attention(h, *layer.self_attention.project(h), causal=True)
            h = layer.norm_cross(x)
            for head in (head for one, head in heads if one == number):
                query = layer.cross_attention.split(layer.cross_attention.query(h))[0, head].float()
                scores = query @ keys[head].float().T / math.sqrt(query.shape[-1])
                found[number, head] = scores.softmax(-1)
            x = x + layer.cross_attention(h, keys[None], values[None])
            x = x + layer.feed_forward(x)
        return torch.stack([found[pair] for pair in heads]), self.head(x)[0]

    def fixed_step(self, tokens: Tensor, column: Tensor, cache: DecoderCache, columns: int, frames: int) -> Tensor:
        """As ``step``, of shapes and addresses that do not change from step to step, for CUDA graphs.

        tokens (R, N) of the first R slots, live or not; ``column`` (1,) is the cache's, on the device, below
        ``columns`` - N; ``frames``: of cross-attention that are looked at. The caller has made room, has
        called ``cache.branch`` and moves ``cache.column`` on. -> logits (R, N, V).
        """
        r, n = tokens.shape
        own, cross = cache.own[:, :, :r, :, :columns], cache.cross[:, :, :r, :, :frames]
        prompt, start = cache.prompt[:r, None], cache.start[:r, None]
        place = (prompt + (column - start - prompt) // n).clamp(0, self.config.positions - 1)
        written = column + torch.arange(n, device=tokens.device)
        index = torch.arange(columns, device=tokens.device)
        own_mask = cache.own_mask[:r, None, :, :columns].masked_fill(index > written[-1], -math.inf)
        if n == 1:  # slots without a row attend to something, else they would become NaN
            own_mask = own_mask.masked_fill(index == column, 0.0)
        cross_mask = cache.cross_mask[:r, None, None, :frames]
        x = self.embed(tokens, place)
        for layer, (keys, values), layer_cross in zip(self.blocks, own.unbind(0), cross.unbind(0)):
            h = layer.norm_self(x)
            new_keys, new_values = layer.self_attention.project(h)
            keys.index_copy_(2, written, new_keys.to(keys.dtype))
            values.index_copy_(2, written, new_values.to(values.dtype))
            x = x + layer.self_attention(h, keys, values, mask=own_mask)
            x = x + layer.cross_attention(layer.norm_cross(x), *layer_cross.unbind(0), mask=cross_mask)
            x = x + layer.feed_forward(x)
        return self.head(x)
