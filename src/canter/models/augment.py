"""Augmentation drawn from an utterance's own seed, whichever other utterances are in its batch.

B: utterances, S: samples, F: feature frames, M: mel bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SpecAugmentConfig:
    """Masks of SpecAugment (Park et al., 2019); the defaults are those of Canary's recipe."""

    frequency_masks: int = 2
    frequency_width: int = 27
    """Maximum width in mel bins; widths are drawn uniformly from 0 on."""
    time_masks: int = 10
    time_width: float = 0.05
    """Maximum width as a fraction of the utterance."""


def spec_augment(features: Tensor, lengths: Tensor, seeds: Sequence[int], config: SpecAugmentConfig) -> Tensor:
    """Return features (B, F, M) with bands of mel bins and spans of frames set to 0, which is their mean.

    lengths: (B,) in frames. seeds: one for each utterance.
    """
    _, frames, mels = features.shape
    bands = np.ones((len(seeds), mels), dtype=bool)
    stretches = np.ones((len(seeds), frames), dtype=bool)
    for row, (seed, size) in enumerate(zip(seeds, lengths.tolist(), strict=True)):
        draw = np.random.default_rng(seed)
        for keep, count, extent, widest in (
            (bands[row], config.frequency_masks, mels, config.frequency_width),
            (stretches[row], config.time_masks, size, int(size * config.time_width)),
        ):
            widths = draw.integers(0, min(widest, extent), count, endpoint=True)
            starts = draw.integers(0, extent - widths, endpoint=True)
            for start, width in zip(starts, widths, strict=True):
                keep[start : start + width] = False
    kept = torch.from_numpy(stretches)[:, :, None] & torch.from_numpy(bands)[:, None, :]
    return features * kept.to(features.device)


def noise(lengths: Tensor, size: int, seeds: Sequence[int]) -> Tensor:
    """Return normal noise (B, size) on the device of ``lengths``: a seed for each row, zero past its length."""
    device = lengths.device
    rows = torch.zeros(len(seeds), size, device=device)
    for row, seed, length in zip(rows, seeds, lengths.tolist(), strict=True):
        generator = torch.Generator(device).manual_seed(seed)
        row[:length] = torch.randn(length, generator=generator, device=device)
    return rows


def change_speed(audio: Tensor, lengths: Tensor, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return audio (B, S) and lengths (B,) in samples at ``factors`` times the speed (and pitch), by resampling.

    The resampling is in the frequency domain; lengths become ``round(length / factor)``. Raises ValueError for a factor
    that is not positive.
    """
    if min(factors) <= 0:
        raise ValueError(f"speed factors must be above 0, not {min(factors)}")
    rows = []
    for row, length, factor in zip(audio, lengths.tolist(), factors, strict=True):
        size = max(1, round(length / factor))
        samples = row[:length]
        if size != length:
            spectrum = torch.fft.rfft(samples.float())
            samples = torch.fft.irfft(spectrum[: size // 2 + 1], n=size) * (size / length)
        rows.append(samples)
    faster = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return faster, torch.tensor([len(row) for row in rows], device=lengths.device)
