"""Measure the gain of moving layers from decoder to encoder, with and without caches.

The gain of Żelasko et al. (2025, arXiv 2503.05931) came with a decoder that projects the encoder output again at every
step. Here each model decodes the same batch with every cache of `canter.demo.naive`, so the two effects are separate.
Every row decodes a given number of tokens, so weights may be random.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from canter.demo.naive import CACHES, Cache, generate
from canter.models.model import SpeechModel


@dataclass(frozen=True)
class ShiftRow:
    """One model with one cache; seconds are medians over the repeats."""

    shape: str
    """Encoder and decoder layers, such as 4/6."""
    cache: Cache
    parameters: int
    encoder_seconds: float
    """Features and encoder."""
    decoder_seconds: float
    rtfx: float
    """Seconds of audio per second of encoder and decoder."""
    speedup: float
    """RTFx relative to the first row."""


def measure_shift(
    models: Mapping[str, SpeechModel],
    audio: Tensor,
    lengths: Tensor,
    tokens_per_row: int,
    repeats: int = 3,
    caches: Sequence[Cache] = CACHES,
    prompt_tokens: int = 4,
) -> list[ShiftRow]:
    """Time every model of ``models``, a mapping from shape to model, on one batch with every cache.

    audio (B, S) at the models' sample rate, lengths (B,) in samples. Repeats are interleaved, so that a slow moment of
    the machine affects all rows alike; the first repeat, of one token, warms up.
    """
    prompt = torch.ones(len(audio), prompt_tokens, dtype=torch.long, device=audio.device)
    encoders: dict[str, list[float]] = {shape: [] for shape in models}
    decoders: dict[tuple[str, Cache], list[float]] = {}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for shape, model in models.items():
                model.eval()
                begun = synchronised_time()
                encoded, frames = model.encode(*model.features(audio, lengths))
                encoded = model.projection(encoded)
                if repeat:
                    encoders[shape].append(synchronised_time() - begun)
                for cache in caches:
                    begun = synchronised_time()
                    generate(model.decoder, encoded, frames, prompt, tokens_per_row if repeat else 1, cache)
                    if repeat:
                        decoders.setdefault((shape, cache), []).append(synchronised_time() - begun)
    audio_seconds = int(lengths.sum()) / next(iter(models.values())).config.features.sample_rate
    rows: list[ShiftRow] = []
    for (shape, cache), seconds in decoders.items():
        encoder, decoder = median(encoders[shape]), median(seconds)
        rtfx = audio_seconds / (encoder + decoder)
        speedup = rtfx / rows[0].rtfx if rows else 1.0
        parameters = sum(parameter.numel() for parameter in models[shape].parameters())
        rows.append(ShiftRow(shape, cache, parameters, encoder, decoder, rtfx, speedup))
    return rows


def synchronised_time() -> float:
    """Return the time in seconds, once a GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
