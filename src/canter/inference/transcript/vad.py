"""Where somebody speaks: by energy, or by silero-vad's network (extra ``vad``).

F: frames of FRAME seconds.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from canter.errors import ConfigError
from canter.extras import install

RATE = 16000
FRAME = 0.02  # seconds
QUIET = 1e-10  # added to power, so that silence has a logarithm
CONTRAST = 10.0  # dB between the quietest and the loudest, below which energy says nothing
RISE = 8.0  # dB above the quietest that speech need not exceed
FAINTEST = -80.0  # dB of full scale; what is below is silence
HISS = -50.0  # dB of full scale, below which noise is no speech where it is nowhere UNEVEN dB above its quietest
UNEVEN = 6.0
EVEN = 3.0  # dB between the quietest and all but the loudest moments of an even background
Detector = Callable[[np.ndarray], np.ndarray]
"""Samples (S,) -> (F,) how likely somebody speaks, 0 to 1, above 0.5 taken for speech."""


def loudness(samples: np.ndarray, rate: int = RATE) -> np.ndarray:
    """samples (S,) -> (F,) dB of full scale, smoothed over 5 frames; the last frame may be cut short."""
    size = round(FRAME * rate)
    frames = -(-len(samples) // size)
    padded = np.zeros(frames * size, dtype=np.float32)
    padded[: len(samples)] = samples
    power = np.square(padded.reshape(frames, size)).mean(1)
    smooth = np.convolve(np.pad(power, 2, mode="edge"), np.full(5, 0.2), mode="valid") if frames else power
    return 10 * np.log10(smooth + QUIET)


def energy(samples: np.ndarray, rate: int = RATE) -> np.ndarray:
    """A ``Detector``: speech is what stands out from the quietest tenth by a quarter of what the loudest do, or by
    RISE: beside a loud speaker a quiet one is heard too.

    Careful rather than keen: where there is little contrast (noise, music) all is taken for speech. Nothing is where
    all is silent, or nothing but a faint even hiss; and where the background is even and something stands out of it for
    a moment (a word in long silence), that alone is.
    """
    level = loudness(samples, rate)
    if not len(level):
        return level
    floor, top, loudest = np.percentile(level, 10), np.percentile(level, 95), level.max()
    if loudest < FAINTEST or (loudest < HISS and loudest - floor < UNEVEN):
        return np.zeros(len(level))
    if top - floor < EVEN and loudest - floor >= 2 * CONTRAST:
        top = loudest
    if top - floor < CONTRAST:
        return np.ones(len(level))
    threshold = max(floor + min((top - floor) / 4, RISE), FAINTEST)
    return np.clip((level - floor) / (threshold - floor) / 2, 0, 1)


@functools.cache
def _silero_session():
    found = importlib.util.find_spec("silero_vad")  # not imported: it would load a model of its own
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
    """A ``Detector``: silero-vad's network, which looks at 32 ms after 4 ms of what was before.

    Raises ConfigError without the extra ``vad``, and for a rate that the network does not know.
    """
    if rate not in (8000, 16000):
        raise ConfigError(f"--vad silero hears 8,000 or 16,000 Hz, the model {rate:,}: use --vad energy")
    session, size, before = _silero_session(), 512 * rate // 16000, 64 * rate // 16000
    windows = -(-len(samples) // size)
    padded = np.zeros(before + windows * size, dtype=np.float32)
    padded[before : before + len(samples)] = samples
    state = np.zeros((2, 1, 128), dtype=np.float32)
    found = np.zeros(windows)
    given = np.array(rate, dtype=np.int64)
    for index in range(windows):
        part = padded[None, index * size : index * size + size + before]
        share, state = session.run(None, {"input": part, "state": state, "sr": given})
        found[index] = np.asarray(share)[0, 0]
    frames = -(-len(samples) // round(FRAME * rate))
    return found[(np.arange(frames) * round(FRAME * rate)) // size]


DETECTORS: dict[str, Callable[..., np.ndarray]] = {"energy": energy, "silero": silero}
"""Detectors by name; each also takes the samples' rate."""
