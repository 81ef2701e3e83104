"""The values that a model's configuration may have, whatever file it came from.

A configuration is a few bytes and decides how much memory and time building the model takes, so every value is checked
by range, and the size of the whole by the bytes of weights that come with it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from canter.errors import CheckpointError
from canter.models.layers import ACTIVATIONS
from canter.models.model import ModelConfig

# Field of any part -> least and greatest value. A new part may use these names and add its own.
RANGES: dict[str, tuple[float, float]] = {
    "sample_rate": (1000, 192_000),
    "mels": (1, 512),
    "n_fft": (2, 8192),
    "window": (2, 8192),
    "hop": (1, 8192),
    "preemphasis": (0, 1),
    "dither": (0, 1),
    "pad_seconds": (0, 300),
    "layers": (0, 256),
    "width": (1, 16_384),
    "heads": (1, 512),
    "feedforward": (1, 131_072),
    "kernel_size": (1, 1023),
    "subsampling_channels": (1, 8192),
    "vocabulary": (1, 2_000_000),
    "positions": (1, 1_000_000),
    "pad": (0, 2_000_000),
    "ctc_vocabulary": (0, 2_000_000),
    "ctc_upsampling": (1, 64),
    "dropout": (0, 1),
    "dropout_input": (0, 1),
    "dropout_attention": (0, 1),
    "dropout_activation": (0, 1),
    "layer_drop": (0, 1),
}
CHOICES: dict[str, tuple[str, ...]] = {"norm": ("batch", "layer"), "activation": tuple(ACTIVATIONS)}
MOST_POSITION_VALUES = 2**23
"""Positions times width of tables that are computed, not stored."""
SMALL = 2**24
"""A model of at most this many parameters is built before its weights are looked at."""


def check_config(config: ModelConfig, source: str | Path, stored: int | None = None) -> None:
    """Check every value of ``config`` by type and range, and what must agree between its parts.

    ``stored`` is the number of bytes of weights that come with it: more parameters than bytes are refused. Raises
    CheckpointError naming ``source``, the field, its value and its range.
    """
    _check_fields(config, f"{source}: ")
    features, encoder, decoder = config.features, config.encoder, config.decoder
    heads, mels = getattr(encoder, "heads", 1), getattr(encoder, "mels", features.mels)
    faults = (
        (encoder.width % heads, f"encoder.width {encoder.width} is not a multiple of its {heads} heads"),
        (
            decoder.width % decoder.heads,
            f"decoder.width {decoder.width} is not a multiple of its {decoder.heads} heads",
        ),
        (
            getattr(encoder, "kernel_size", 1) % 2 == 0,
            f"encoder.kernel_size {getattr(encoder, 'kernel_size', 1)} is even",
        ),
        (mels != features.mels, f"encoder.mels is {mels}, but the features have {features.mels} mel bins"),
        (
            getattr(features, "window", 0) > features.n_fft,
            f"features.window {getattr(features, 'window', 0)} is longer than n_fft {features.n_fft}",
        ),
        (features.hop > features.n_fft, f"features.hop {features.hop} is longer than n_fft {features.n_fft}"),
        (
            decoder.pad >= decoder.vocabulary,
            f"decoder.pad {decoder.pad} is beyond the vocabulary of {decoder.vocabulary}",
        ),
        (
            not decoder.learned_positions and decoder.positions * decoder.width > MOST_POSITION_VALUES,
            f"decoder.positions {decoder.positions} of width {decoder.width} take more than "
            f"{MOST_POSITION_VALUES:,} values",
        ),
    )
    for wrong, fault in faults:
        if wrong:
            raise CheckpointError(f"{source}: {fault}")
    parameters = least_parameters(config)
    if stored is not None and parameters > max(stored, SMALL):
        raise CheckpointError(
            f"{source} describes a model of more than {parameters:,} parameters, but its weights have only {stored:,} "
            "bytes; was the configuration edited, or are the weights another model's?"
        )


def _check_fields(part: Any, place: str) -> None:
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), field.name
        if dataclasses.is_dataclass(value):
            _check_fields(value, f"{place}{name}.")
        elif name in CHOICES and value not in CHOICES[name]:
            raise CheckpointError(f"{place}{name} is {value!r:.80}; it must be {' or '.join(map(repr, CHOICES[name]))}")
        elif name in RANGES:
            least, most = RANGES[name]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            whole = field.type not in ("int", int) or isinstance(value, int)
            if not (number and whole and least <= value <= most):
                raise CheckpointError(f"{place}{name} is {value!r:.80}; it must be from {least:,} to {most:,}")


def least_parameters(config: ModelConfig) -> int:
    """Return how many parameters a model of this shape has at least: attention, feed-forward and embedding."""
    encoder, decoder = config.encoder, config.decoder
    feedforward = getattr(encoder, "feedforward", 0)
    return (
        encoder.layers * encoder.width * (4 * encoder.width + 2 * feedforward)
        + decoder.layers * decoder.width * (8 * decoder.width + 2 * decoder.feedforward)
        + (decoder.vocabulary + decoder.positions * decoder.learned_positions) * decoder.width
        + config.ctc_vocabulary * config.ctc_upsampling * encoder.width
        + getattr(encoder, "positions", 0) * encoder.width
        + getattr(encoder, "subsampling_channels", 0) * config.features.mels // 8 * encoder.width
    )
