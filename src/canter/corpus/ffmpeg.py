"""Decode formats that libsndfile does not know (MP4, MKV, AAC, WMA, ...) with FFmpeg, where extra ``av`` is installed.

FFmpeg is given a file object without a name, a list of formats and no protocol, so that it cannot open another file or
a connection, whatever a file's content requests.
"""

import contextlib
import importlib
import itertools
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from canter.corpus.headers import LostAudio
from canter.corpus.media import HEAD, container_format
from canter.errors import AudioError
from canter.extras import install

# Formats that contain audio. Playlists, scripts, session descriptions and image sequences are excluded, because they
# make FFmpeg open other files.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpegts,mpegtsraw,mpeg,mpegvideo,avi,asf,asf_o,flv,live_flv,kux,rm,mxf,nut,"
    "gxf,wtv,dv,ogg,wav,w64,aiff,au,caf,flac,mp3,aac,loas,latm,ac3,eac3,ac4,dts,dtshd,truehd,mlp,amr,amrnb,amrwb,ape,"
    "wv,tta,tak,shn,mpc,mpc8,qoa,bonk,osq,dsf,iff,iamf,voc,nistsphere,sox,ircam,paf,pvf,qcp,oma,xwma,act,dss,ast,"
    "avr,hcom,rso,sds,smjpeg,gsm,ilbc,lvf,sln,vqf,xa"
)
OPTIONS = {
    "format_whitelist": FORMATS,
    "protocol_whitelist": "none",
    "probesize": "5000000",  # bytes
    "analyzeduration": "5000000",  # microseconds
}
# Formats with a time stamp for each packet, which may begin late or leave gaps. In all others a gap is damage.
STAMPED = {
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "mpegtsraw", "mpeg", "avi", "asf", "asf_o", "flv", "live_flv",
    "kux", "rm", "mxf", "nut", "gxf", "wtv",
}  # fmt: skip
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}  # in others seeking is estimated from the bit rate
PROMISING = {"mov,mp4,m4a,3gp,3g2,mj2", "flac", "tta", "wv", "ape", "aiff", "w64"}  # state the number of samples
ENDING = {"matroska,webm", "flv"}  # state the time at which the last packet of all streams ends
RESTARTING = {"mpegts", "mpegtsraw", "mpeg"}  # time stamps may jump where recordings were joined
BEFORE = 1.0  # seconds decoded before a segment, because packets depend on earlier ones
JITTER = 0.1  # seconds by which time stamps may differ from the number of samples before a gap is filled
LONGEST_JUMP = 10.0  # seconds, for RESTARTING formats (as FFmpeg's -dts_delta_threshold)
MOST_SILENCE = 6 * 3600.0  # seconds of gaps that are filled in a file
NOT_ALLOWED = 22  # FFmpeg's error for a format or protocol that is not in the list
LONGEST_PACKET = 10.0  # seconds; a longer stated duration is not trusted
MOST_FAULTS = 8  # consecutive errors of the demuxer


class Timeline:
    """Positions of the frames of a stream, in samples from the start of the recording."""

    def __init__(self, format_name: str, rate: int, origin: float | None):
        self._rate, self.origin = rate, origin
        self._stamped, self._restarts = format_name in STAMPED, format_name in RESTARTING
        self._filled = 0
        self.place = 0
        """Number of the next sample."""

    def gap(self, seconds: float | None, damaged: bool) -> int:
        """Return the number of samples without audio before a frame with this time stamp.

        A gap within the jitter of the time stamps counts where something was ``damaged``.
        """
        if seconds is None or not math.isfinite(seconds):
            return 0
        if self.origin is None:
            self.origin = seconds
        if not self.place and abs(seconds - self.origin) <= JITTER:  # the delay of the codec
            self.origin = seconds
        missing = round((seconds - self.origin) * self._rate) - self.place
        most = LONGEST_JUMP if self._restarts and self.place else MOST_SILENCE
        if (missing < -JITTER * self._rate and self.place) or missing > most * self._rate - self._filled:
            self.origin += missing / self._rate  # the clock was reset: no gap
            return 0
        if missing <= (0 if damaged else JITTER * self._rate):
            return 0
        self._filled += missing
        return missing


class _NoTrack(Exception):
    """A file without the requested audio track."""


class FFmpegTrack:
    """An audio track that FFmpeg decodes."""

    guessed = False
    losses: tuple[LostAudio, ...] = ()
    """Damage found without decoding; losses of known length are filled with silence."""

    def __init__(self, av: Any, container: Any, track: int | None):
        """Choose the track. Raises _NoTrack where it does not exist or FFmpeg does not know its codec."""
        self._av, self._container = av, container
        tracks = list(container.streams.audio)
        if not tracks:
            raise _NoTrack("it has no audio track")
        if track is not None and track >= len(tracks):
            some = f"{len(tracks)} audio tracks" if len(tracks) > 1 else "one audio track"
            raise _NoTrack(f"it has no audio track {track}: it has {some}, counted from 0")
        known = [one for one in tracks if one.codec_context is not None]
        chosen = [tracks[track]] if track is not None else [*filter(_is_default, known), *known, *tracks]
        self._stream = chosen[0]
        if self._stream.codec_context is None:
            raise _NoTrack("FFmpeg does not know the codec of its audio")
        self.rate: int = self._stream.rate or 0
        self._layout = self._stream.layout
        self.channels: int = self._layout.nb_channels
        self._format: str = container.format.name
        start = container.start_time  # in microseconds
        self._origin = start / 1e6 if self._format in STAMPED and start is not None else None
        self._seconds_a_tick = float(self._stream.time_base)
        self._latest = 0.0  # end of the last packet of any stream, in seconds

    @property
    def promised(self) -> float | None:
        """End of the audio that the file states, in seconds from the start; None where it may be a guess.

        In some formats it is correct only once the file has been read to its end.
        """
        stream = self._stream
        if self._format in PROMISING and stream.duration:
            start = (stream.start_time or 0) * self._seconds_a_tick - (self._origin or 0.0)
            return stream.duration * self._seconds_a_tick + (start if self._format in STAMPED else 0.0)
        return None

    @property
    def cut_short(self) -> float:
        """Seconds between the last packet of any stream and the stated end of the file; 0 where that is a guess."""
        if self._format not in ENDING or not self._container.duration:
            return 0.0
        return max(0.0, self._container.duration / 1e6 - self._latest + (self._origin or 0.0))

    def seconds(self) -> float:
        """Return the time at which the track ends, from the time stamps of its packets, without decoding."""
        timeline, end = Timeline(self._format, self.rate, self._origin), 0.0
        for packet in self._packets(self._stream):
            if packet.dts is None and packet.pts is None:  # the last packet, which is empty
                continue
            at, seconds = _time_of(packet), (packet.duration or 0) * self._seconds_a_tick
            if at is not None and self._origin is not None and at < self._origin:  # only for the decoder
                continue
            timeline.place += timeline.gap(at, False) + round(seconds * self.rate)
            if self._format in STAMPED and at is not None:
                end = max(end, at + seconds - (timeline.origin or 0.0))
            else:
                end = max(end, timeline.place / self.rate)
        return end + sum(loss.seconds or 0.0 for loss in self.losses)

    def read(
        self, start: int, size: int, most: int | None = None, channel: int | None = None
    ) -> Iterator[np.ndarray | LostAudio]:
        """Yield (S, C) float32 from sample ``start`` on, ``size`` samples at a time, and the losses between them.

        Gaps in the time stamps are filled with silence. FFmpeg mixes more than two channels into one, unless a
        ``channel`` is requested. The caller stops the iteration once it has ``most`` samples.
        """
        size = size if most is None else min(size, most)
        channels = 1 if channel is None and self.channels > 2 else self.channels
        pending, count = list[np.ndarray](), 0
        for event in self._events(start, channels):
            if isinstance(event, LostAudio):
                if count:
                    yield np.concatenate(pending)
                pending, count = [], 0
                yield event
                continue
            for samples in [event] if isinstance(event, np.ndarray) else _silence(event, size, channels):
                pending.append(samples)
                count += len(samples)
                while count >= size:
                    joined = np.concatenate(pending)
                    yield joined[:size]
                    pending, count = [joined[size:]], count - size
        if count:
            yield np.concatenate(pending)

    def _events(self, start: int, channels: int) -> Iterator[np.ndarray | LostAudio | int]:
        """Yield samples (S, C), numbers of samples of silence, and losses, from sample ``start`` on."""
        timeline = Timeline(self._format, self.rate, self._origin)
        holes = [loss for loss in self.losses if loss.seconds is not None]
        filled = 0
        for frame, faults in self._frames(start, timeline):
            while holes and (timeline.place - filled) / self.rate >= holes[0].at:
                hole = holes.pop(0)
                missing = round((hole.seconds or 0.0) * self.rate)
                yield LostAudio(timeline.place / self.rate, hole.seconds, hole.reason)
                yield from self._gap(timeline, missing, start)
                filled += missing
                if timeline.origin is not None:
                    timeline.origin -= missing / self.rate
            place = timeline.place
            damaged = bool(faults)
            missing = timeline.gap(self._time_of_frame(frame), damaged)
            if damaged or (missing and (self._format not in STAMPED or (place and self.losses))):
                lost = max(missing / self.rate, sum(seconds for seconds, _ in faults))
                known = self.losses[0].reason if self.losses else "packets are missing"
                reason = faults[0][1] if faults else known
                yield LostAudio(place / self.rate, lost, reason)
            yield from self._gap(timeline, missing, start)
            if frame is None:
                continue
            for samples in self._samples(frame, channels):
                place, timeline.place = timeline.place, timeline.place + len(samples)
                if timeline.place > start:
                    yield samples[max(0, start - place) :]

    def _time_of_frame(self, frame: Any) -> float | None:
        return None if frame is None or frame.pts is None else frame.pts * self._seconds_a_tick

    @staticmethod
    def _gap(timeline: Timeline, missing: int, start: int) -> Iterator[int]:
        """Advance by ``missing`` samples, and yield the number of them after ``start``."""
        timeline.place += missing
        if timeline.place > start and missing:
            yield min(missing, timeline.place - start)

    def _frames(self, start: int, timeline: Timeline) -> Iterator[tuple[Any, list[tuple[float, str]]]]:
        """Yield frames from sample ``start`` or earlier, each with the faults before it as (seconds, reason).

        The frame is None for faults at the end.
        """
        early = start - round(BEFORE * self.rate)
        if early > 0 and self._format in SEEKABLE:
            first, _ = next(self._decoded(), (None, []))
            timeline.gap(self._time_of_frame(first), False)  # sets the origin
            target = round(((timeline.origin or 0.0) + early / self.rate) / self._seconds_a_tick)
            with contextlib.suppress(self._av.FFmpegError):
                self._container.seek(target, stream=self._stream)
            frames = self._decoded()
            first, _ = next(frames, (None, []))
            at = self._time_of_frame(first)
            place = None if at is None else round((at - (timeline.origin or 0.0)) * self.rate)
            if place is not None and 0 <= place <= start:
                timeline.place = place
                yield from itertools.chain([(first, [])], frames)
                return
            self._container.seek(min(0, self._container.start_time or 0))
        yield from self._decoded()

    def _decoded(self) -> Iterator[tuple[Any, list[tuple[float, str]]]]:
        faults = list[tuple[float, str]]()
        streams = () if self._format in ENDING else (self._stream,)
        for packet in self._packets(*streams):
            if not streams and packet.stream.index != self._stream.index:
                continue
            try:
                frames = packet.decode()
            except self._av.error.EOFError:
                continue
            except Exception as error:  # decoders may raise anything, and the next packet may be intact
                seconds = min(LONGEST_PACKET, (packet.duration or 0) * self._seconds_a_tick)
                faults.append((seconds, f"FFmpeg: {_plain(error)}"))
                continue
            for frame in frames:
                yield frame, faults
                faults = []
        if faults:
            yield None, faults

    def _packets(self, *streams: Any) -> Iterator[Any]:
        """Yield the packets of the streams (default: all), after errors of the file's structure too."""
        faults = 0
        while faults < MOST_FAULTS:
            packets = self._container.demux(*streams)
            try:
                for packet in packets:
                    faults = 0
                    if self._format in ENDING and (at := _time_of(packet)) is not None:
                        end = at + (packet.duration or 0) * float(packet.time_base)
                        self._latest = max(self._latest, end)
                    yield packet
                return
            except Exception:  # PyAV raises too where a file has more streams than its header says
                faults += 1

    def _samples(self, frame: Any, channels: int) -> Iterator[np.ndarray]:
        """Yield a decoded frame as (S, C) float32 at the track's rate."""
        layout = "mono" if channels == 1 else self._layout
        key = (frame.format.name, frame.layout.name, frame.sample_rate)
        if getattr(self, "_resampled", None) != key:  # the format of a stream may change
            self._resampler = self._av.AudioResampler(format="fltp", layout=layout, rate=self.rate)
            self._resampled = key
        for piece in self._resampler.resample(frame):
            yield piece.to_ndarray().T


def _time_of(packet: Any) -> float | None:
    """Return the presentation time of a packet, in seconds of its file."""
    return None if packet.pts is None else packet.pts * float(packet.time_base)


def _is_default(stream: Any) -> bool:
    return bool(int(getattr(stream, "disposition", 0)) & 1)


def _silence(count: int, size: int, channels: int) -> Iterator[np.ndarray]:
    for start in range(0, count, size):
        yield np.zeros((min(size, count - start), channels), np.float32)


class _Nameless:
    """The bytes of a file without its name, from which FFmpeg would guess the format."""

    def __init__(self, file: BinaryIO):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


@contextlib.contextmanager
def open_ffmpeg_track(path: str, file: BinaryIO, reason: str, track: int | None = None) -> Iterator[FFmpegTrack]:
    """Open a track of a file, by default the one marked as default, else the first.

    ``reason`` is why libsndfile does not read the file. Raises AudioError where FFmpeg does not read it either.
    """
    try:
        av: Any = importlib.import_module("av")
    except ModuleNotFoundError:
        raise AudioError(
            f"{path} is not audio that libsndfile knows ({reason}); convert it to WAV or FLAC, or, "
            f"if it is AAC, M4A, WMA, WebM or a video, {install('av')}"
        ) from None
    file.seek(0)
    with contextlib.ExitStack() as stack:
        try:
            container = stack.enter_context(
                av.open(_Nameless(file), metadata_errors="ignore", container_options=OPTIONS)
            )
            coded = FFmpegTrack(av, container, track)
        except Exception as error:  # PyAV raises AttributeError, UnicodeDecodeError and others
            raise AudioError(_refusal(path, file, reason, error)) from None
        if coded.rate < 1 or coded.channels < 1:  # FFmpeg recognises some text as a sound format
            raise AudioError(f"{path} is not audio: {reason}; FFmpeg finds no sampling rate; leave it out")
        yield coded


def _refusal(path: str, file: BinaryIO, reason: str, error: Exception) -> str:
    """Return the message for a file that FFmpeg does not open."""
    file.seek(0)
    known = container_format(file.read(HEAD))
    if isinstance(error, _NoTrack):
        return f"{path} cannot be read: {error}; leave it out"
    if known and isinstance(error, OSError | ValueError) and getattr(error, "errno", 0) != NOT_ALLOWED:
        return (
            f"{path} is damaged or truncated: it begins as {known}, but FFmpeg cannot read it ({_plain(error)}); copy "
            "the file again or leave it out"
        )
    message = _plain(error)
    if getattr(error, "errno", 0) == NOT_ALLOWED:
        message = "its format is none that holds audio itself"
    return f"{path} is not audio: {reason}; FFmpeg reports: {message}; leave it out"


def _plain(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
