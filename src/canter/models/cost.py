"""FLOPs of an utterance, and the memory of its training and decoding.

B: utterances, T: encoder frames, U: tokens, prompt and end token included, D: width, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Encoded(Protocol):
    """An encoder's outputs, of which the first is (B, T, D)."""

    def __getitem__(self, place: int, /) -> Tensor: ...


States = TypeVar("States", bound=Encoded)


@dataclass(frozen=True)
class UtteranceCost:
    """FLOPs and memory of one utterance; a multiplication and an addition are two operations."""

    seconds: float
    frames: int
    """T, padding to a fixed length included."""
    tokens: int
    """U."""
    encoder_flops: int
    """Forward pass; training takes about three times as many."""
    decoder_flops: int
    """Forward pass over all tokens, head included."""
    training_bytes: int
    """Activations that autograd keeps for the backward pass, in float32."""
    cache_values: int
    """Keys and values that decoding keeps, of self- and cross-attention: their number."""


def measure_cost(
    model: nn.Module,
    seconds: float,
    tokens: int,
    encode: Callable[[], States],
    decode: Callable[[States], Tensor],
    cached: int,
) -> UtteranceCost:
    """Return the cost of an utterance by running ``model`` on it, which needs no storage on the meta device.

    encode: returns the encoder's outputs. decode: returns logits (1, U, V) from them. cached: keys and values that
    decoding keeps for each frame and token.
    """
    with torch.no_grad():
        encoded = encode()
    frames = encoded[0].shape[1]
    return UtteranceCost(
        seconds=seconds,
        frames=frames,
        tokens=tokens,
        encoder_flops=_flops(encode),
        decoder_flops=_flops(lambda: decode(encoded)),
        training_bytes=_kept_for_backward(model, lambda: decode(encode()).float().log_softmax(-1).sum()),
        cache_values=cached * (frames + tokens),
    )


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def _kept_for_backward(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the bytes of distinct storages that autograd saves while ``run`` runs, parameters excluded."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage  # kept, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())
