"""What moving layers from decoder to encoder is worth, with and without caches (Żelasko et al., 2025, arXiv
2503.05931).

The paper's gain came with a decoder that projects the encoder output anew at every step; this measures the
shift and the cache apart, on random weights if need be: every row decodes a given number of tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from canter.inference.naive import CACHES, generate
from canter.models.model import SpeechModel


@dataclass(frozen=True)
class ShiftRow:
    """One model with one cache; seconds are medians over the repeats."""

    shape: str
    """Encoder and decoder layers, as 4/6."""
    cache: str
    """What is cached: see canter.inference.naive."""
    parameters: int
    encoder_seconds: float
    """Features and encoder."""
    decoder_seconds: float
    rtfx: float
    """Seconds of audio for each second of encoder and decoder."""
    speedup: float
    """Against the first row."""


def measure_shift(
    models: dict[str, SpeechModel],
    audio: Tensor,
    lengths: Tensor,
    tokens_per_row: int,
    repeats: int = 3,
    caches: Sequence[str] = CACHES,
    prompt_tokens: int = 4,
) -> list[ShiftRow]:
    """Times every model of ``models`` (by its shape's name) on one batch under every cache.

    audio (B, S) at the models' rate, lengths (B,) in samples. The repeats are interleaved, so that a slow
    moment of the machine falls on all rows alike, and each kind of run is warmed up by one token.
    """
    prompt = torch.ones(len(audio), prompt_tokens, dtype=torch.long, device=audio.device)
    encoders: dict[str, list[float]] = {shape: [] for shape in models}
    decoders: dict[tuple[str, str], list[float]] = {}
    with torch.inference_mode():
        for repeat in range(repeats + 1):  # the first warms up
            for shape, model in models.items():
                model.eval()
                begun = _now()
                encoded, frames = model.encode(*model.features(audio, lengths))
                encoded = model.projection(encoded)
                if repeat:
                    encoders[shape].append(_now() - begun)
                for cache in caches:
                    begun = _now()
                    generate(model.decoder, encoded, frames, prompt, tokens_per_row if repeat else 1, cache)
                    if repeat:
                        decoders.setdefault((shape, cache), []).append(_now() - begun)
    audio_seconds = int(lengths.sum()) / next(iter(models.values())).config.features.sample_rate
    rows: list[ShiftRow] = []
    for (shape, cache), seconds in decoders.items():
        encoder, decoder = median(encoders[shape]), median(seconds)
        rtfx = audio_seconds / (encoder + decoder)
        speedup = rtfx / rows[0].rtfx if rows else 1.0
        parameters = sum(parameter.numel() for parameter in models[shape].parameters())
        rows.append(ShiftRow(shape, cache, parameters, encoder, decoder, rtfx, speedup))
    return rows


def _now() -> float:
    """Seconds, once the device is done with what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
