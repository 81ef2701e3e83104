"""Voice activity detection, by energy or by silero-vad's network (extra ``vad``).

F: frames of FRAME seconds.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from canter.errors import ConfigError
from canter.extras import install

RATE = 16000
FRAME = 0.02  # seconds
EPSILON = 1e-10  # added to the power, so that silence has a logarithm
CONTRAST = 10.0  # minimum dB between quiet and loud frames for a decision by energy
RISE = 8.0  # maximum dB of the threshold above the noise floor
SILENCE_LEVEL = -80.0  # dB of full scale
HISS_LEVEL = -50.0  # dB of full scale; quieter noise is not speech, unless it rises HISS_RANGE dB above its floor
HISS_RANGE = 6.0
EVEN = 3.0  # maximum dB between the floor and all but the loudest frames of an even background
MOST_PADDING = 10.0  # seconds
Detector = Callable[[np.ndarray], np.ndarray]
"""Function of samples (S,) that returns the probability of speech (F,)."""
Vad = Literal["energy", "silero", "none"]


@dataclass(frozen=True)
class VadOptions:
    """Settings of voice activity detection, for either detector. Raises ConfigError, naming the field, for values
    without meaning."""

    threshold: float = 0.5
    """Probability above which a frame is speech, between 0 and 1. `silero`: the network's probability; `energy`: a
    level of 16 dB times this above the noise floor, or of half the contrast times this where that is less."""
    min_speech_seconds: float = 0.0
    """Minimum length of speech; shorter spans, with pauses of less than twice the padding in them, count as
    silence."""
    min_silence_seconds: float | None = None
    """Minimum length of silence, padding included, to leave out (None: 2 s at the ends of a recording that fits the
    model's window, 5 s within, in addition to the padding)."""
    padding_seconds: float = 0.3
    """Seconds kept before and after speech."""

    def __post_init__(self) -> None:
        silence = 0.0 if self.min_silence_seconds is None else self.min_silence_seconds
        if not 0 < self.threshold < 1:
            raise ConfigError(f"VAD threshold is {self.threshold:g}; it must lie between 0 and 1, both excluded")
        for name, value, most in (
            ("min_speech_seconds", self.min_speech_seconds, MOST_PADDING),
            ("min_silence_seconds", silence, math.inf),
            ("padding_seconds", self.padding_seconds, MOST_PADDING),
        ):
            if not 0 <= value <= most or value == math.inf:
                limit = f"from 0 to {most:g}" if most < math.inf else "0 or more"
                raise ConfigError(f"VAD {name} is {value:g}; it must be {limit} seconds")

    def least_gap(self, usual: float, paddings: int) -> float:
        """Return the minimum seconds to leave out where ``paddings`` paddings stay, ``usual`` by default."""
        if self.min_silence_seconds is None:
            return usual
        return max(FRAME, self.min_silence_seconds - paddings * self.padding_seconds)


USUAL_VAD = VadOptions()


def loudness(samples: np.ndarray, rate: int = RATE) -> np.ndarray:
    """Return the level (F,) of samples (S,) in dB of full scale, smoothed over 5 frames; the last may be shorter."""
    size = round(FRAME * rate)
    frames = -(-len(samples) // size)
    padded = np.zeros(frames * size, dtype=np.float32)
    padded[: len(samples)] = samples
    power = np.square(padded.reshape(frames, size)).mean(1)
    smooth = np.convolve(np.pad(power, 2, mode="edge"), np.full(5, 0.2), mode="valid") if frames else power
    return 10 * np.log10(smooth + EPSILON)


def energy(samples: np.ndarray, rate: int = RATE) -> np.ndarray:
    """Return the probability of speech (F,) by energy; a `Detector`.

    The threshold lies above the noise floor (the 10th percentile) by a quarter of the range of levels, at most by RISE,
    so that a quiet speaker beside a loud one is detected. With little contrast (noise, music) everything counts as
    speech, in silence or a faint even hiss nothing. In an even background with a short event (a word in long silence)
    only the event does.
    """
    level = loudness(samples, rate)
    if not len(level):
        return level
    floor, top, loudest = np.percentile(level, 10), np.percentile(level, 95), level.max()
    if loudest < SILENCE_LEVEL or (loudest < HISS_LEVEL and loudest - floor < HISS_RANGE):
        return np.zeros(len(level))
    if top - floor < EVEN and loudest - floor >= 2 * CONTRAST:
        top = loudest
    if top - floor < CONTRAST:
        return np.ones(len(level))
    threshold = max(floor + min((top - floor) / 4, RISE), SILENCE_LEVEL)
    return np.clip((level - floor) / (threshold - floor) / 2, 0, 1)


@functools.cache
def _silero_session():
    found = importlib.util.find_spec("silero_vad")  # not imported: that would load another model
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError:
        found = None
    if found is None or found.origin is None:
        raise ConfigError(
            f"--vad silero needs silero-vad and onnxruntime: {install('silero_vad')}; or use --vad energy"
        )
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = options.intra_op_num_threads = 1
    file = Path(found.origin).parent / "data" / "silero_vad.onnx"
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def silero(samples: np.ndarray, rate: int = RATE) -> np.ndarray:
    """Return the probability of speech (F,) by silero-vad's network, on 32 ms and the 4 ms before; a `Detector`.

    Raises ConfigError without the extra ``vad``, and for a sample rate that the network does not support.
    """
    if rate not in (8000, 16000):
        raise ConfigError(f"--vad silero takes 8,000 or 16,000 Hz, the model {rate:,}: use --vad energy")
    session, size, before = _silero_session(), 512 * rate // 16000, 64 * rate // 16000
    windows = -(-len(samples) // size)
    padded = np.zeros(before + windows * size, dtype=np.float32)
    padded[before : before + len(samples)] = samples
    state = np.zeros((2, 1, 128), dtype=np.float32)
    found = np.zeros(windows)
    given = np.array(rate, dtype=np.int64)
    for index in range(windows):
        part = padded[None, index * size : index * size + size + before]
        probability, state = session.run(None, {"input": part, "state": state, "sr": given})
        found[index] = np.asarray(probability)[0, 0]
    frames = -(-len(samples) // round(FRAME * rate))
    return found[(np.arange(frames) * round(FRAME * rate)) // size]


DETECTORS: dict[str, Callable[..., np.ndarray]] = {"energy": energy, "silero": silero}
"""Detectors by name; each also takes the sample rate."""
