"""How long encoding and decoding take on this machine, and what other numbers of layers would take."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from canter.models.model import SpeechModel


@dataclass(frozen=True)
class StackTime:
    """Seconds of a stack: what does not depend on its depth, and a layer."""

    rest: float
    layer: float

    def of(self, layers: int) -> float:
        """Seconds with so many layers."""
        return self.rest + layers * self.layer


@dataclass(frozen=True)
class DecodingTime:
    """Seconds to encode a batch and to decode it with caches."""

    encoder: StackTime
    decoder: StackTime


@torch.no_grad()
def measure(model: SpeechModel, seconds: float = 10.0, tokens: int = 40, batch: int = 4) -> DecodingTime:
    """Times ``model`` as it is and with one layer left, on a batch of silence of so many seconds and
    tokens."""
    was_training = model.training
    model.eval()
    device = model.decoder.embedding.weight.device
    samples = round(seconds * model.config.features.sample_rate)
    audio = torch.zeros(batch, samples, device=device)
    features, frames = model.features(audio, torch.full((batch,), samples, device=device))
    encoded, lengths = model.encode(features, frames)
    projected, sizes = model.projection(encoded), lengths.tolist()

    def decode() -> None:
        cache = model.decoder.cache()
        model.decoder.admit([[0]] * batch, projected, sizes, cache)
        step = torch.zeros(batch, 1, dtype=torch.long, device=device)
        for _ in range(tokens - 1):
            model.decoder.step(step, cache)

    try:
        return DecodingTime(
            encoder=_by_depth(model.encoder, lambda: model.encode(features, frames)),
            decoder=_by_depth(model.decoder, decode),
        )
    finally:
        model.train(was_training)


def _by_depth(part: nn.Module, run: Callable[[], object]) -> StackTime:
    layers, config = part.layers, part.config
    assert isinstance(layers, nn.ModuleList)
    whole = seconds_of(run)
    if len(layers) == 1:
        return StackTime(0.0, whole)
    try:
        part.layers, part.config = layers[:1], replace(config, layers=1)  # pyright: ignore
        one = seconds_of(run)
    finally:
        part.layers, part.config = layers, config
    layer = max(0.0, (whole - one) / (len(layers) - 1))
    return StackTime(max(0.0, whole - len(layers) * layer), layer)


def seconds_of(run: Callable[[], object], repeats: int = 3) -> float:
    """The least of ``repeats``, after one run to warm up: what else runs on the machine only adds."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
