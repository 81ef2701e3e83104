"""Audio in: any file, URL or container member to mono float32 at one rate.

A member of a container is written ``FILE::NAME`` (a tar; found by walking its headers once) or
``FILE::NAME@START+BYTES`` (any file in which the member lies uncompressed; read directly). The index always
writes the second form, so a shard is read directly and never searched.
"""

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
from canter.corpus.ffmpeg import Coded, open_coded
from canter.corpus.headers import Loss
from canter.corpus.libsndfile import UNSTATED, Sound, checked, reason_of
from canter.corpus.remote import is_url, open_binary, read_bytes
from canter.corpus.utterance import Utterance
from canter.errors import AudioError, ManifestError

STANDARD_INPUT = "-"
SHORT_SECONDS, SHORT_SHARE = 0.2, 0.02  # how much less than the duration asked for still is rounding
WHOLE_SECONDS, WHOLE_SHARE = 0.25, 0.1  # and than the manifest's, of a whole file: what training forgives too
LEAST_RATE, MOST_RATE, MOST_CHANNELS = 1000, 768_000, 32
BLOCK_SAMPLES = 1 << 24  # in memory at once, all channels together
SECTION = 30.0  # seconds over which it is decided how channels are mixed
# Power of the average below which channels cancel each other out, as a fraction of that of unrelated ones.
CANCELLED = 0.05
# Samples from which a load is refused if it has more than so many bytes for each byte of its file.
LARGE_LOAD, MOST_GROWTH = 1 << 26, 1000


@dataclass(frozen=True)
class _Stretch:
    """A part of a file that is to be read, in seconds."""

    offset: float = 0.0
    duration: float | None = None
    """None: to the end of the file."""
    channel: int | None = None
    """None: the average of all."""
    stated: float = 0.0
    """Length of the whole file by the manifest."""
    rounded: bool = False
    """Up to `SHORT_SECONDS` that follow the duration, and end the file, belong to it."""
    track: int | None = None
    """Audio track of a file with several; None: the default one."""

    def limits(self, rate: int) -> tuple[float, float]:
        """Return the number of samples wanted, and the number up to which the end of the file belongs to them."""
        if self.duration is None:
            return math.inf, math.inf
        wanted = round(self.duration * rate)
        return wanted, wanted + self.rounded * int(SHORT_SECONDS * rate)


@dataclass
class _Kept:
    """Findings about damaged audio that is kept."""

    lost_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DecodedAudio:
    """The audio of an utterance, as far as it could be decoded."""

    samples: np.ndarray  # (S,) float32
    lost_seconds: float = 0.0
    """Seconds that are damaged or missing."""
    warnings: tuple[str, ...] = ()
    """Messages for the reader of the transcript: losses, and channels that cancel each other out."""


class AudioBlocks:
    """An iterator over blocks (S,) of float32 samples. Once it is exhausted, ``lost_seconds`` and ``warnings`` say what
    `DecodedAudio` would."""

    def __init__(self, blocks: Iterator[np.ndarray], kept: _Kept):
        self._blocks, self._kept = blocks, kept

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return next(self._blocks)

    @property
    def lost_seconds(self) -> float:
        """Seconds found to be damaged or missing so far."""
        return self._kept.lost_seconds

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings so far."""
        return tuple(self._kept.warnings)


@dataclass(frozen=True)
class AudioInfo:
    """Facts of an audio file that need no decoding."""

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
    """Return (S,) float32 samples, mono, at ``sample_rate``: ``duration`` seconds from ``offset`` on, read by seeking.

    Channels are averaged, unless one is named (from 0) or they cancel each other out, and other rates resampled (soxr,
    HQ). ``track`` is the audio track of a video, from 0 (default: the one marked as default, else the first); the time
    before it starts is silence. Raises `AudioError`, naming the file and the way out, where it is missing, not audio,
    empty, damaged, truncated, shorter than asked or than its header says (by more than 0.2 s and 2 %), or holds samples
    that are not finite.
    """
    return _load(os.fspath(path), _Stretch(offset, duration, channel, track=track), sample_rate)


def load_utterance(utterance: Utterance, sample_rate: int = 16000) -> np.ndarray:
    """Return the utterance's samples (S,) as `load_audio` does: the whole file, unless its row has an offset."""
    return _load(utterance.audio_filepath, _stretch_of(utterance), sample_rate)


def decode_utterance(utterance: Utterance, sample_rate: int = 16000, *, track: int | None = None) -> DecodedAudio:
    """Return the utterance's samples with whatever can be decoded of a damaged file.

    Where time stamps or frame numbers tell how much is missing, silence is in its place. Raises `AudioError` where
    nothing can be decoded.
    """
    kept = _Kept()
    samples = _load(utterance.audio_filepath, _stretch_of(utterance, track), sample_rate, kept)
    return DecodedAudio(samples, kept.lost_seconds, tuple(kept.warnings))


def audio_blocks(
    utterance: Utterance,
    sample_rate: int = 16000,
    seconds: float = 30.0,
    *,
    keep_damaged: bool = False,
    track: int | None = None,
) -> AudioBlocks:
    """Return the utterance's samples in blocks of about so many seconds, mono, at ``sample_rate``, so that audio of any
    length needs the memory of one block.

    Iterating raises `AudioError` as `load_utterance` does, once it comes to what is damaged or missing; with
    ``keep_damaged`` damaged audio is treated as by `decode_utterance`.
    """
    kept = _Kept()
    stretch = _stretch_of(utterance, track)
    blocks = _resampled_blocks(utterance.audio_filepath, stretch, sample_rate, seconds, kept if keep_damaged else None)
    return AudioBlocks(blocks, kept)


def _resampled_blocks(
    path: str, stretch: _Stretch, sample_rate: int, seconds: float, kept: _Kept | None
) -> Iterator[np.ndarray]:
    empty = True
    with _open(path) as file, _reading(path, file, stretch, seconds, kept) as (rate, blocks):
        if rate != sample_rate:
            resample = soxr.ResampleStream(rate, sample_rate, 1, "float32", "HQ")
            ended = itertools.chain(((one, False) for one in blocks), [(np.zeros(0, np.float32), True)])
            blocks = (resample.resample_chunk(one, last=last) for one, last in ended)
        for samples in blocks:
            if len(samples):
                empty = False
                yield np.ascontiguousarray(samples, dtype=np.float32)
    if empty:
        raise AudioError(_no_sample(path, stretch, kept))


def audio_seconds(path: str | os.PathLike[str], *, track: int | None = None) -> float:
    """Return the length in seconds without decoding, if possible: FLAC whose header leaves it open is decoded.

    Raises `AudioError` as `load_audio` does.
    """
    path = os.fspath(path)
    with _open(path) as file:
        with _source(path, file, _Stretch(track=track), _Kept()) as source:
            seconds = _seconds_of(source)
        if seconds is not None:
            return seconds
        with _reading(path, file, _Stretch(track=track), SECTION, _Kept()) as (rate, blocks):
            return sum(map(len, blocks)) / rate


def _seconds_of(source: "Sound | Coded") -> float | None:
    if isinstance(source, Coded):
        return source.seconds()
    return None if source.length is None else source.length / source.rate


def audio_info(path: str | os.PathLike[str], *, track: int | None = None) -> AudioInfo:
    """Return rate, channels and, of sound files, the length in seconds.

    A length that is a guess, or would need the whole file to be read, is None. Raises `AudioError` as `load_audio`
    does.
    """
    path = os.fspath(path)
    with _open(path) as file, _source(path, file, _Stretch(track=track), _Kept()) as source:
        seconds = _seconds_of(source) if isinstance(source, Sound) else None
        return AudioInfo(source.rate, source.channels, seconds)


def stated_seconds(path: str | os.PathLike[str]) -> float | None:
    """Return the length in seconds that the file's header states, None where libsndfile finds none.

    It may be a guess (see `audio_seconds`), and costs no decoding. Raises `AudioError` for a file that is missing,
    empty, or of a rate that no recording has.
    """
    path = os.fspath(path)
    with (
        _open(path) as file,
        contextlib.suppress(soundfile.LibsndfileError),
        soundfile.SoundFile(file) as sound,
    ):
        _refuse_unlikely(path, sound.samplerate, sound.channels)
        if sound.frames < UNSTATED:
            return sound.frames / sound.samplerate
    return None


def _stretch_of(utterance: Utterance, track: int | None = None) -> _Stretch:
    """A row with an offset, 0 too, is a segment. One without is the whole file, whatever duration it states: a
    duration that was rounded or is wrong must not cut speech off."""
    offset, duration = utterance.offset, utterance.duration
    if offset is None:
        return _Stretch(channel=utterance.channel_selector, stated=duration, track=track)
    return _Stretch(offset, duration, utterance.channel_selector, rounded=offset == 0, track=track)


def _load(path: str, stretch: _Stretch, sample_rate: int, kept: _Kept | None = None) -> np.ndarray:
    with _open(path) as file:
        size = file.seek(0, os.SEEK_END)
        rate, blocks = _all_blocks(path, file, size, stretch, sample_rate, kept)
        samples = blocks[0] if len(blocks) == 1 else np.concatenate([*blocks, np.zeros(0, np.float32)])
        if samples.size and rate != sample_rate:
            samples = soxr.resample(samples, rate, sample_rate, quality="HQ")
    if not samples.size:
        raise AudioError(_no_sample(path, stretch, kept))
    return np.ascontiguousarray(samples, dtype=np.float32)


def _all_blocks(
    path: str, file: BinaryIO, size: int, stretch: _Stretch, sample_rate: int, kept: _Kept | None
) -> tuple[int, list[np.ndarray]]:
    """Return the rate of a file of ``size`` bytes, and the blocks of the stretch."""
    with _reading(path, file, stretch, SECTION, kept) as (rate, runs):
        count, blocks = 0, list[np.ndarray]()
        for block in runs:
            blocks.append(block)
            count += len(block)
            _refuse_large(path, count * max(1.0, sample_rate / rate), size)
    return rate, blocks


def _refuse_large(path: str, samples: float, size: int) -> None:
    if samples > LARGE_LOAD and 4 * samples > MOST_GROWTH * size:
        raise AudioError(
            f"{path}: its {size:,} bytes unpack to more than {4 * samples / 2**20:,.0f} MiB of samples, which no "
            "recording does; leave it out"
        )


@contextlib.contextmanager
def _source(path: str, file: BinaryIO, stretch: _Stretch, kept: _Kept | None) -> "Iterator[Sound | Coded]":
    """Open a file with the decoder that knows it."""
    with contextlib.ExitStack() as stack:
        header = checked(file)
        try:
            source = stack.enter_context(Sound(path, file, header, kept is not None))
        except soundfile.LibsndfileError as error:
            reason = "its MP3 frames cannot be read" if header.endless else reason_of(error)
            source = stack.enter_context(open_coded(path, file, reason, stretch.track))
            source.losses = header.losses
        else:
            if stretch.track:
                raise AudioError(f"{path} has no audio track {stretch.track}: it has one, counted from 0")
            if kept is not None and source.losses:  # FFmpeg, where it is installed, goes on after damage
                with contextlib.suppress(AudioError):
                    _refuse_unlikely(path, source.rate, source.channels)
                    coded = stack.enter_context(open_coded(path, file, source.losses[0].reason))
                    _refuse_unlikely(path, coded.rate, coded.channels)
                    coded.losses = source.losses
                    source = coded
        _refuse_unlikely(path, source.rate, source.channels)
        yield source


@contextlib.contextmanager
def _reading(
    path: str, file: BinaryIO, stretch: _Stretch, seconds: float, kept: _Kept | None
) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Open a file: its rate, and the stretch in blocks of about so many seconds, mono.

    Without ``kept`` damage raises `AudioError`, at the latest once all blocks are read.
    """
    with _source(path, file, stretch, kept) as source:
        if source.losses and kept is None:
            raise AudioError(_damaged(path, [*source.losses]))
        yield source.rate, _blocks(path, source, stretch, seconds, kept)


def _blocks(
    path: str, source: "Sound | Coded", stretch: _Stretch, seconds: float, kept: _Kept | None
) -> Iterator[np.ndarray]:
    """Yield the stretch in blocks, mono. Raises `AudioError` for damage, and at the end if less came than header or
    manifest promise; with ``kept`` what is lost is noted there instead."""
    rate, channels, channel = source.rate, source.channels, stretch.channel
    if channel is not None and channel >= channels:
        raise AudioError(f"{path} has no channel {channel}: it has {channels}, counted from 0; correct the manifest")
    size = max(1, min(round(seconds * rate), BLOCK_SAMPLES // channels))
    mixed = channels > 1 and channel is None
    section = min(round(SECTION * rate), BLOCK_SAMPLES // channels) if mixed else size
    mixer = _Mixer()
    start, (wanted, most) = round(stretch.offset * rate), stretch.limits(rate)
    got, over, late = 0, list[np.ndarray](), list[Loss]()
    damage = list[Loss]()
    events = source.read(start, section, None if most == math.inf else int(most) + 1, channel)
    for event in events:
        if isinstance(event, Loss):
            if event.seconds is None or event.at + event.seconds > stretch.offset:
                late.append(event)
            continue
        if late and kept is None and (got or _too_much(late, 0.0)):
            raise AudioError(_damaged(path, late))
        damage, late = damage + late, []
        samples = mixer.mix(event) if mixed else event[:, channel or 0 if event.shape[1] > 1 else 0]
        finite = np.isfinite(samples)
        if not finite.all():
            bad = start + got + int(np.flatnonzero(~finite)[0])
            raise AudioError(f"{path}: sample {bad} is not a finite number; write the file anew as 16-bit PCM or FLAC")
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
    _check_end(path, source, stretch, got / rate, damage, late, kept)
    if kept is not None and mixer.cancelled:
        kept.warnings.append("its channels cancel each other out; the louder one is used")


class _Mixer:
    """The average of all channels; where they cancel each other out, the loudest instead."""

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


def _too_much(losses: list[Loss], whole: float) -> bool:
    """Return whether more is lost at an edge of ``whole`` seconds of audio than is forgiven."""
    seconds = [loss.seconds for loss in losses]
    return None in seconds or sum(one or 0.0 for one in seconds) > max(SHORT_SECONDS, SHORT_SHARE * whole)


def _check_end(
    path: str,
    source: "Sound | Coded",
    stretch: _Stretch,
    got: float,
    damage: list[Loss],
    late: list[Loss],
    kept: _Kept | None,
) -> None:
    """Compare the seconds read of a stretch with what was to be there; ``late`` is damage at its end.

    Raises `AudioError` if more is missing than is forgiven; with ``kept`` that is noted there instead.
    """
    if kept is None:
        if _too_much(late, got):
            raise AudioError(_damaged(path, late))
        _, told = _missing(path, source, stretch, got, SHORT_SHARE)
        if told:
            raise AudioError(told)
        return
    if _too_much(late, 0.0):
        damage = damage + late
    damage = damage or [*source.losses]
    missing, _ = _missing(path, source, stretch, got, 0.0)
    lost = missing + sum(loss.seconds or 0.0 for loss in damage)
    kept.lost_seconds += lost
    if damage:
        kept.warnings.append(_lost(lost, damage[0]))
    elif missing:
        kept.warnings.append(_lost(missing, Loss(stretch.offset + got, missing, "it is truncated")))


def _missing(path: str, source: "Sound | Coded", stretch: _Stretch, got: float, share: float) -> tuple[float, str]:
    """Return the seconds that are missing at the end of a stretch of which ``got`` were read, and the message; 0 where
    they are fewer than 0.2 or the given fraction of the whole."""
    wanted, stated = stretch.duration, stretch.stated
    if wanted is None:
        promised = source.promised or 0.0
        short = max(promised - stretch.offset - got, source.cut_short)
        if short > max(SHORT_SECONDS, share * (promised or got + short)):
            return short, (
                f"{path} is truncated: its header promises {stretch.offset + got + short:.2f} s, {got:.2f} s are "
                "there; copy the file again or leave it out"
            )
    elif wanted - got > max(SHORT_SECONDS, share * wanted):
        return wanted - got, (
            f"{path} gives {got:.2f} s from {stretch.offset:g} s on where the manifest says {wanted:.2f} s: "
            "the file is truncated or the duration wrong"
        )
    if not source.guessed and stated - got > max(WHOLE_SECONDS, WHOLE_SHARE * stated):
        return stated - got, (
            f"{path}: duration is {stated:g} s in the manifest, but the audio has {got:.2f} s: the file is truncated "
            "or the duration wrong"
        )
    return 0.0, ""


def _lost(seconds: float, first: Loss) -> str:
    amount = f"{seconds:.2f} s of its audio are lost" if seconds else "some of its audio may be lost"
    return f"{amount}, from {first.at:.2f} s on: {first.reason}"


def _damaged(path: str, losses: list[Loss]) -> str:
    return (
        f"{path} is damaged or truncated at {losses[0].at:.2f} s ({losses[0].reason}); copy the file again or remove "
        "the row"
    )


def _no_sample(path: str, stretch: _Stretch, kept: _Kept | None) -> str:
    if kept is not None and kept.warnings:
        return f"{path} is damaged, and nothing of it can be decoded: {kept.warnings[0]}"
    where = f" from {stretch.offset:g} s on" if stretch.offset else ""
    return f"{path} holds no sample{where}; leave it out"


def _refuse_unlikely(path: str, rate: int, channels: int) -> None:
    """A few bytes may claim a rate or channels with which a second of audio, or a byte of the file, fills the
    memory."""
    if not LEAST_RATE <= rate <= MOST_RATE or channels > MOST_CHANNELS:
        raise AudioError(
            f"{path} claims {channels} channels at {rate:,} Hz, which no recording has (at most {MOST_CHANNELS} "
            f"channels and {LEAST_RATE:,} to {MOST_RATE:,} Hz are read); leave it out"
        )


@contextlib.contextmanager
def _open(path: str):
    """A seekable binary file on a path, URL or container member."""
    try:
        with contextlib.ExitStack() as stack:
            member = read_member(path)
            if member is not None:
                file = io.BytesIO(member)
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
    except Exception as error:  # a decoder may raise anything: it is this file's fault, and no other's
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
