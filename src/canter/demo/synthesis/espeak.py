"""espeak-ng in this process: text to 16 kHz samples, through the library that `espeakng-loader` brings along.

The library is global and remembers: the flutter of a voice goes on from one utterance to the next, so that a
sentence sounds a little different after another one. Whoever needs the same audio twice must therefore say
the same sequence of utterances in a fresh process (see `corpus.py`).
"""

import ctypes
from functools import cache

import numpy as np
import soxr

from canter.errors import CanterError
from canter.extras import needed_by

SAMPLE_RATE = 16000

# the numbers of speak_lib.h
_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000
_POSITION_CHARACTER, _UTF8 = 1, 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """The library, initialised once for each process; use `espeak()`."""

    def __init__(self) -> None:
        with needed_by("speech synthesis"):
            import espeakng_loader
        try:
            self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        except OSError as error:
            raise CanterError(
                f"espeak-ng cannot be loaded ({error}): pip install --force-reinstall espeakng-loader"
            ) from error
        self._pieces: list[bytes] = []
        self._callback = _CALLBACK(self._collect)  # kept: the library holds only the address
        data = str(espeakng_loader.get_data_path())
        self.native_rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _DONT_EXIT)
        if self.native_rate <= 0:
            raise CanterError(f"espeak-ng does not start with its data in {data}: reinstall espeakng-loader")
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # seeded by the clock otherwise
        self._library.espeak_Info.restype = ctypes.c_char_p
        self.version = self._library.espeak_Info(None).decode()

    def _collect(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    def say(self, text: str, voice: str, *, rate: int = 175, pitch: int = 50, pitch_range: int = 50) -> np.ndarray:
        """Speaks `text` as `voice` ("es-419+f2": language and variant) at `rate` words a minute.

        Returns int16 samples (S,) at 16 kHz, mono; `pitch` and `pitch_range` are espeak's, 0 to 99.
        Raises CanterError for a voice that espeak does not have.
        """
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise CanterError(f"espeak-ng {self.version} has no voice '{voice}'")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode() + b"\0"
        self._pieces.clear()
        status = self._library.espeak_Synth(encoded, len(encoded), 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
        if status != 0:
            raise CanterError(f"espeak-ng failed with status {status} on '{text}' ({voice})")
        native = np.frombuffer(b"".join(self._pieces), dtype=np.int16)
        # in floating point, since soxr adds dither seeded by the clock to integers
        samples = soxr.resample(native.astype(np.float32), self.native_rate, SAMPLE_RATE)
        return np.rint(np.clip(samples, -32768, 32767)).astype(np.int16)


@cache
def espeak() -> Espeak:
    """The process's espeak-ng. Raises CanterError if it is not installed."""
    return Espeak()
