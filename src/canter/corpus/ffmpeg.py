"""What libsndfile does not know (AAC, M4A, WMA, WebM), through FFmpeg where the extra ``av`` is installed."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from canter.errors import AudioError
from canter.extras import install

# Containers that say where in time each packet is. In others a seek lands by the bit rate, so they are read through.
TIMED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
BEFORE = 1.0  # seconds decoded before what is wanted: a codec's first packets depend on those before


class Coded:
    """The first audio stream of a file."""

    def __init__(self, av: Any, container: Any):
        self._av, self._container = av, container
        self._stream = container.streams.audio[0]
        self.rate: int = self._stream.rate
        self.channels: int = self._stream.layout.nb_channels

    def read(self, start: int, channel: int | None) -> Iterator[np.ndarray]:
        """(S,) float32 from sample ``start`` on, a packet at a time: one channel, or the average of all."""
        layout = "mono" if channel is None else self._stream.layout
        resampler = self._av.AudioResampler(format="fltp", layout=layout, rate=self.rate)
        frames, place = self._frames(start)
        for frame in frames:
            for piece in resampler.resample(frame):
                samples = piece.to_ndarray()[channel or 0]
                if place + len(samples) > start:
                    yield samples[max(0, start - place) :]
                place += len(samples)

    def _frames(self, start: int) -> tuple[Iterator[Any], int]:
        """Frames from sample ``start`` or before it on, and the sample that they begin with."""
        frames = self._container.decode(self._stream)
        first = next(frames, None)
        if first is None:
            return iter(()), 0
        early = start - round(BEFORE * self.rate)
        if early <= 0 or self._container.format.name not in TIMED:
            return itertools.chain([first], frames), 0
        ticks = self._stream.time_base * self.rate  # samples in each
        self._container.seek(first.pts + int(early / ticks), stream=self._stream)
        frames = self._container.decode(self._stream)
        found = next(frames, None)
        if found is None:
            return iter(()), 0
        return itertools.chain([found], frames), round((found.pts - first.pts) * ticks)


@contextlib.contextmanager
def open_coded(path: str, file: BinaryIO, reason: str) -> Iterator[Coded]:
    """Raises `AudioError`, with the ``reason`` for which libsndfile does not read it, where FFmpeg does not either;
    while it is read, too."""
    try:
        import av  # pyright: ignore[reportMissingImports]  # an extra
    except ModuleNotFoundError:
        raise AudioError(
            f"{path} is not audio that libsndfile knows ({reason}); convert it to WAV or FLAC, or, "
            f"if it is AAC, M4A, WMA or WebM, {install('av')}"
        ) from None
    file.seek(0)
    try:
        with av.open(file, metadata_errors="ignore") as container:
            coded = Coded(av, container)
            if coded.rate < 1 or coded.channels < 1:  # FFmpeg takes some text for a sound format
                raise AudioError(
                    f"{path} is not audio: {reason}; FFmpeg finds no sampling rate; remove the row"
                )
            yield coded
    except (av.FFmpegError, IndexError) as error:
        raise AudioError(f"{path} is not audio: {reason}; FFmpeg says: {error}; remove the row") from None
