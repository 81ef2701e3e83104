"""Augmentation that an utterance gets from its own seed, whoever its batch-mates are.

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
    """The widest of them, in mel bins; widths are drawn uniformly from 0 on."""
    time_masks: int = 10
    time_width: float = 0.05
    """The widest of them, as a share of the utterance."""


def spec_augment(features: Tensor, lengths: Tensor, seeds: Sequence[int], config: SpecAugmentConfig) -> Tensor:
    """Features (B, F, M), lengths (B,) in frames, a seed for each utterance -> features with bands of mel
    bins and stretches of frames set to 0, which is their mean."""
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
    """Normal noise (B, size) on the device of ``lengths``, each row's drawn from its seed, zero past its
    length."""
    device = lengths.device
    rows = torch.zeros(len(seeds), size, device=device)
    for row, seed, length in zip(rows, seeds, lengths.tolist(), strict=True):
        generator = torch.Generator(device).manual_seed(seed)
        row[:length] = torch.randn(length, generator=generator, device=device)
    return rows


def change_speed(audio: Tensor, lengths: Tensor, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Audio (B, S) and lengths (B,) in samples, each utterance ``factor`` times as fast (pitch goes with
    it), by resampling in the frequency domain -> audio, lengths ``round(length / factor)``.

    Raises ValueError for a factor that is not positive.
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
