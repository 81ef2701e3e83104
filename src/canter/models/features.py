"""Log-mel features, batched, on the device of the model.

B: utterances, S: samples, F: feature frames (10 ms), M: mel bins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from canter.models.augment import noise

Count = TypeVar("Count", int, Tensor)
"""A number of samples or frames, or a tensor of them."""


@dataclass(frozen=True)
class FeatureConfig:
    """NeMo's ``AudioToMelSpectrogramPreprocessor``: 25 ms windows every 10 ms, per-feature normalisation."""

    sample_rate: int = 16000
    mels: int = 80
    n_fft: int = 512
    window: int = 400
    """Window length in samples."""
    hop: int = 160
    """Frame shift in samples."""
    preemphasis: float = 0.97
    dither: float = 0.0
    """Standard deviation of the noise added to samples in training."""
    dither_by_length: bool = False
    """Draw the dither from the utterance's number of samples, in inference too (Cohere Transcribe)."""

    def build(self) -> "LogMel":
        return LogMel(self)


def slaney_mel_filters(sample_rate: int, n_fft: int, mels: int) -> np.ndarray:
    """Return triangular mel filters (M, n_fft // 2 + 1) of unit area on Slaney's scale.

    The scale is linear below 1 kHz, logarithmic above (Slaney, Auditory Toolbox, 1998).
    """
    linear, start, step = 200 / 3, 1000.0, np.log(6.4) / 27

    def to_mel(hertz: np.ndarray) -> np.ndarray:
        above = start / linear + np.log(np.maximum(hertz, start) / start) / step
        return np.where(hertz < start, hertz / linear, above)

    def to_hertz(mel: np.ndarray) -> np.ndarray:
        knee = start / linear
        return np.where(mel < knee, mel * linear, start * np.exp(step * (mel - knee)))

    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    edges = to_hertz(np.linspace(0.0, to_mel(np.array(sample_rate / 2)), mels + 2))
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """Return a boolean mask (B, size) of lengths (B,), true where a position is valid."""
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]


def attention_mask(lengths: Tensor, size: int) -> Tensor | None:
    """Return a boolean mask (B, 1, 1, size) of lengths (B,), true where keys are attended.

    On a CPU it is None where all are, with which attention is faster (on a GPU one would have to wait to know).
    """
    known = type(lengths) is Tensor and lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and bool((lengths >= size).all()):
        return None
    return length_mask(lengths, size)[:, None, None, :]


def power_of(spectrum: Tensor) -> Tensor:
    """Return |z|^2 of complex numbers, in a fifth of the time of a sum over real and imaginary parts."""
    return spectrum.real.square() + spectrum.imag.square()


class LogMel(nn.Module):
    """Audio to normalised log-mel features, equal to NeMo's preprocessor.

    Padding never reaches a valid frame: samples past an utterance's end are zeroed before the transform, and mean and
    deviation are taken only over its valid frames.
    """

    filters: Tensor
    taper: Tensor

    def __init__(self, config: FeatureConfig):
        super().__init__()
        self.config = config
        filters = slaney_mel_filters(config.sample_rate, config.n_fft, config.mels)
        self.register_buffer("filters", torch.from_numpy(filters), persistent=False)
        self.register_buffer("taper", torch.hann_window(config.window, periodic=False), persistent=False)

    def frames(self, samples):
        """Return the valid feature frames of ``samples`` (an int or a tensor)."""
        return samples // self.config.hop

    def forward(self, audio: Tensor, lengths: Tensor, seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return features (B, F, M) float32 and lengths (B,) in frames of audio (B, S) in [-1, 1), lengths (B,) in
        samples.

        In training mode each utterance's seed draws its dither; without seeds there is none, except for dither that
        follows from the length. F is that of S samples, so that audio padded to a grid of sizes gives a grid of shapes.
        """
        config = self.config
        with torch.autocast(audio.device.type, enabled=False):
            audio = audio.float()
            if config.dither and config.dither_by_length:
                seeds = lengths.tolist()
            if config.dither and seeds is not None and (self.training or config.dither_by_length):
                audio = audio + config.dither * noise(lengths, audio.shape[1], seeds)
            audio = torch.cat([audio[:, :1], audio[:, 1:] - config.preemphasis * audio[:, :-1]], dim=1)
            audio = audio * length_mask(lengths, audio.shape[1])
            size = self.frames(audio.shape[1])
            pad = config.n_fft // 2
            audio = F.pad(audio, (pad, pad))
            spectrum = torch.stft(
                audio, config.n_fft, config.hop, config.window, self.taper, center=False, return_complex=True
            )
            frames = self.frames(lengths)
            power = power_of(spectrum[:, :, :size])
            features = torch.log(torch.matmul(self.filters, power) + 2.0**-24).transpose(1, 2)
            valid = length_mask(frames, size)[:, :, None]
            count = frames[:, None, None].clamp(min=1)
            mean = (features * valid).sum(1, keepdim=True) / count
            square = ((features - mean).square() * valid).sum(1, keepdim=True)
            deviation = (square / (count - 1).clamp(min=1)).sqrt() + 1e-5
            return ((features - mean) / deviation) * valid, frames


class PaddedLogMel(nn.Module):
    """Log-mel features of audio that is padded to a fixed length with silence, or to the longest of its batch.

    The windows are centred: the audio's start is mirrored, and its end too if it is padded. Windows of silence are not
    computed.
    """

    filters: Tensor
    taper: Tensor
    silence: float
    """Value of a window of silence."""

    def __init__(self, config: "WhisperFeatureConfig | EspnetFeatureConfig", window: int):
        super().__init__()
        self.config = config
        filters = slaney_mel_filters(config.sample_rate, config.n_fft, config.mels)
        self.register_buffer("filters", torch.from_numpy(filters), persistent=False)
        self.register_buffer("taper", torch.hann_window(window), persistent=False)

    def frames(self, samples: Count) -> Count:
        """Return the feature frames of ``samples``, or of the padded length if there is one."""
        raise NotImplementedError

    def log_mel(
        self, audio: Tensor, lengths: Tensor, seeds: Sequence[int] | None, log: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the logarithms ``log`` of mel powers (B, F, M), float32, and the frames (B,).

        In training mode each utterance's seed draws its dither. Raises ValueError for audio longer than the padded
        length.
        """
        config = self.config
        size = audio.shape[1]
        if config.pad_seconds:
            size = round(config.pad_seconds * config.sample_rate)
            if audio.shape[1] > size and int(lengths.max()) > size:
                seconds = int(lengths.max()) / config.sample_rate
                raise ValueError(
                    f"an utterance of {seconds:.2f} s is longer than the model's {config.pad_seconds:g} s; cut it first"
                )
        audio = audio.float()
        if self.training and config.dither and seeds is not None:
            audio = audio + config.dither * noise(lengths, audio.shape[1], seeds)
        audio = audio * length_mask(lengths, audio.shape[1])
        total, pad = self.frames(size), config.n_fft // 2
        sounding = min(total, (audio.shape[1] + pad) // config.hop + 1)  # later windows hold only silence
        width = max(size if sounding == total else sounding * config.hop, pad + 1)  # the mirrored start
        audio = F.pad(audio, (0, width - audio.shape[1]))
        ends = audio[:, -pad - 1 : -1].flip(1) if config.pad_seconds else audio.new_zeros(len(audio), pad)
        audio = torch.cat([audio[:, 1 : pad + 1].flip(1), audio, ends], dim=1)
        spectrum = torch.stft(
            audio, config.n_fft, config.hop, len(self.taper), self.taper, center=False, return_complex=True
        )
        power = power_of(spectrum[:, :, :sounding])
        features = log(torch.matmul(self.filters, power).clamp(min=1e-10)).transpose(1, 2)
        return F.pad(features, (0, 0, 0, total - features.shape[1]), value=self.silence), self.frames(lengths)


@dataclass(frozen=True)
class WhisperFeatureConfig:
    """Whisper's log-mel: 25 ms windows every 10 ms, eight decades below the loudest."""

    sample_rate: int = 16000
    mels: int = 80
    n_fft: int = 400
    """FFT size and window length in samples."""
    hop: int = 160
    """Frame shift in samples."""
    pad_seconds: float = 30.0
    """Seconds that every utterance is padded to with silence, as Whisper was trained; 0: no padding, which costs a
    pretrained model some accuracy and saves the time of the silence."""
    dither: float = 0.0
    """Standard deviation of the noise added to samples in training."""

    def build(self) -> "WhisperLogMel":
        return WhisperLogMel(self)


class WhisperLogMel(PaddedLogMel):
    """Audio to Whisper's features; unpadded, an utterance's frames are the first ones of its 30 s."""

    silence = -10.0

    def __init__(self, config: WhisperFeatureConfig):
        super().__init__(config, config.n_fft)

    def frames(self, samples: Count) -> Count:
        """Return the feature frames of ``samples``, or of the padded length if there is one."""
        config = self.config
        if config.pad_seconds:
            return samples * 0 + round(config.pad_seconds * config.sample_rate) // config.hop
        return (samples + config.hop - 1) // config.hop

    def forward(self, audio: Tensor, lengths: Tensor, seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return features and lengths as `LogMel` does; raise ValueError for audio longer than the padded length."""
        with torch.autocast(audio.device.type, enabled=False):
            features, frames = self.log_mel(audio, lengths, seeds, torch.log10)
            valid = length_mask(frames, features.shape[1])[:, :, None]
            loudest = features.masked_fill(~valid, -10.0).amax((1, 2), keepdim=True)
            return (torch.maximum(features, loudest - 8.0) + 4.0) / 4.0 * valid, frames


@dataclass(frozen=True)
class EspnetFeatureConfig:
    """ESPnet's log-mel with global normalisation: 25 ms windows every 10 ms, centred, natural logarithm."""

    sample_rate: int = 16000
    mels: int = 128
    n_fft: int = 512
    window: int = 400
    """Window length in samples."""
    hop: int = 160
    """Frame shift in samples."""
    pad_seconds: float = 30.0
    """Seconds that every utterance is padded to with silence, as OWSM was trained; 0: its own length."""
    dither: float = 0.0
    """Standard deviation of the noise added to samples in training."""

    def build(self) -> "EspnetLogMel":
        return EspnetLogMel(self)


class EspnetLogMel(PaddedLogMel):
    """Audio to ESPnet's features (``DefaultFrontend`` and ``GlobalMVN``), with the mean and deviation of its training
    data; unpadded, an utterance's frames are the first ones of its 30 s."""

    mean: Tensor
    deviation: Tensor
    silence = float(np.log(np.float32(1e-10)))

    def __init__(self, config: EspnetFeatureConfig):
        super().__init__(config, config.window)
        self.register_buffer("mean", torch.zeros(config.mels))
        self.register_buffer("deviation", torch.ones(config.mels))

    def frames(self, samples: Count) -> Count:
        """Return the feature frames of ``samples``, or of the padded length if there is one."""
        config = self.config
        if config.pad_seconds:
            samples = samples * 0 + round(config.pad_seconds * config.sample_rate)
        return samples // config.hop + 1

    def forward(self, audio: Tensor, lengths: Tensor, seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return features and lengths as `LogMel` does; raise ValueError for audio longer than the padded length."""
        with torch.autocast(audio.device.type, enabled=False):
            features, frames = self.log_mel(audio, lengths, seeds, torch.log)
            features = (features - self.mean) / self.deviation
            return features * length_mask(frames, features.shape[1])[:, :, None], frames


@dataclass(frozen=True)
class KaldiFeatureConfig:
    """Kaldi's log-mel filter banks: 25 ms windows every 10 ms that lie within the audio, per-feature normalisation."""

    sample_rate: int = 16000
    mels: int = 80
    n_fft: int = 512
    window: int = 400
    """Window length in samples."""
    hop: int = 160
    """Frame shift in samples."""
    preemphasis: float = 0.97
    dither: float = 0.0
    """Standard deviation of the noise added to samples in training."""

    def build(self) -> "KaldiLogMel":
        return KaldiLogMel(self)


def kaldi_mel_filters(sample_rate: int, n_fft: int, mels: int, lowest: float = 20.0) -> np.ndarray:
    """Return filters (M, n_fft // 2 + 1) of height 1 that are triangular on the mel scale, from ``lowest`` Hz up."""

    def to_mel(hertz: np.ndarray) -> np.ndarray:
        return 1127.0 * np.log1p(hertz / 700.0)

    bins = to_mel(np.linspace(0, sample_rate / 2, n_fft // 2 + 1))
    low, high = to_mel(np.array([lowest, sample_rate // 2])).tolist()
    edges = np.linspace(low, high, mels + 2)
    rising, falling = bins - edges[:-2, None], edges[2:, None] - bins
    triangles = np.minimum(rising, falling) / (edges[1] - edges[0])
    return np.maximum(0, triangles).astype(np.float32)


class KaldiLogMel(nn.Module):
    """Audio to the features of Seamless: Kaldi's filter banks of 16-bit samples, normalised over an utterance's frames.

    Frames lie within an utterance, so that padding never reaches a valid one; audio shorter than a window has one.
    """

    filters: Tensor
    taper: Tensor

    def __init__(self, config: KaldiFeatureConfig):
        super().__init__()
        self.config = config
        filters = kaldi_mel_filters(config.sample_rate, config.n_fft, config.mels)
        self.register_buffer("filters", torch.from_numpy(filters), persistent=False)
        taper = torch.hann_window(config.window, periodic=False, dtype=torch.float64) ** 0.85  # Povey's window
        self.register_buffer("taper", taper, persistent=False)

    def frames(self, samples: Count) -> Count:
        """Return the valid feature frames of ``samples``, at least one."""
        within = samples - self.config.window
        within = within.clamp(min=0) if isinstance(within, Tensor) else max(0, within)
        return within // self.config.hop + 1

    def forward(self, audio: Tensor, lengths: Tensor, seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return features and lengths as `LogMel` does."""
        config = self.config
        with torch.autocast(audio.device.type, enabled=False):
            audio = audio.float()
            if self.training and config.dither and seeds is not None:
                audio = audio + config.dither * noise(lengths, audio.shape[1], seeds)
            audio = audio * length_mask(lengths, audio.shape[1]) * 2.0**15
            size, frames = self.frames(audio.shape[1]), self.frames(lengths)
            audio = F.pad(audio, (0, max(0, config.window - audio.shape[1]))).double()  # else quiet bands lose digits
            windows = audio.unfold(1, config.window, config.hop)
            windows = windows - windows.mean(2, keepdim=True)
            before = torch.cat([windows[:, :, :1], windows[:, :, :-1]], dim=2)
            windows = (windows - config.preemphasis * before) * self.taper
            power = power_of(torch.fft.rfft(windows, config.n_fft)).float()
            features = torch.log(torch.matmul(power, self.filters.T).clamp(min=2.0**-23))
            valid = length_mask(frames, size)[:, :, None]
            count = frames[:, None, None]
            features = features - (features * valid).sum(1, keepdim=True) / count
            variance = (features.square() * valid).sum(1, keepdim=True) / (count - 1).clamp(min=1)
            return features * valid / (variance + 1e-7).sqrt(), frames
