"""Decode with less cached than the engine does, to measure the gain of each cache; all three give the same tokens.

``none``: every step runs the training forward pass over the complete prefix. ``hidden``: as the released NeMo toolkit,
cache each layer's inputs and project the keys and values of self- and cross-attention from them at every step.
``full``: the calls of the engine, which caches keys and values.

B: rows, T: encoder frames, D: width, P: prompt tokens, U: tokens generated.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from canter.models.decoder import Decoder
from canter.models.features import length_mask
from canter.models.layers import KeyValues

Cache = Literal["hidden", "full", "none"]
CACHES: tuple[Cache, ...] = get_args(Cache)


@torch.inference_mode()
def generate(decoder: Decoder, encoded: Tensor, lengths: Tensor, prompt: Tensor, tokens: int, cache: Cache) -> Tensor:
    """Decode ``tokens`` tokens for each row by greedy search, ignoring end tokens.

    encoded (B, T, D) at the decoder's width, lengths (B,), prompt (B, P) -> (B, U). Raises ValueError for a
    ``cache`` that is not in CACHES.
    """
    if cache not in CACHES:
        raise ValueError(f"no cache {cache!r}; there are {', '.join(CACHES)}")
    start = {"none": _without_cache, "hidden": _with_hidden_states, "full": _with_keys_and_values}[cache]
    advance, logits = start(decoder, encoded, lengths, prompt)
    chosen = [logits.argmax(-1, keepdim=True)]
    while len(chosen) < tokens:
        chosen.append(advance(chosen[-1]).argmax(-1, keepdim=True))
    return torch.cat(chosen, dim=1)


# Each of these reads the prompt, and returns a function from the next tokens (B, 1) to logits (B, V), and the logits
# after the prompt.
Start = tuple[Callable[[Tensor], Tensor], Tensor]


def _without_cache(decoder: Decoder, encoded: Tensor, lengths: Tensor, prompt: Tensor) -> Start:
    prefix = prompt

    def last_logits() -> Tensor:
        return decoder(prefix, encoded, lengths)[:, -1]

    def advance(token: Tensor) -> Tensor:
        nonlocal prefix
        prefix = torch.cat([prefix, token], dim=1)
        return last_logits()

    return advance, last_logits()


def _with_hidden_states(decoder: Decoder, encoded: Tensor, lengths: Tensor, prompt: Tensor) -> Start:
    mask = length_mask(lengths, encoded.shape[1])[:, None, None, :]
    hidden: list[Tensor | None] = [None] * decoder.config.layers  # (B, tokens so far, D), each layer's inputs
    used = 0

    def advance(tokens: Tensor) -> Tensor:
        nonlocal used
        places = torch.arange(used, used + tokens.shape[1], device=tokens.device)
        used += tokens.shape[1]
        causal = torch.arange(used, device=tokens.device) <= places[:, None]
        x = decoder.embed(tokens, places)
        for index, layer in enumerate(decoder.blocks):
            before = hidden[index]
            hidden[index] = states = x if before is None else torch.cat([before, x], dim=1)
            past = KeyValues(*layer.self_attention.project(layer.norm_self(states)))
            x = layer.attend(x, layer.norm_self, layer.self_attention, past, causal)
            x = layer.feed_forward(layer.attend(x, layer.norm_cross, layer.cross_attention, encoded, mask))
        return decoder.head(x[:, -1])

    return advance, advance(prompt)


def _with_keys_and_values(decoder: Decoder, encoded: Tensor, lengths: Tensor, prompt: Tensor) -> Start:
    cache = decoder.cache()
    logits = decoder.admit(prompt.tolist(), encoded, lengths.tolist(), cache)
    return lambda token: decoder.step(token, cache)[:, -1], logits
