"""Read WAV, FLAC, MP3, Ogg, Opus and other sound files through libsndfile."""

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile

from canter.corpus.ffmpeg import open_ffmpeg_track
from canter.corpus.headers import Header, LostAudio, check_header
from canter.errors import AudioError

UNSTATED = 2**63 - 1  # frames that libsndfile makes of a length that the header leaves open
BEFORE = 1.0  # seconds of an MP3 decoded before a segment, because a frame uses bits of earlier ones
FINE = 0.1  # seconds read at a time to find where damage begins
MOST_SKIPPED = 600.0  # seconds searched for the place where decoding resumes, where the length is unknown
MOST_CACHED = 256  # checked headers
_CACHE: dict[tuple[int, ...], Header] = {}
_CACHE_LOCK = threading.Lock()


class _SoundFile(soundfile.SoundFile):
    """A sound file that is read from front to back.

    soundfile seeks to the current position after every read of a seekable file; at the end of FLAC of unstated length
    that fails, and the samples read are lost.
    """

    def seekable(self) -> bool:
        return False


class SndfileTrack:
    """A sound file that libsndfile decodes, with the result of the check of its header."""

    cut_short = 0.0

    def __init__(self, path: str, file: BinaryIO, header: Header, keep: bool):
        """Open the file; ``keep`` resumes after damage. Raises LibsndfileError for an unknown format."""
        self._path, self._file, self._header, self._keep = path, file, header, keep
        self._sound = self._opened()
        self.rate: int = self._sound.samplerate
        self.channels: int = self._sound.channels
        self.guessed = header.guessed

    def _opened(self) -> _SoundFile:
        self._file.seek(0)
        return _SoundFile(self._header.view(self._file))

    def __enter__(self) -> "SndfileTrack":
        return self

    def __exit__(self, *raised: object) -> None:
        self._sound.close()

    @property
    def losses(self) -> tuple[LostAudio, ...]:
        """Damage found without decoding."""
        return self._header.losses

    @property
    def length(self) -> int | None:
        """Number of samples; None where only decoding can tell."""
        if self._header.samples is not None:
            return self._header.samples
        return None if self._sound.frames == UNSTATED else self._sound.frames

    def seconds(self) -> float | None:
        """Return the length in seconds; None where only decoding can tell."""
        return None if self.length is None else self.length / self.rate

    @property
    def promised(self) -> float | None:
        """Length in seconds that the header states; None where it states none or a guess."""
        if self._header.guessed or self._sound.frames == UNSTATED:
            return None
        return self._sound.frames / self.rate / (1 - self._header.missing)

    def read(
        self, start: int, size: int, most: int | None = None, channel: int | None = None
    ) -> Iterator[np.ndarray | LostAudio]:
        """Yield (S, C) float32 of all channels from sample ``start``, ``size`` samples at a time and ``most`` in total.

        A `LostAudio` stands for audio that cannot be decoded; FFmpeg, if installed, decodes the remainder after it.
        """
        sound, place, end = self._sound, start, None if most is None else start + most
        if (length := self.length) is not None:  # a read beyond the end fills the block with zeros
            end = length if end is None else min(end, length)
        try:
            if start and sound.frames == UNSTATED:  # not seekable
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
    ) -> Iterator[np.ndarray | LostAudio]:
        """Yield the samples from ``place`` on, where a block cannot be decoded, and the losses between them."""
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
            remaining = None if length is None else max(0, length - place) / self.rate
            yield LostAudio(place / self.rate, remaining, reason_of(error))
            return
        resumed = self._resumes(place, step, self.length if end is None else end)
        if resumed is None:
            yield LostAudio(place / self.rate, None, reason_of(error))
            yield from self._from_ffmpeg(place, size)
            return
        yield LostAudio(place / self.rate, (resumed - place) / self.rate, reason_of(error))
        for skipped in range(place, resumed, size):
            yield np.zeros((min(size, resumed - skipped), self.channels), np.float32)
        yield from self.read(resumed, size, None if end is None else end - resumed)

    def _resumes(self, place: int, step: int, end: int | None) -> int | None:
        """Return the first sample after ``place``, to within a ``step``, at which decoding resumes, or None.

        It is found by seeking, so its time is right whatever was lost before it.
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

    def _from_ffmpeg(self, place: int, size: int) -> Iterator[np.ndarray | LostAudio]:
        """Yield the samples that FFmpeg decodes from ``place`` on, if it is installed."""
        with contextlib.suppress(AudioError), open_ffmpeg_track(self._path, self._file, "damaged") as coded:
            if coded.rate == self.rate and coded.channels == self.channels:
                yield from coded.read(place, size)


def checked(file: BinaryIO) -> Header:
    """Check a file's header, once for a file on a disk, however many segments of it are read."""
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
    """Return libsndfile's message for an error."""
    return error.error_string.strip().removeprefix("Error : ").rstrip(".")


def _blocks(sound: _SoundFile, place: int, size: int, end: int | None) -> Iterator[np.ndarray]:
    """Yield (S, C) float32, ``size`` samples at a time, from sample ``place`` to ``end`` or the end of the file."""
    while end is None or place < end:
        samples = sound.read(size if end is None else min(size, end - place), "float32", always_2d=True)
        if not len(samples):
            return
        place += len(samples)
        yield samples
