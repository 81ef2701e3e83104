"""Decoded audio of an upload, whose samples wait on disk."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from canter.inference.transcript.chunks import Chunk
from canter.serving.scheduler import Stored
from canter.serving.upload import anonymous_file, disk_errors, write_all


class Samples:
    """Samples of an upload in a file without a name, so that hours of audio do not fill memory while they wait."""

    def __init__(self) -> None:
        with disk_errors():
            self._file = anonymous_file()
        self._bytes = 0

    def add(self, samples: np.ndarray) -> Stored:
        """Append ``samples`` (S,) float32, and return their place. Raise ApiError (507) if the disk is full."""
        place = self._bytes
        data = samples.astype(np.float32, copy=False).tobytes()
        with disk_errors():
            write_all(self._file, data)
        self._bytes += len(data)
        return Stored(self._file, place, len(samples))

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Audio:
    """Decoded audio of an upload."""

    chunks: list[Chunk]
    """Windows with speech, each short enough for the model; their samples are `Stored`."""
    samples: Samples
    """File with the samples of all chunks."""
    seconds: float
    reading: float
    """Seconds that decoding and segmentation took."""
    channels: int = 1
    """Number of channels that are transcribed by themselves."""
    upload: float = 0.0
    """Seconds that the upload took."""
    loading: float = 0.0
    """Seconds that the request waited for its model to be loaded; they count as time in the queue."""
    warnings: tuple[str, ...] = ()
    """Faults of the audio: losses, channels that cancel each other out."""

    def close(self) -> None:
        self.samples.close()


def stored(chunks: Iterable[Chunk], rate: int) -> Audio:
    """Return the chunks, at ``rate`` samples per second, as an upload whose samples are on disk.

    Raises ApiError (507) if the disk is full.
    """
    samples, kept = Samples(), list[Chunk]()
    try:
        for chunk in chunks:
            # A waiting request needs only the length of its samples; the scheduler reads them.
            kept.append(replace(chunk, samples=cast(np.ndarray, samples.add(chunk.samples))))
    except BaseException:
        samples.close()
        raise
    return Audio(kept, samples, sum(len(chunk.samples) for chunk in kept) / rate, 0.0)
