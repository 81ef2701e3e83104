"""Effects on a waveform (S,) float32: noise, room impulse responses, gain, clipping, low-pass and telephone codecs.

All keep the number of samples and the times of the speech. Silence stays silence, and no result has more than the peak
of its input where that is above 1, except for `change_gain`.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import soundfile
import soxr

TELEPHONE_RATE = 8000
TELEPHONE_BAND = (300.0, 3400.0)
"""Band of a telephone channel in Hz (ITU-T G.712)."""
CODECS = {"mulaw": "ULAW", "alaw": "ALAW", "gsm": "GSM610"}
"""Names of telephone codecs (ITU-T G.711 with mu-law and A-law, GSM 06.10 full rate), and of libsndfile's subtypes."""
SETTLING = 0.1  # seconds of zeros that keep the end of a filtered utterance from its start
ORDER = 8  # of the Butterworth magnitude of filters


def mean_power(audio: np.ndarray) -> float:
    """Return the mean of the squared samples."""
    wide = audio.astype(np.float64)
    return float(np.dot(wide, wide)) / max(1, len(wide))


def mix_noise(speech: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """Return speech (S,) with noise (S,), scaled to a signal-to-noise ratio in dB.

    The ratio is that of the mean powers over all S samples, as in NeMo and Lhotse. Where either is silent it is not
    defined, and the speech is returned as it is. A mixture that exceeds the full scale is scaled down as one, which
    keeps the ratio.
    """
    signal, disturbance = mean_power(speech), mean_power(noise)
    if not signal or not disturbance:
        return speech
    scale = math.sqrt(signal / disturbance) * 10 ** (-snr / 20)
    return _within_scale((speech + scale * noise.astype(np.float64)), speech)


def reverberate(speech: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Return speech (S,) convolved with a room impulse response (R,), with the power of the speech.

    The direct path, the largest magnitude of the response, stays at time 0, so that the words keep their times; the
    tail after S samples is dropped.
    """
    signal = mean_power(speech)
    size = _fast_size(len(speech) + len(response) - 1)
    spectrum = np.fft.rfft(speech.astype(np.float64), size) * np.fft.rfft(response.astype(np.float64), size)
    direct = int(np.argmax(np.abs(response)))
    wet = np.fft.irfft(spectrum, size)[direct : direct + len(speech)]
    loudness = mean_power(wet)
    if not signal or not loudness:
        return speech
    return _within_scale(wet * math.sqrt(signal / loudness), speech)


def change_gain(audio: np.ndarray, decibels: float) -> np.ndarray:
    """Return the audio (S,) amplified by ``decibels``."""
    return (audio * 10 ** (decibels / 20)).astype(np.float32)


def clip_peaks(audio: np.ndarray, fraction: float) -> np.ndarray:
    """Return the audio (S,) with samples limited to a fraction of its peak, as by an overdriven microphone."""
    limit = fraction * peak_level(audio)
    return np.clip(audio, -limit, limit).astype(np.float32)


def low_pass(audio: np.ndarray, rate: int, cutoff: float) -> np.ndarray:
    """Return the audio (S,) without what lies above ``cutoff`` Hz, where the gain is -3 dB; no sample is delayed."""
    if cutoff >= rate / 2:
        return audio
    return _filtered(audio, rate, lambda hertz: 1 / np.sqrt(1 + (hertz / cutoff) ** (2 * ORDER)))


def telephone(audio: np.ndarray, rate: int, codec: str) -> np.ndarray:
    """Return the audio (S,) after a telephone channel: 300 to 3400 Hz, 8 kHz, coded and decoded by one of `CODECS`."""
    low, high = TELEPHONE_BAND

    def band(hertz: np.ndarray) -> np.ndarray:
        rise = hertz**ORDER / (hertz**ORDER + low**ORDER)
        return np.sqrt(rise / (1 + (hertz / high) ** (2 * ORDER)))

    narrow = _filtered(audio, rate, band)
    coded = code(soxr.resample(narrow, rate, TELEPHONE_RATE, quality="HQ"), codec)
    wide = soxr.resample(coded, TELEPHONE_RATE, rate, quality="HQ")[: len(audio)]
    return _within_scale(np.pad(wide, (0, len(audio) - len(wide))), audio)


def code(audio: np.ndarray, codec: str) -> np.ndarray:
    """Return audio (S,) at 8 kHz after one of `CODECS`; samples beyond the full scale saturate."""
    coded = io.BytesIO()
    samples = np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16)
    if not len(samples):
        return audio
    soundfile.write(coded, samples, TELEPHONE_RATE, format="WAV", subtype=CODECS[codec])
    coded.seek(0)
    decoded, _ = soundfile.read(coded, dtype="int16")
    decoded = decoded[: len(samples)]
    return np.pad(decoded, (0, len(samples) - len(decoded))).astype(np.float32) / np.float32(32768)


def peak_level(audio: np.ndarray) -> float:
    """Return the largest magnitude of a sample."""
    return float(np.abs(audio).max(initial=0.0))


def _filtered(audio: np.ndarray, rate: int, magnitude: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the audio after a filter without phase, given by its magnitude at frequencies in Hz."""
    size = _fast_size(len(audio) + round(SETTLING * rate))
    spectrum = np.fft.rfft(audio.astype(np.float64), size) * magnitude(np.fft.rfftfreq(size, 1 / rate))
    return _within_scale(np.fft.irfft(spectrum, size)[: len(audio)], audio)


def _within_scale(audio: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the audio as float32, scaled down to a peak of 1 or that of ``before``, whichever is larger."""
    limit, peak = max(1.0, peak_level(before)), peak_level(audio)
    return (audio * (limit / peak) if peak > limit else audio).astype(np.float32)


def _fast_size(least: int) -> int:
    """Return a length of at least ``least`` with small prime factors, for the FFT."""
    return min(odd << max(0, math.ceil(math.log2(max(1, least) / odd))) for odd in (1, 3, 5, 9, 15, 25, 27))
