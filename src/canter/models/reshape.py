"""Move capacity from decoder to encoder, starting from trained weights.

A smaller decoder keeps some of its layers. A larger encoder gets new layers between its own, which either change
nothing at first (block expansion of LLaMA Pro, Wu et al., 2024: a copy of the layer before whose outputs are zero), or
are working copies (depth up-scaling, Kim et al., 2023), which changes the function but starts with more to learn from.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from canter.errors import ConfigError
from canter.models.formats.fitting import build
from canter.models.model import ModelConfig, SpeechModel, utterance_cost

Growth = Literal["identity", "copy"]
Kept = Literal["even", "spread", "first", "last"]


def kept_layers(count: int, of: int, kept: Kept = "even") -> list[int]:
    """Return the layers that a stack of ``of`` keeps.

    They are the first, the last, spread from first to last (Distil-Whisper, Gandhi et al., 2023), or at even steps from
    the first on.
    """
    if kept == "first" or count == of:
        return list(range(count))
    if kept == "last":
        return list(range(of - count, of))
    if count == 1 or kept == "even":
        return [place * of // count for place in range(count)]
    return [round(place * (of - 1) / (count - 1)) for place in range(count)]


def grown_layers(count: int, of: int) -> list[tuple[int, bool]]:
    """Return the layers of a stack grown from ``of``: (the layer it comes from, whether it is new).

    New layers are spread evenly, each after the one it is a copy of.
    """
    new = count - of
    layers = []
    for place in range(of):
        copies = (place + 1) * new // of - place * new // of
        layers += [(place, False)] + [(place, True)] * copies
    return layers


def reshape(
    model: SpeechModel,
    *,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    growth: Growth = "identity",
    kept: Kept = "even",
) -> SpeechModel:
    """Return a model with other numbers of layers, started from the weights of ``model``, which does not change.

    With ``growth="identity"`` a larger encoder computes the same function. Raises ConfigError for impossible numbers,
    or an encoder that does not state which of its modules write to the residual stream.
    """
    encoder, decoder = model.config.encoder, model.config.decoder
    wide, deep = encoder_layers or encoder.layers, decoder_layers or decoder.layers
    if deep > decoder.layers:
        raise ConfigError(f"--decoder-layers {deep} is more than the {decoder.layers} there are; decoders only shrink")
    if min(wide, deep) < 1:
        raise ConfigError("encoder and decoder need at least one layer each")
    if wide > encoder.layers and growth == "identity" and not model.encoder.outputs:
        raise ConfigError("this encoder does not tell how to make a layer of no effect; take the growth 'copy'")
    config = with_layers(model.config, wide, deep)
    fresh = build(config, "reshape")
    tensors = {name: x for name, x in model.state_dict().items() if ".layers." not in name}
    if wide > encoder.layers:
        order = grown_layers(wide, encoder.layers)
    else:
        order = [(place, False) for place in kept_layers(wide, encoder.layers, kept)]
    stacked = _stack(model, "encoder", order)
    if growth == "identity":
        _make_identities(stacked, order, model.encoder.outputs, model.encoder.last_norm)
    tensors |= stacked
    tensors |= _stack(model, "decoder", [(place, False) for place in kept_layers(deep, decoder.layers, kept)])
    fresh.load_state_dict(tensors)
    fresh.tokenizer, fresh.characters, fresh.generation = model.tokenizer, model.characters, dict(model.generation)
    if deep != decoder.layers:
        fresh.generation.pop("alignment_heads", None)  # they name layers by their old numbers
    return fresh.to(model.decoder.embedding.weight.device).train(model.training)


def with_layers(config: ModelConfig, encoder_layers: int, decoder_layers: int) -> ModelConfig:
    """Return ``config`` with other numbers of layers."""
    encoder = replace(config.encoder, layers=encoder_layers)  # pyright: ignore[reportArgumentType]
    return replace(config, encoder=encoder, decoder=replace(config.decoder, layers=decoder_layers))


def _stack(model: SpeechModel, part: str, order: Sequence[tuple[int, bool]]) -> dict[str, Tensor]:
    layers = [layer.state_dict() for layer in getattr(model, part).layers]
    return {
        f"{part}.layers.{place}.{name}": tensor.clone()
        for place, (source, _) in enumerate(order)
        for name, tensor in layers[source].items()
    }


def _make_identities(
    tensors: dict[str, Tensor], order: Sequence[tuple[int, bool]], outputs: Sequence[str], last_norm: str
) -> None:
    """Zero what new layers add.

    Where a layer ends in a norm, the one before a new layer loses its scale and shift, which the new one has copied:
    the norm of a normalised vector is the vector.
    """
    for place, (_, new) in enumerate(order):
        if not new:
            continue
        for name in outputs:
            for leaf in ("weight", "bias"):
                tensor = tensors.get(f"encoder.layers.{place}.{name}.{leaf}")
                if tensor is not None:
                    tensor.zero_()
        if last_norm:
            tensors[f"encoder.layers.{place - 1}.{last_norm}.weight"].fill_(1.0)
            tensors[f"encoder.layers.{place - 1}.{last_norm}.bias"].zero_()


def encoder_layers_that_keep(
    what: Literal["parameters", "flops"], config: ModelConfig, decoder_layers: int, seconds: float, tokens: int
) -> int:
    """Return the number of encoder layers that keeps parameters, or FLOPs of an utterance, nearest to ``config``.

    The decoder is given ``decoder_layers``; the utterance has ``seconds`` and ``tokens``.
    """

    def size(encoder: int, decoder: int) -> float:
        shape = with_layers(config, encoder, decoder)
        if what == "parameters":
            with torch.device("meta"):
                return sum(SpeechModel(shape).parts().values())
        cost = utterance_cost(shape, seconds, tokens)
        return cost.encoder_flops + cost.decoder_flops

    now = config.encoder.layers
    aim, smaller = size(now, config.decoder.layers), size(now, decoder_layers)
    layer = size(now + 1, decoder_layers) - smaller
    return max(1, now + round((aim - smaller) / layer))


@dataclass(frozen=True)
class StackTime:
    """Seconds of a stack of layers: the part that does not depend on its depth, and a layer."""

    rest: float
    layer: float

    def of(self, layers: int) -> float:
        """Return the seconds with ``layers``."""
        return self.rest + layers * self.layer


@dataclass(frozen=True)
class DecodingTime:
    """Seconds to encode a batch and to decode it with caches."""

    encoder: StackTime
    decoder: StackTime


@torch.no_grad()
def measure_times(model: SpeechModel, seconds: float = 10.0, tokens: int = 40, batch: int = 4) -> DecodingTime:
    """Return the times of ``model``, measured as it is and with one layer, on a batch of silence."""
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
    """Return the least seconds of ``repeats`` runs, after one to warm up: other processes only add to it."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
