"""Media files of any container, written by FFmpeg."""

import io
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest

Encode = Callable[..., bytes]


@pytest.fixture(scope="session")
def encode() -> Encode:
    """Return a function that writes tracks of samples (S,) as a media file.

    ``starts``: seconds at which each track begins. ``gaps``: (from, to) in seconds that are left out of every track.
    ``default``: the track that is marked as the default.
    """
    av = pytest.importorskip("av", reason="the extra 'av' is not installed")

    def write(
        container: str,
        *tracks: np.ndarray,
        codec: str = "aac",
        rate: int = 16000,
        starts: Sequence[float] = (),
        gaps: Sequence[tuple[float, float]] = (),
        default: int | None = None,
        video: bool = False,
    ) -> bytes:
        file = io.BytesIO()
        with av.open(file, "w", format=container) as out:
            streams = [out.add_stream(codec, rate=rate, layout="mono", bit_rate=64000) for _ in tracks]
            for number, stream in enumerate(streams):
                if default is not None:
                    stream.disposition = int(number == default)
            packets = []
            if video:
                pictures = out.add_stream("mpeg4", rate=10)
                pictures.width = pictures.height = 32
                for number in range(round(10 * len(tracks[0]) / rate)):
                    picture = av.VideoFrame(32, 32, "yuv420p")
                    for plane in picture.planes:
                        plane.update(bytes(plane.buffer_size))
                    picture.pts = number
                    packets += pictures.encode(picture)
                packets += pictures.encode(None)
            for number, (stream, samples) in enumerate(zip(streams, tracks, strict=True)):
                packets += encoded(stream, samples, rate, starts[number] if starts else 0.0, gaps)
            for packet in sorted(packets, key=lambda one: float(one.dts * one.time_base)):
                out.mux(packet)
        return file.getvalue()

    def encoded(stream, samples, rate, start, gaps):
        stream.codec_context.open()
        size = stream.codec_context.frame_size or 1024
        form = stream.codec_context.format.name
        resampler = av.AudioResampler(format=form, layout="mono", rate=rate)
        for place in range(0, len(samples), size):
            frame = av.AudioFrame.from_ndarray(samples[None, place : place + size], format="fltp", layout="mono")
            frame.rate = rate
            for piece in resampler.resample(frame):
                piece.pts = place + round(start * rate)
                piece.time_base = Fraction(1, rate)
                yield from kept(stream.encode(piece), gaps)
        yield from kept(stream.encode(None), gaps)

    def kept(packets, gaps):
        for packet in packets:
            at = float(packet.pts * packet.time_base)
            if not any(begin <= at < end for begin, end in gaps):
                yield packet

    return write
