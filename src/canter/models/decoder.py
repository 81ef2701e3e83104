"""The Transformer decoder.

B: utterances, T: encoder frames, U: tokens, D: width, H: heads, K: head width, V: vocabulary, L: layers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canter.models.cache import ROUND, DecoderCache
from canter.models.features import attention_mask
from canter.models.layers import Attention, KeyValues, Stack, TransformerLayer, rates, sinusoids, whisper_rates
from canter.models.lora import AdapterBank
from canter.models.packing import PackedMask, Packing
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
    """Maximum number of tokens, prompt and end token included."""
    pad: int = 0
    """Id of the padding token."""
    learned_positions: bool = False
    """Learned positions (Whisper) instead of sinusoids (Canary)."""
    fairseq_positions: bool = False
    """Sinusoids of fairseq: all sines first, counted from ``pad`` + 1 (Seamless)."""
    embedding_norm: bool = True
    """LayerNorm on embedded tokens (Canary)."""
    activation: str = "relu"
    """Activation of the feed-forward: 'relu' (Canary) or 'gelu' (Whisper)."""
    key_bias: bool = True
    """Bias of the attention keys; Whisper's have none."""
    head_bias: bool = True
    """Bias of the head, beside the embedding's weight; Whisper's has none."""
    tied: bool = True
    """Share the embedding's weight with the head; OWSM's head has a weight of its own."""
    scale_embedding: bool = False
    """Multiply embedded tokens by sqrt(width), and do not divide sinusoids by it (OWSM)."""
    epsilon: float = 1e-5
    """Epsilon of every LayerNorm; OWSM's is 1e-12."""
    dropout: float = 0.0
    """Dropout of embeddings and of the output of each sub-layer."""
    dropout_attention: float = 0.0
    dropout_activation: float = 0.0
    """Dropout inside the feed-forward."""
    layer_drop: float = 0.0
    """Probability of dropping a layer in training."""


FEW = 5  # rows, up to which a product with a vocabulary's matrix is faster the other way round
PROJECTED = 2  # rows whose keys and values are made together on a CPU: more are no faster, and take memory


class DecoderLayer(TransformerLayer):
    """Pre-norm self-attention, cross-attention and feed-forward, each residual."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        d = config.width
        attention = (d, config.heads, config.dropout_attention, config.key_bias)
        self.norm_self, self.self_attention = nn.LayerNorm(d, config.epsilon), Attention(*attention)
        self.norm_cross, self.cross_attention = nn.LayerNorm(d, config.epsilon), Attention(*attention)
        self.build_feed_forward(d, config.feedforward, config.activation, config.dropout, config.dropout_activation)
        self.norm_feed_forward.eps = config.epsilon

    def forward(
        self,
        x: Tensor,
        encoded: Tensor | KeyValues,
        encoded_mask: Tensor | PackedMask | None,
        past: KeyValues | None = None,
        past_mask: Tensor | PackedMask | None = None,
    ) -> Tensor:
        """Return the layer's output (B, U, D) for tokens ``x`` (B, U, D).

        ``encoded`` is the encoder's output (B, T, D), or its keys and values from a cache. Without ``past`` tokens
        attend to those before them (teacher forcing); else to ``past``, which takes up their keys and values.
        Masks broadcast to (B, H, U, T) and (B, H, U, N); None: everything is attended; packed: of packed tokens.
        """
        x = self.attend(x, self.norm_self, self.self_attention, past, past_mask, causal=past is None)
        x = self.attend(x, self.norm_cross, self.cross_attention, encoded, encoded_mask)
        return self.feed_forward(x)


class Decoder(Stack):
    """Tokens and encoder output to scores of the next token; the head shares the embedding's weight."""

    positions: Tensor
    head_bias: Tensor | None
    bank: AdapterBank | None = None
    """Adapters of which each row has one, or none."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width, padding_idx=config.pad)
        # NeMo divides the sinusoids by sqrt(width) instead of multiplying the embedding by it.
        self.scale = math.sqrt(config.width) if config.scale_embedding else 1.0
        places = torch.arange(config.positions)
        if config.fairseq_positions:
            table = sinusoids(places + config.pad + 1, whisper_rates(config.width), alternate=False)
        else:
            table = sinusoids(places, rates(config.width))
        table = table * (self.scale / math.sqrt(config.width))
        if config.learned_positions:
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table, persistent=False)
        self.embedding_norm = nn.LayerNorm(config.width) if config.embedding_norm else nn.Identity()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.epsilon)
        if not config.tied:
            self.output = nn.Parameter(torch.empty(config.vocabulary, config.width).normal_(std=config.width**-0.5))
        bias = nn.Parameter(torch.zeros(config.vocabulary)) if config.head_bias else None
        self.register_parameter("head_bias", bias)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.scale != 1:
            x = x * self.scale
        x = (x + self.positions[positions]).to(self.embedding.weight.dtype)
        return self.dropout(self.embedding_norm(x))

    def head(self, x: Tensor) -> Tensor:
        """Return logits (B, U, V) of hidden states ``x`` (B, U, D)."""
        x, weight = self.norm(x), self.embedding.weight if self.config.tied else self.output
        rows = x.shape[0] * x.shape[1]
        if 1 < rows <= FEW and x.device.type == "cpu" and not torch.is_grad_enabled():
            # MKL copies the right-hand matrix, 80 MB in Whisper, before it multiplies; so that is to be the small one.
            logits = (weight @ x.flatten(0, 1).T).T.contiguous().unflatten(0, x.shape[:2])
            return logits if self.head_bias is None else logits + self.head_bias
        return F.linear(x, weight, self.head_bias)

    def forward(self, tokens: Tensor, encoded: Tensor, encoded_lengths: Tensor) -> Tensor:
        """Return logits (B, U, V) of tokens (B, U), for encoded (B, T, D), encoded_lengths (B,).

        Padding is on the right, where causal attention never looks. Raises ValueError for more tokens than there are
        positions.
        """
        if tokens.shape[1] > self.config.positions:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the decoder's {self.config.positions} positions")
        x = self.embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        mask = attention_mask(encoded_lengths, encoded.shape[1])
        return self.head(self.run(x, encoded, mask, layer_drop=self.config.layer_drop))

    def packed(self, tokens: Sequence[Tensor], own: Packing, encoded: Tensor, frames: Packing) -> Tensor:
        """Return logits (1, N, V) of groups of tokens (B, U), packed as in ``own``, for packed encoded (1, N', D).

        Raises ValueError for more tokens than there are positions.
        """
        longest = max(own.sizes)
        if longest > self.config.positions:
            raise ValueError(f"{longest} tokens are more than the decoder's {self.config.positions} positions")
        places = torch.arange(longest, device=encoded.device)
        x = self.embed(own.pack(tokens), own.pack([places[: one.shape[1]].expand_as(one) for one in tokens]))
        among, on_frames = PackedMask(own, own), PackedMask(own, frames)
        return self.head(self.run(x, encoded, on_frames, None, among, layer_drop=self.config.layer_drop))

    @property
    def blocks(self) -> Iterable[DecoderLayer]:
        """The layers, by their type."""
        return cast(Iterable[DecoderLayer], self.layers)

    def cache(self, beams: int = 1, rows: int = 0) -> DecoderCache:
        """Return an empty cache for ``admit`` to fill, with ``beams`` per row and usually at most ``rows`` rows."""
        return DecoderCache(self.config, like=self.embedding.weight, beams=beams, most=rows)

    def admit(
        self,
        prompts: list[list[int]],
        encoded: Tensor,
        encoded_lengths: list[int],
        cache: DecoderCache,
        adapters: list[int] | None = None,
    ) -> Tensor:
        """Add rows to the cache, and return the logits (m, V) of the first token after each prompt.

        The encoder output (m, T, D) is projected to every layer's keys and values, once; prompts may have any lengths.
        adapters: number of each row's adapter in the bank, 0 for none (default: none has one).
        """
        return self.head(self.read(prompts, encoded, encoded_lengths, cache, adapters)[:, -1])

    def read(
        self,
        prompts: list[list[int]],
        encoded: Tensor,
        encoded_lengths: list[int],
        cache: DecoderCache,
        adapters: list[int] | None = None,
    ) -> Tensor:
        """Add rows as ``admit`` does, and return hidden states (m, P, D) of the prompts, which end at the last of P."""
        first, size, frames = cache.rows, max(map(len, prompts)), max(encoded_lengths)
        cache.reserve(len(prompts), frames, before=size, after=cache.beams)
        cache.add([len(prompt) for prompt in prompts], encoded_lengths, adapters)
        together = PROJECTED if cache.on_cpu else len(prompts)
        for begin in range(first, cache.rows, together):
            some = slice(begin, min(begin + together, cache.rows))
            part = encoded[begin - first : some.stop - first, :frames]
            self._use_adapters(cache, some)
            for layer, cross in zip(self.blocks, cache.cross.unbind(0)):
                keys, values = layer.cross_attention.project(part)
                cross[0, some, :, :frames] = keys
                cross[1, some, :, :frames] = values
        padding = self.config.pad
        tokens = upload([[padding] * (size - len(prompt)) + prompt for prompt in prompts], encoded.device)
        cache.column -= size
        return self._advance(tokens, cache, first)

    def step(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """Return logits (B, N, V) of the next tokens (B, N) of all live rows; the cache grows by N columns.

        N tokens follow one another, such as drafted ones, of which `DecoderCache.rewind` takes wrong ones back; in a
        cache of N beams they are one token of each beam.
        """
        cache.reserve(0, 0, before=0, after=tokens.shape[1])
        cache.branch()
        return self.head(self._advance(tokens, cache))

    def _use_adapters(self, cache: DecoderCache, rows: slice) -> None:
        """Let the layers use the adapters of these rows. Graphs of a GPU have one form, with adapters or without."""
        if self.bank:
            self.bank.rows = cache.adapter[rows] if cache.own.is_cuda or any(cache.adapters[rows]) else None

    def _advance(self, tokens: Tensor, cache: DecoderCache, first: int | None = None) -> Tensor:
        """Return hidden states of tokens (B, N) of all live rows, or of the prompts of those from slot ``first`` on."""
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
                if first is not None:  # a prompt's left padding attends to itself, so that no row of scores is empty
                    own_mask = own_mask.masked_fill(columns == steps[:, None], 0.0)
                place = place.clamp(0, self.config.positions - 1)
            elif max(starts) > oldest or any(cache.holes[rows]):
                own_mask = cache.own_mask[rows, None, :1, oldest : column + 1]
        if min(frames) < size:
            cross_mask = cache.cross_mask[rows, None, None, :size]
        own = cache.own[:, :, rows, :, oldest : column + n]
        cross = cache.cross[:, :, rows, :, :size]
        cache.column += n
        self._use_adapters(cache, rows)
        return self._run_cached(tokens, place, own, own_mask, cross, cross_mask, slice(-n, None))

    def _run_cached(
        self,
        tokens: Tensor,
        places: Tensor,
        own: Tensor,
        own_mask: Tensor | None,
        cross: Tensor,
        cross_mask: Tensor | None,
        columns: slice | Tensor,
    ) -> Tensor:
        """Return hidden states (B, N, D) of tokens (B, N), whose keys and values go to ``columns`` of ``own``."""
        x = self.embed(tokens, places)
        for layer, (keys, values), encoded in zip(self.blocks, own.unbind(0), cross.unbind(0)):
            past = KeyValues(keys, values, columns)
            x = layer.forward(x, KeyValues(*encoded.unbind(0)), cross_mask, past, own_mask)  # never the compiled layer
        return x

    def cross_weights(
        self, tokens: Tensor, cross: Tensor, heads: list[tuple[int, int]], adapter: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return cross-attention weights (heads, U, T), float32, and logits (U, V) of the tokens (U,) of one row.

        cross: (L, 2, H, T, K) of its cache. heads: pairs of layer and head. adapter: the row's number in the bank.
        """
        if self.bank:
            self.bank.rows = torch.tensor([adapter], device=tokens.device) if adapter else None
        x = self.embed(tokens[None], torch.arange(len(tokens), device=tokens.device))
        found: dict[tuple[int, int], Tensor] = {}
        for number, (layer, encoded) in enumerate(zip(self.blocks, cross[:, :, None].unbind(0))):
            keys, values = encoded.unbind(0)
            x = layer.attend(x, layer.norm_self, layer.self_attention, causal=True)
            if any(number == one for one, _ in heads):
                weights = layer.cross_attention.weights(layer.norm_cross(x), keys)[0]
                found |= {(one, head): weights[head] for one, head in heads if one == number}
            x = layer.attend(x, layer.norm_cross, layer.cross_attention, KeyValues(keys, values))
            x = layer.feed_forward(x)
        return torch.stack([found[pair] for pair in heads]), self.head(x)[0]

    def fixed_step(self, tokens: Tensor, column: Tensor, cache: DecoderCache, columns: int, frames: int) -> Tensor:
        """Return logits (R, N, V) as ``step`` does, in shapes and addresses that never change, for CUDA graphs.

        tokens: (R, N) of the first R slots, live or not. column: (1,), the cache's, on the device, below ``columns`` -
        N. frames: number of encoder frames attended to. The caller has made room, has called ``cache.branch`` and
        advances ``cache.column``.
        """
        r, n = tokens.shape
        self._use_adapters(cache, slice(0, r))
        own, cross = cache.own[:, :, :r, :, :columns], cache.cross[:, :, :r, :, :frames]
        start = cache.start[:r, None]
        written = column + torch.arange(n, device=tokens.device)
        index = torch.arange(columns, device=tokens.device)
        own_mask = cache.own_mask[:r, None, :, :columns]
        if cache.beams > 1:
            prompt = cache.prompt[:r, None]
            place = prompt + (column - start - prompt) // n
            own_mask = own_mask.masked_fill(index > written[-1], -math.inf)
        else:
            place = written - start
            own_mask = own_mask.masked_fill(index > written[:, None], -math.inf)
            # slots without a row attend to something, else they would become NaN
            own_mask = own_mask.masked_fill(index == written[:, None], 0.0)
        place = place.clamp(0, self.config.positions - 1)
        cross_mask = cache.cross_mask[:r, None, None, :frames]
        return self.head(self._run_cached(tokens, place, own, own_mask, cross, cross_mask, written))
