"""Read WAV, FLAC, MP3, Ogg, Opus and other sound files through libsndfile."""

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import soundfile

from canter.corpus.ffmpeg import open_coded
from canter.corpus.headers import Header, Loss, check_header
from canter.errors import AudioError

UNSTATED = 2**63 - 1  # frames that libsndfile makes of a length that the header leaves open
BEFORE = 1.0  # seconds of an MP3 that are decoded before a segment: a frame has bits in those before it
FINE = 0.1  # seconds that are read at a time to find where damage begins
MOST_SKIPPED = 600.0  # seconds that are skipped to find where decoding goes on, where the length is not known
MOST_CACHED = 256  # checked headers, of which some have a list of damaged places
_CACHE: dict[tuple[int, ...], Header] = {}
_CACHE_LOCK = threading.Lock()


class _SoundFile(soundfile.SoundFile):
    """Read from front to back. soundfile seeks after every read, to where it is already, in what can be sought in;
    at the end of FLAC of unstated length that fails, and what was read is lost."""

    def seekable(self) -> bool:
        return False


class Sound:
    """A sound file that libsndfile reads, and what holds of its header."""

    cut_short = 0.0

    def __init__(self, path: str, file: BinaryIO, header: Header, keep: bool):
        """``keep``: go on after damage. Raises LibsndfileError for what libsndfile does not know."""
        self._path, self._file, self._header, self._keep = path, file, header, keep
        self._sound = self._opened()
        self.rate: int = self._sound.samplerate
        self.channels: int = self._sound.channels
        self.guessed = header.guessed

    def _opened(self) -> Any:
        self._file.seek(0)
        return _SoundFile(self._header.view(self._file))

    def __enter__(self) -> "Sound":
        return self

    def __exit__(self, *raised: object) -> None:
        self._sound.close()

    @property
    def losses(self) -> tuple[Loss, ...]:
        """Damage that shows without decoding."""
        return self._header.losses

    @property
    def length(self) -> int | None:
        """Number of samples; None where the file must be decoded to know."""
        if self._header.samples is not None:
            return self._header.samples
        return None if self._sound.frames == UNSTATED else self._sound.frames

    @property
    def promised(self) -> float | None:
        """Length in seconds that the header states; None where it states none or a guess."""
        if self._header.guessed or self._sound.frames == UNSTATED:
            return None
        return self._sound.frames / self.rate / (1 - self._header.missing)

    def read(
        self, start: int, size: int, most: int | None = None, channel: int | None = None
    ) -> Iterator[np.ndarray | Loss]:
        """Yield (S, C) float32 from sample ``start`` on, ``size`` samples at a time, ``most`` in all; all channels,
        whichever is wanted.

        At what cannot be decoded a `Loss` is yielded. To go on from there FFmpeg is asked, if it is installed.
        """
        sound, place, end = self._sound, start, None if most is None else start + most
        if (length := self.length) is not None:  # a read beyond it fills the whole block with zeros
            end = length if end is None else min(end, length)
        try:
            if start and sound.frames == UNSTATED:  # it cannot be sought in
                for skipped in range(0, start, size):
                    sound.read(min(size, start - skipped))
            elif start:
                place = self._seek(start)
            for samples in _blocks(sound, place, size, end):
                place += len(samples)
                yield samples
        except soundfile.LibsndfileError as error:
            yield from self._after_damage(place, size, end, error)
            return
        promised = self.promised
        if self._keep and most is None and promised and round(promised * self.rate) > place + FINE * self.rate:
            yield from self._from_ffmpeg(place, size)

    def _seek(self, start: int) -> int:
        """Move to sample ``start``, or to the end of a shorter file, and return the place."""
        before = round(BEFORE * self.rate) if self._sound.format == "MP3" else 0
        place = self._sound.seek(min(max(0, start - before), self._sound.frames))
        if before and place < start:
            place += len(self._sound.read(start - place, "float32", always_2d=True))
        return place

    def _after_damage(
        self, place: int, size: int, end: int | None, error: soundfile.LibsndfileError
    ) -> Iterator[np.ndarray | Loss]:
        """Yield what there is from ``place`` on, of which a block cannot be decoded."""
        step = max(1, round(FINE * self.rate))
        with contextlib.suppress(soundfile.LibsndfileError), self._opened() as sound:
            if not place or sound.frames != UNSTATED:
                if place:
                    sound.seek(place)
                for samples in _blocks(sound, place, step, end):
                    place += len(samples)
                    yield samples
        if not self._keep or (end is not None and place >= end):
            length = self.length
            rest = None if length is None else max(0, length - place) / self.rate
            yield Loss(place / self.rate, rest, reason_of(error))
            return
        resumed = self._resumes(place, step, self.length if end is None else end)
        if resumed is None:
            yield Loss(place / self.rate, None, reason_of(error))
            yield from self._from_ffmpeg(place, size)
            return
        yield Loss(place / self.rate, (resumed - place) / self.rate, reason_of(error))
        for skipped in range(place, resumed, size):
            yield np.zeros((min(size, resumed - skipped), self.channels), np.float32)
        yield from self.read(resumed, size, None if end is None else end - resumed)

    def _resumes(self, place: int, step: int, end: int | None) -> int | None:
        """Return the first sample after ``place``, to about a ``step``, from which decoding goes on; None for no such.

        The file is sought in, so the sample's place in time is right whatever was lost before it.
        """
        damaged, skip = place, step
        while end is None or place + skip < end:
            if self._decodes(place + skip, step):
                break
            damaged, skip = place + skip, skip + max(step, skip // 2)
            if end is None and skip > MOST_SKIPPED * self.rate:
                return None
        else:
            return None
        sound = place + skip
        while sound - damaged > step:
            middle = (sound + damaged) // 2
            damaged, sound = (damaged, middle) if self._decodes(middle, step) else (middle, sound)
        return sound

    def _decodes(self, place: int, count: int) -> bool:
        try:
            with self._opened() as sound:
                return sound.frames != UNSTATED and sound.seek(place) == place and len(sound.read(count)) > 0
        except soundfile.LibsndfileError:
            return False

    def _from_ffmpeg(self, place: int, size: int) -> Iterator[np.ndarray | Loss]:
        """Yield what FFmpeg decodes from ``place`` on, if it is installed."""
        with contextlib.suppress(AudioError), open_coded(self._path, self._file, "damaged") as coded:
            if coded.rate == self.rate and coded.channels == self.channels:
                yield from coded.read(place, size)


def checked(file: BinaryIO) -> Header:
    """Return the check of a file's header; a file on a disk is checked once, however many segments are read of it."""
    if isinstance(file, io.BytesIO):
        return check_header(file)
    facts = os.fstat(file.fileno())
    key = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    with _CACHE_LOCK:
        found = _CACHE.pop(key, None)
    found = found or check_header(file)
    with _CACHE_LOCK:
        _CACHE[key] = found
        while len(_CACHE) > MOST_CACHED:
            del _CACHE[next(iter(_CACHE))]
    return found


def reason_of(error: soundfile.LibsndfileError) -> str:
    """Return libsndfile's own words for an error."""
    return error.error_string.strip().removeprefix("Error : ").rstrip(".")


def _blocks(sound: Any, place: int, size: int, end: int | None) -> Iterator[np.ndarray]:
    """Yield (S, C) float32, ``size`` samples at a time, of a sound that is at ``place``: to its end, or to ``end``."""
    while end is None or place < end:
        samples = sound.read(size if end is None else min(size, end - place), "float32", always_2d=True)
        if not len(samples):
            return
        place += len(samples)
        yield samples
