"""What a model costs, from its shape alone: parameters, operations, memory. Nothing is computed.

T: encoder frames, U: tokens, prompt and end token included.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from canter.models.model import ModelConfig, SpeechModel


@dataclass(frozen=True)
class UtteranceCost:
    """Of one utterance of so many seconds and tokens. A multiplication and an addition are two operations."""

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
    """What autograd keeps for the backward pass, in float32."""
    cache_values: int
    """Keys and values that decoding keeps, self- and cross-attention, in numbers."""


def parameters(model: SpeechModel) -> dict[str, int]:
    """Parameters by part. The head is the embedding's matrix, counted once."""
    encoder, decoder = model.encoder, model.decoder
    layers = {"encoder layers": _count(encoder.layers), "decoder layers": _count(decoder.layers)}
    rest = _count(decoder) - layers["decoder layers"] - decoder.embedding.weight.numel()
    counts = {
        "encoder input": _count(encoder) - layers["encoder layers"],
        "encoder layers": layers["encoder layers"],
        "projection": _count(model.projection),
        "embedding": decoder.embedding.weight.numel(),
        "decoder layers": layers["decoder layers"],
        "decoder norms and head": rest,
        "CTC head": _count(model.ctc) if model.ctc is not None else 0,
    }
    return {name: count for name, count in counts.items() if count}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def utterance_cost(config: ModelConfig, seconds: float = 10.0, tokens: int = 40) -> UtteranceCost:
    """The cost of an utterance for a model of this shape; it runs on shapes without storage."""
    features = config.features.build()
    with torch.device("meta"):
        model = SpeechModel(config).train()
        feature_frames = max(1, int(features.frames(round(seconds * config.features.sample_rate))))
        inputs = torch.zeros(1, feature_frames, config.features.mels)
        lengths = torch.zeros(1, dtype=torch.long)
        ids = torch.zeros(1, tokens, dtype=torch.long)
    encoded, _ = model.encode(inputs, lengths)
    frames, decoder = encoded.shape[1], config.decoder

    def train() -> None:
        again, _ = model.encode(inputs, lengths)
        model.logits(again, lengths, ids).float().log_softmax(-1).sum()

    return UtteranceCost(
        seconds=seconds,
        frames=frames,
        tokens=tokens,
        encoder_flops=flops(lambda: model.encode(inputs, lengths)),
        decoder_flops=flops(lambda: model.logits(encoded, lengths, ids)),
        training_bytes=kept_for_backward(model, train),
        cache_values=2 * decoder.layers * decoder.width * (frames + tokens),
    )


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def kept_for_backward(model: nn.Module, run: Callable[[], object]) -> int:
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
