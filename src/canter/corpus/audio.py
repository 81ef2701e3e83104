"""Decode audio: any file, URL or member of a container (`canter.corpus.containers`) to mono float32 at one rate."""

import contextlib
import functools
import io
import itertools
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, BinaryIO

import numpy as np
import soundfile
import soxr

from canter.corpus.containers import read_member
from canter.corpus.ffmpeg import FFmpegTrack, open_ffmpeg_track
from canter.corpus.headers import LostAudio
from canter.corpus.libsndfile import UNSTATED, SndfileTrack, checked, reason_of
from canter.corpus.remote import is_url, open_binary, read_bytes
from canter.corpus.utterance import Utterance
from canter.errors import AudioError, ManifestError

Track = SndfileTrack | FFmpegTrack
STANDARD_INPUT = "-"
# A segment may be shorter than its duration by 0.2 s or 2 %, because durations are rounded; a complete file may be
# shorter than the manifest says by 0.25 s or 10 %.
SHORT_SECONDS, SHORT_FRACTION = 0.2, 0.02
FILE_SHORT_SECONDS, FILE_SHORT_FRACTION = 0.25, 0.1
LEAST_RATE, MOST_RATE, MOST_CHANNELS = 1000, 768_000, 32
BLOCK_SAMPLES = 1 << 24  # in memory at once, all channels together
SECTION = 30.0  # seconds for which it is decided how channels are mixed
CANCELLED = 0.05  # power of the average, as a fraction of that of unrelated channels, below which channels cancel out
LARGE_LOAD, MOST_GROWTH = 1 << 26, 1000  # samples above which a load may not exceed this many bytes per byte of file


@dataclass(frozen=True)
class _Segment:
    """The part of a file to read, in seconds."""

    offset: float = 0.0
    duration: float | None = None
    """None: to the end of the file."""
    channel: int | None = None
    """None: the average of all."""
    stated: float = 0.0
    """Length of the complete file according to the manifest."""
    rounded: bool = False
    """Include up to `SHORT_SECONDS` after the duration if the file ends there."""
    track: int | None = None
    """Audio track of a file with several; None: the default one."""

    def limits(self, rate: int) -> tuple[float, float]:
        """Return the number of samples wanted, and the number up to which the end of the file is included."""
        if self.duration is None:
            return math.inf, math.inf
        wanted = round(self.duration * rate)
        return wanted, wanted + self.rounded * int(SHORT_SECONDS * rate)


def _segment_of(utterance: Utterance, track: int | None = None) -> _Segment:
    """Return the segment of an utterance: the complete file, unless its row has an offset.

    The duration of a complete file is not applied, because a rounded or wrong one would cut off speech.
    """
    offset, duration = utterance.offset, utterance.duration
    if offset is None:
        return _Segment(channel=utterance.channel_selector, stated=duration, track=track)
    return _Segment(offset, duration, utterance.channel_selector, rounded=offset == 0, track=track)


@dataclass
class Damage:
    """Damage of audio that is decoded nevertheless."""

    lost_seconds: float = 0.0
    """Seconds that are damaged or missing."""
    warnings: tuple[str, ...] = ()
    """Messages for the reader of the transcript: losses, and channels that cancel each other out."""

    def add(self, seconds: float, warning: str | None) -> None:
        self.lost_seconds += seconds
        self.warnings += (warning,) if warning else ()


@dataclass
class DecodedAudio(Damage):
    """Samples (S,) float32 of an utterance, as far as it can be decoded."""

    samples: np.ndarray = field(init=False)


@dataclass
class AudioBlocks(Damage):
    """Iterator over blocks (S,) of float32 samples; the damage is complete once it is exhausted."""

    blocks: Iterator[np.ndarray] = field(init=False)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.blocks

    def __next__(self) -> np.ndarray:
        return next(self.blocks)


@dataclass(frozen=True)
class AudioInfo:
    """Facts about an audio file that need no decoding."""

    rate: int
    channels: int
    seconds: float | None
    """Length; None where only decoding can tell."""


def load_audio(
    path: str | os.PathLike[str],
    *,
    offset: float = 0.0,
    duration: float | None = None,
    sample_rate: int = 16000,
    channel: int | None = None,
    track: int | None = None,
) -> np.ndarray:
    """Return (S,) float32 samples, mono, at ``sample_rate``: ``duration`` seconds from ``offset``, read by seeking.

    Channels are averaged, unless one is named (from 0) or they cancel each other out, and other rates are resampled
    (soxr, HQ). ``track`` is the audio track of a video, from 0 (default: the one marked as default, else the first);
    the time before it starts is silence. Raises AudioError, naming the file and the remedy, where it is missing, not
    audio, empty, damaged, truncated, shorter than requested or than its header says (by more than 0.2 s and 2 %), or
    holds samples that are not finite.
    """
    return _Decoding(os.fspath(path), _Segment(offset, duration, channel, track=track)).load(sample_rate)


def load_utterance(utterance: Utterance, sample_rate: int = 16000) -> np.ndarray:
    """Return the utterance's samples (S,) as `load_audio` does: the complete file, unless its row has an offset."""
    return _Decoding(utterance.audio_filepath, _segment_of(utterance)).load(sample_rate)


def decode_utterance(utterance: Utterance, sample_rate: int = 16000, *, track: int | None = None) -> DecodedAudio:
    """Return the utterance's samples as far as a damaged file can be decoded.

    Silence replaces lost audio whose length is known from time stamps or frame numbers. Raises AudioError where nothing
    can be decoded.
    """
    decoded = DecodedAudio()
    decoded.samples = _Decoding(utterance.audio_filepath, _segment_of(utterance, track), decoded).load(sample_rate)
    return decoded


def audio_blocks(
    utterance: Utterance,
    sample_rate: int = 16000,
    seconds: float = 30.0,
    *,
    keep_damaged: bool = False,
    track: int | None = None,
) -> AudioBlocks:
    """Return the utterance's samples in blocks of about ``seconds``, mono, at ``sample_rate``.

    Audio of any length needs the memory of one block. Iterating raises AudioError as `load_utterance` does, once it
    reaches damaged or missing audio; with ``keep_damaged`` such audio is treated as by `decode_utterance`.
    """
    result = AudioBlocks()
    segment = _segment_of(utterance, track)
    decoding = _Decoding(utterance.audio_filepath, segment, result if keep_damaged else None)
    result.blocks = decoding.resampled(sample_rate, seconds)
    return result


def audio_seconds(path: str | os.PathLike[str], *, track: int | None = None) -> float:
    """Return the length in seconds, without decoding if possible: FLAC whose header does not state it is decoded.

    Raises AudioError as `load_audio` does.
    """
    path = os.fspath(path)
    decoding = _Decoding(path, _Segment(track=track), Damage())
    with _open(path) as file:
        with decoding.source(file) as source:
            seconds = source.seconds()
        if seconds is not None:
            return seconds
        with decoding.reading(file, SECTION) as (rate, blocks):
            return sum(map(len, blocks)) / rate


def audio_info(path: str | os.PathLike[str], *, track: int | None = None) -> AudioInfo:
    """Return rate, channels and, for sound files, the length in seconds.

    A length that is a guess, or would need the complete file to be read, is None. Raises AudioError as `load_audio`
    does.
    """
    path = os.fspath(path)
    with _open(path) as file, _Decoding(path, _Segment(track=track), Damage()).source(file) as source:
        return AudioInfo(source.rate, source.channels, source.seconds() if isinstance(source, SndfileTrack) else None)


def stated_seconds(path: str | os.PathLike[str]) -> float | None:
    """Return the length in seconds that the file's header states, None where libsndfile finds none.

    It may be a guess (see `audio_seconds`), and needs no decoding. Raises AudioError for a file that is missing, empty,
    or of an impossible sampling rate.
    """
    path = os.fspath(path)
    with _open(path) as file, contextlib.suppress(soundfile.LibsndfileError), soundfile.SoundFile(file) as sound:
        _refuse_unlikely(path, sound.samplerate, sound.channels)
        if sound.frames < UNSTATED:
            return sound.frames / sound.samplerate
    return None


@dataclass(frozen=True)
class _Decoding:
    """One pass over a segment of a file."""

    path: str
    segment: _Segment
    damage: Damage | None = None
    """Record of damage; None: damage raises AudioError."""

    def load(self, sample_rate: int) -> np.ndarray:
        """Return the segment's samples (S,) float32."""
        with _open(self.path) as file:
            size = file.seek(0, os.SEEK_END)
            with self.reading(file, SECTION) as (rate, iterator):
                count, blocks = 0, list[np.ndarray]()
                for block in iterator:
                    blocks.append(block)
                    count += len(block)
                    self._refuse_large(count * max(1.0, sample_rate / rate), size)
            samples = blocks[0] if len(blocks) == 1 else np.concatenate([*blocks, np.zeros(0, np.float32)])
            if samples.size and rate != sample_rate:
                samples = soxr.resample(samples, rate, sample_rate, quality="HQ")
        if not samples.size:
            raise self._no_sample()
        return np.ascontiguousarray(samples, dtype=np.float32)

    def resampled(self, sample_rate: int, seconds: float) -> Iterator[np.ndarray]:
        """Yield the segment's samples in blocks of about ``seconds``."""
        empty = True
        with _open(self.path) as file, self.reading(file, seconds) as (rate, blocks):
            if rate != sample_rate:
                resample = soxr.ResampleStream(rate, sample_rate, 1, "float32", "HQ")
                ended = itertools.chain(((one, False) for one in blocks), [(np.zeros(0, np.float32), True)])
                blocks = (resample.resample_chunk(one, last=last) for one, last in ended)
            for samples in blocks:
                if len(samples):
                    empty = False
                    yield np.ascontiguousarray(samples, dtype=np.float32)
        if empty:
            raise self._no_sample()

    @contextlib.contextmanager
    def source(self, file: BinaryIO) -> Iterator[Track]:
        """Open the file with libsndfile, or with FFmpeg where libsndfile does not know it."""
        path, track = self.path, self.segment.track
        with contextlib.ExitStack() as stack:
            header = checked(file)
            try:
                source = stack.enter_context(SndfileTrack(path, file, header, self.damage is not None))
            except soundfile.LibsndfileError as error:
                reason = "its MP3 frames cannot be read" if header.endless else reason_of(error)
                source = stack.enter_context(open_ffmpeg_track(path, file, reason, track))
                source.losses = header.losses
            else:
                if track:
                    raise AudioError(f"{path} has no audio track {track}: it has one, counted from 0")
                if self.damage is not None and source.losses:  # FFmpeg, where installed, resumes after damage
                    with contextlib.suppress(AudioError):
                        _refuse_unlikely(path, source.rate, source.channels)
                        coded = stack.enter_context(open_ffmpeg_track(path, file, source.losses[0].reason))
                        _refuse_unlikely(path, coded.rate, coded.channels)
                        coded.losses = source.losses
                        source = coded
            _refuse_unlikely(path, source.rate, source.channels)
            yield source

    @contextlib.contextmanager
    def reading(self, file: BinaryIO, seconds: float) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
        """Open the file and yield its rate and an iterator over mono blocks of about ``seconds``.

        Damage raises AudioError, at the latest at the end of the iteration, unless it is recorded.
        """
        with self.source(file) as source:
            if source.losses and self.damage is None:
                raise self._damaged(source.losses[0])
            yield source.rate, self._blocks(source, seconds)

    def _blocks(self, source: Track, seconds: float) -> Iterator[np.ndarray]:
        rate, channels, channel = source.rate, source.channels, self.segment.channel
        if channel is not None and channel >= channels:
            raise AudioError(
                f"{self.path} has no channel {channel}: it has {channels}, counted from 0; choose one of them"
            )
        size = max(1, min(round(seconds * rate), BLOCK_SAMPLES // channels))
        mixed = channels > 1 and channel is None
        section = min(round(SECTION * rate), BLOCK_SAMPLES // channels) if mixed else size
        mixer = _Mixer()
        start, (wanted, most) = round(self.segment.offset * rate), self.segment.limits(rate)
        got, over, late = 0, list[np.ndarray](), list[LostAudio]()
        losses = list[LostAudio]()
        for event in source.read(start, section, None if most == math.inf else int(most) + 1, channel):
            if isinstance(event, LostAudio):
                if event.seconds is None or event.at + event.seconds > self.segment.offset:
                    late.append(event)
                continue
            if late and self.damage is None and (got or _too_much(late, 0.0)):
                raise self._damaged(late[0])
            losses, late = losses + late, []
            samples = mixer.mix(event) if mixed else event[:, channel or 0 if event.shape[1] > 1 else 0]
            finite = np.isfinite(samples)
            if not finite.all():
                bad = start + got + int(np.flatnonzero(~finite)[0])
                raise AudioError(
                    f"{self.path}: sample {bad} is not a finite number; write the file again as 16-bit PCM or FLAC"
                )
            got += len(samples)
            if got > wanted:
                over.append(samples)
                if got > most:
                    break
                continue
            for first in range(0, len(samples), size):
                yield samples[first : first + size]
        if over:
            tail = np.concatenate(over)
            if got > most:
                tail = tail[: int(wanted) - (got - len(tail))]
                got = int(wanted)
            yield tail
        self._check_end(source, got / rate, losses, late)
        if self.damage is not None and mixer.cancelled:
            self.damage.add(0.0, "its channels cancel each other out; the louder one is used")

    def _check_end(self, source: Track, got: float, losses: list[LostAudio], late: list[LostAudio]) -> None:
        """Compare the seconds read with the expected ones; ``late`` is the damage at the end.

        Raises AudioError, or records the damage, if more is missing than is tolerated.
        """
        if self.damage is None:
            if _too_much(late, got):
                raise self._damaged(late[0])
            _, message = self._missing(source, got, SHORT_FRACTION)
            if message:
                raise AudioError(message)
            return
        if _too_much(late, 0.0):
            losses = losses + late
        losses = losses or [*source.losses]
        missing, _ = self._missing(source, got, 0.0)
        lost = missing + sum(loss.seconds or 0.0 for loss in losses)
        if missing and not losses:
            losses = [LostAudio(self.segment.offset + got, missing, "it is truncated")]
        amount = f"{lost:.2f} s of its audio are lost" if lost else "some of its audio may be lost"
        self.damage.add(lost, f"{amount}, from {losses[0].at:.2f} s on: {losses[0].reason}" if losses else None)

    def _missing(self, source: Track, got: float, fraction: float) -> tuple[float, str]:
        """Return the seconds missing at the end where ``got`` were read, and a message.

        Less than 0.2 s, or than the given fraction of the segment, counts as 0.
        """
        path, segment = self.path, self.segment
        wanted, stated = segment.duration, segment.stated
        if wanted is None:
            promised = source.promised or 0.0
            short = max(promised - segment.offset - got, source.cut_short)
            if short > max(SHORT_SECONDS, fraction * (promised or got + short)):
                return short, (
                    f"{path} is truncated: its header promises {segment.offset + got + short:.2f} s, {got:.2f} s are "
                    "there; copy the file again or leave it out"
                )
        elif wanted - got > max(SHORT_SECONDS, fraction * wanted):
            return wanted - got, (
                f"{path} gives {got:.2f} s from {segment.offset:g} s on where the manifest says {wanted:.2f} s: "
                "the file is truncated or the duration wrong"
            )
        if not source.guessed and stated - got > max(FILE_SHORT_SECONDS, FILE_SHORT_FRACTION * stated):
            return stated - got, (
                f"{path}: duration is {stated:g} s in the manifest, but the audio has {got:.2f} s: the file is "
                "truncated or the duration wrong"
            )
        return 0.0, ""

    def _damaged(self, first: LostAudio) -> AudioError:
        return AudioError(
            f"{self.path} is damaged or truncated at {first.at:.2f} s ({first.reason}); copy the file again or remove "
            "the row"
        )

    def _no_sample(self) -> AudioError:
        if self.damage is not None and self.damage.warnings:
            return AudioError(f"{self.path} is damaged, and nothing of it can be decoded: {self.damage.warnings[0]}")
        where = f" from {self.segment.offset:g} s on" if self.segment.offset else ""
        return AudioError(f"{self.path} holds no sample{where}; leave it out")

    def _refuse_large(self, samples: float, size: int) -> None:
        if samples > LARGE_LOAD and 4 * samples > MOST_GROWTH * size:
            raise AudioError(
                f"{self.path}: its {size:,} bytes unpack to more than {4 * samples / 2**20:,.0f} MiB of samples, which "
                "no recording does; leave it out"
            )


class _Mixer:
    """The average of all channels, or the loudest channel where they cancel each other out."""

    def __init__(self):
        self.cancelled = False
        self._chosen: int | None = None

    def mix(self, samples: np.ndarray) -> np.ndarray:
        """Return a section (S, C) as (S,)."""
        mean = samples.mean(axis=1)
        powers = [float(np.dot(one, one)) for one in samples.T]
        if float(np.dot(mean, mean)) >= CANCELLED * sum(powers) / len(powers) ** 2:
            return mean
        self.cancelled = True
        if self._chosen is None or powers[self._chosen] < 0.1 * max(powers):
            self._chosen = int(np.argmax(powers))
        return samples[:, self._chosen]


def _too_much(losses: list[LostAudio], total: float) -> bool:
    """Return whether more is lost at the edge of ``total`` seconds of audio than is tolerated."""
    seconds = [loss.seconds for loss in losses]
    return None in seconds or sum(one or 0.0 for one in seconds) > max(SHORT_SECONDS, SHORT_FRACTION * total)


def _refuse_unlikely(path: str, rate: int, channels: int) -> None:
    """Raise AudioError for a rate or number of channels with which a few bytes could fill the memory."""
    if not LEAST_RATE <= rate <= MOST_RATE or channels > MOST_CHANNELS:
        raise AudioError(
            f"{path} claims {channels} channels at {rate:,} Hz, which no recording has (at most {MOST_CHANNELS} "
            f"channels and {LEAST_RATE:,} to {MOST_RATE:,} Hz are read); leave it out"
        )


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """Open a path, URL or container member as a seekable binary file; its errors become AudioError."""
    try:
        with contextlib.ExitStack() as stack:
            member = read_member(path)
            if member is not None:
                file: BinaryIO = io.BytesIO(member)
            elif is_url(path):
                file = io.BytesIO(read_bytes(path))
            elif path == STANDARD_INPUT:
                file = stack.enter_context(open(_standard_input().name, "rb"))
            else:
                file = stack.enter_context(open_binary(path))
            if not file.seek(0, os.SEEK_END):
                raise AudioError(f"{path} is empty (0 bytes); copy it again or leave it out")
            file.seek(0)
            yield file
    except FileNotFoundError:
        raise AudioError(
            f"{path} does not exist; relative paths in a manifest are relative to the manifest's folder"
        ) from None
    except IsADirectoryError:
        raise AudioError(f"{path} is a folder, not an audio file") from None
    except (ManifestError, OSError, ValueError, ImportError) as error:
        if isinstance(error, AudioError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.filename == path else None
        raise AudioError(f"{path} cannot be read: {reason or error}") from None
    except Exception as error:  # decoders may raise anything for a damaged file
        raise AudioError(
            f"{path} cannot be decoded ({type(error).__name__}: {error}); it is damaged, or no audio: leave it out"
        ) from None


@functools.cache
def _standard_input() -> "IO[bytes]":
    """Copy standard input to a file that lasts as long as this process, once."""
    file = tempfile.NamedTemporaryFile(prefix="canter-")  # noqa: SIM115
    shutil.copyfileobj(sys.stdin.buffer, file)
    file.flush()
    return file
