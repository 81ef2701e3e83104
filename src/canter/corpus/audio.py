"""Audio in: any file, URL or container member to mono float32 at one rate.

A member of a container is written ``FILE::NAME`` (a tar; found by walking its headers once) or
``FILE::NAME@START+BYTES`` (any file in which the member lies uncompressed; read directly). The index always
writes the second form, so a shard is read in runs and never searched.
"""

import contextlib
import functools
import io
import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from canter.corpus.ffmpeg import Coded, open_coded
from canter.corpus.remote import is_url, open_binary, read_bytes, stamp
from canter.corpus.tar import Member, walk_tar
from canter.corpus.utterance import Utterance
from canter.errors import AudioError, ManifestError

_MEMBER = re.compile(r"(?P<file>.+?)::(?P<name>.*?)(?:@(?P<start>\d+)\+(?P<bytes>\d+))?", re.DOTALL)
_WAV_LENGTH = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED = 0x7FFF0000  # data sizes from here on are what writers to a pipe leave in the header
_UNSTATED = 2**63 - 1  # frames that libsndfile makes of a length that the header leaves open
SHORT_SECONDS, SHORT_SHARE = 0.2, 0.02  # how much less than the duration asked for still is rounding
WHOLE_SECONDS, WHOLE_SHARE = 0.25, 0.1  # and than the manifest's, of a whole file: what training forgives too
MOST_RATE, MOST_CHANNELS = 768_000, 32
BLOCK_SAMPLES = 1 << 24  # in memory at once, all channels together


def member_ref(file: str | os.PathLike[str], name: str, start: int, size: int) -> str:
    """How a manifest names ``size`` bytes from byte ``start`` of a container."""
    return f"{os.fspath(file)}::{name}@{start}+{size}"


def container_of(path: str) -> str:
    """The file on disk that holds the audio: the container of a member, or the path itself."""
    match = _MEMBER.fullmatch(path)
    return match["file"] if match else path


@dataclass(frozen=True)
class _Stretch:
    """What is wanted of a file, in seconds."""

    offset: float = 0.0
    duration: float | None = None
    """None: to the end of the file."""
    channel: int | None = None
    """None: the average of all."""
    stated: float = 0.0
    """How long the manifest says that a file read to its end is."""
    rounded: bool = False
    """Up to `SHORT_SECONDS` that follow the duration, and end the file, belong to it."""

    def samples(self, rate: int, rest: int) -> int:
        """How many to read where the file has ``rest`` from the offset on."""
        if self.duration is None:
            return rest
        wanted = round(self.duration * rate)
        return rest if self.rounded and rest - wanted <= SHORT_SECONDS * rate else min(wanted, rest)


def load_audio(
    path: str | os.PathLike[str],
    *,
    offset: float = 0.0,
    duration: float | None = None,
    sample_rate: int = 16000,
    channel: int | None = None,
) -> np.ndarray:
    """``(S,)`` float32 samples, mono, at ``sample_rate``: ``duration`` seconds from ``offset`` on, read
    by seeking.

    Channels are averaged, unless one is named (from 0), and other rates resampled (soxr, HQ). Raises
    `AudioError`, naming the file and the way out, where it is missing, not audio, empty, truncated, shorter
    than asked or than its header says (by more than 0.2 s and 2 %), or holds samples that are not finite.
    """
    return _load(os.fspath(path), _Stretch(offset, duration, channel), sample_rate)


def load_utterance(utterance: Utterance, sample_rate: int = 16000) -> np.ndarray:
    """The utterance's samples (S,), as `load_audio` gives them: the whole file, unless its row has an offset."""
    return _load(utterance.audio_filepath, _stretch_of(utterance), sample_rate)


def audio_blocks(
    utterance: Utterance, sample_rate: int = 16000, seconds: float = 30.0
) -> Iterator[np.ndarray]:
    """The utterance's samples in runs of about so many seconds, mono, at ``sample_rate``, so that audio of any
    length needs the memory of one run alone.

    Raises `AudioError` as `load_utterance` does, once it comes to what is damaged or missing.
    """
    path, empty = utterance.audio_filepath, True
    with _open(path) as file, _reading(path, file, _stretch_of(utterance), seconds) as (rate, blocks):
        if rate != sample_rate:
            resample = soxr.ResampleStream(rate, sample_rate, 1, "float32", "HQ")
            ended = itertools.chain(((one, False) for one in blocks), [(np.zeros(0, np.float32), True)])
            blocks = (resample.resample_chunk(one, last=last) for one, last in ended)
        for samples in blocks:
            if len(samples):
                empty = False
                yield np.ascontiguousarray(samples, dtype=np.float32)
    if empty:
        raise AudioError(f"{path} holds no sample; remove the row")


def audio_seconds(path: str | os.PathLike[str]) -> float:
    """The length in seconds from the header alone; FLAC that leaves it open, as written to a pipe, is decoded.
    Raises `AudioError` as `load_audio` does."""
    path = os.fspath(path)
    with _open(path) as file:
        with contextlib.suppress(soundfile.LibsndfileError), _Sound(file) as sound:
            _refuse_unlikely(path, sound.samplerate, sound.channels)
            if sound.frames != _UNSTATED:
                return sound.frames / sound.samplerate
        file.seek(0)
        with _reading(path, file, _Stretch()) as (rate, blocks):
            return sum(map(len, blocks)) / rate


def stated_seconds(path: str | os.PathLike[str]) -> float | None:
    """Return the length in seconds that the file's header states, None where libsndfile finds none.

    It may be a guess (see `audio_seconds`), and costs no decoding. Raises `AudioError` for a file that is missing,
    empty, or of a rate that no recording has.
    """
    path = os.fspath(path)
    with _open(path) as file, contextlib.suppress(soundfile.LibsndfileError), _Sound(file) as sound:
        _refuse_unlikely(path, sound.samplerate, sound.channels)
        if sound.frames != _UNSTATED:
            return sound.frames / sound.samplerate
    return None


def _stretch_of(utterance: Utterance) -> _Stretch:
    """A row with an offset, 0 too, is a segment. One without is the whole file, whatever duration it states: a
    duration that was rounded or is wrong must not cut speech off."""
    offset, duration = utterance.offset, utterance.duration
    if offset is None:
        return _Stretch(channel=utterance.channel_selector, stated=duration)
    return _Stretch(offset, duration, utterance.channel_selector, rounded=offset == 0)


class _Sound(soundfile.SoundFile):
    """Read from front to back. soundfile seeks after every read, to where it is already, in what can be sought in;
    at the end of FLAC of unstated length that fails, and what was read is lost."""

    def seekable(self) -> bool:
        return False


def _load(path: str, stretch: _Stretch, sample_rate: int) -> np.ndarray:
    with _open(path) as file, _reading(path, file, stretch) as (rate, runs):
        blocks = list(runs)
    samples = blocks[0] if len(blocks) == 1 else np.concatenate([*blocks, np.zeros(0, np.float32)])
    if samples.size and rate != sample_rate:
        samples = soxr.resample(samples, rate, sample_rate, quality="HQ")
    if not samples.size:
        where = f" from {stretch.offset:g} s on" if stretch.offset else ""
        raise AudioError(f"{path} holds no sample{where}; remove the row")
    return np.ascontiguousarray(samples, dtype=np.float32)


@contextlib.contextmanager
def _reading(
    path: str, file: BinaryIO, stretch: _Stretch, seconds: float = 30.0
) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """The file's rate, and the stretch in runs of about so many seconds, mono."""
    with contextlib.ExitStack() as stack:
        try:
            sound = stack.enter_context(_Sound(file))
        except soundfile.LibsndfileError as error:
            reason = _reason(error)
        else:
            yield sound.samplerate, _blocks(path, file, sound, stretch, seconds)
            return
        coded = stack.enter_context(open_coded(path, file, reason))
        yield coded.rate, _coded_blocks(path, coded, stretch, seconds)


def _coded_blocks(path: str, coded: Coded, stretch: _Stretch, seconds: float) -> Iterator[np.ndarray]:
    """As `_blocks`; how long the file is shows only at its end."""
    rate = coded.rate
    _refuse_unlikely(path, rate, coded.channels)
    if stretch.channel is not None and stretch.channel >= coded.channels:
        raise AudioError(_no_channel(path, stretch.channel, coded.channels))
    start = round(stretch.offset * rate)
    wanted = math.inf if stretch.duration is None else round(stretch.duration * rate)
    most = wanted + SHORT_SECONDS * rate * stretch.rounded
    pending, given, got = list[np.ndarray](), 0, 0
    for samples in coded.read(start, stretch.channel):
        if not np.isfinite(samples).all():
            raise AudioError(_not_finite(path, start + got + int(np.flatnonzero(~np.isfinite(samples))[0])))
        pending.append(samples)
        got += len(samples)
        if got > most:
            break
        if got <= wanted and got - given >= seconds * rate:
            yield np.concatenate(pending)
            pending, given = [], got
    got = got if got <= most else round(wanted)
    yield np.concatenate([*pending, np.zeros(0, np.float32)])[: got - given]
    _refuse_short(path, stretch, got / rate)


def _blocks(
    path: str, file: BinaryIO, sound: _Sound, stretch: _Stretch, seconds: float = 30.0
) -> Iterator[np.ndarray]:
    """The stretch in runs, mono. Raises `AudioError` at the end if less came than header or manifest promise."""
    rate, channels = sound.samplerate, sound.channels
    _refuse_unlikely(path, rate, channels)
    _refuse_truncated(path, sound)
    if stretch.channel is not None and stretch.channel >= channels:
        raise AudioError(_no_channel(path, stretch.channel, channels))
    size = max(1, min(round(seconds * rate), BLOCK_SAMPLES // channels))
    start = round(stretch.offset * rate)
    with _damage_told(path):
        if sound.frames == _UNSTATED:  # nor can be sought in
            for skipped in range(0, start, size):
                sound.read(min(size, start - skipped))
        elif start:
            start = sound.seek(min(start, sound.frames))
    rest = sound.frames - start
    left, got = stretch.samples(rate, rest), 0
    while left > 0:
        with _damage_told(path):
            samples = sound.read(min(left, size), dtype="float32", always_2d=True)
        if not len(samples):
            break
        if channels == 1 or stretch.channel is not None:
            samples = samples[:, stretch.channel or 0]
        else:
            samples = samples.mean(axis=1)
        if not np.isfinite(samples).all():
            bad = start + got + int(np.flatnonzero(~np.isfinite(samples))[0])
            raise AudioError(_not_finite(path, bad))
        left, got = left - len(samples), got + len(samples)
        yield samples
    guessed = _length_is_guessed(file, sound)
    promised = 0.0 if guessed or sound.frames == _UNSTATED else rest / rate
    if stretch.duration is None and promised - got / rate > _rounding(promised):
        raise AudioError(
            f"{path} is truncated: its header promises {promised:.2f} s, {got / rate:.2f} s are there; copy the "
            "file again or remove the row"
        )
    _refuse_short(path, replace(stretch, stated=0.0) if guessed else stretch, got / rate)


def _rounding(seconds: float) -> float:
    return max(SHORT_SECONDS, SHORT_SHARE * seconds)


def _refuse_short(path: str, stretch: _Stretch, got: float) -> None:
    wanted, stated = stretch.duration, stretch.stated
    if wanted is not None and wanted - got > _rounding(wanted):
        raise AudioError(
            f"{path} gives {got:.2f} s from {stretch.offset:g} s on where the manifest says {wanted:.2f} s: "
            "the file is truncated or the duration wrong"
        )
    if stated - got > max(WHOLE_SECONDS, WHOLE_SHARE * stated):
        raise AudioError(
            f"{path}: duration is {stated:g} s in the manifest, but the audio has {got:.2f} s: the file is truncated "
            "or the duration wrong"
        )


def _length_is_guessed(file: BinaryIO, sound: soundfile.SoundFile) -> bool:
    """Whether the length is reckoned from the bit rate: of an MP3 whose first frame has none of the tags that
    count frames."""
    if sound.format != "MP3":
        return False
    file.seek(0)
    head = file.read(10)
    size = sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=False))
    file.seek(10 + size if head.startswith(b"ID3") else 0)
    frame = file.read(2048)
    return not any(tag in frame for tag in (b"Xing", b"Info", b"VBRI"))


def _refuse_unlikely(path: str, rate: int, channels: int) -> None:
    """A few bytes may claim a rate or channels of which one second fills the memory."""
    if rate > MOST_RATE or channels > MOST_CHANNELS:
        raise AudioError(
            f"{path} claims {rate:,} samples a second in {channels} channels, which no recording has (at most "
            f"{MOST_RATE:,} and {MOST_CHANNELS} are read); remove the row"
        )


def _refuse_truncated(path: str, sound: soundfile.SoundFile) -> None:
    short = _WAV_LENGTH.search(sound.extra_info)
    if short and int(short[2]) < int(short[1]) < _STREAMED:
        raise AudioError(
            f"{path} is truncated: its header promises {short[1]} bytes of samples, {short[2]} are "
            "there; copy the file again or remove the row"
        )


@contextlib.contextmanager
def _damage_told(path: str) -> Iterator[None]:
    try:
        yield
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path} is damaged or truncated ({_reason(error)}); copy the file again or remove the row"
        ) from None


def _no_channel(path: str, channel: int, channels: int) -> str:
    return f"{path} has no channel {channel}: it has {channels}, counted from 0; correct the manifest"


def _not_finite(path: str, sample: int) -> str:
    return f"{path}: sample {sample} is not a finite number; write the file anew as 16-bit PCM or FLAC"


def _reason(error: soundfile.LibsndfileError) -> str:
    return error.error_string.strip().removeprefix("Error : ").rstrip(".")


@contextlib.contextmanager
def _open(path: str):
    """A seekable binary file on a path, URL or container member."""
    try:
        with contextlib.ExitStack() as stack:
            match = _MEMBER.fullmatch(path)
            if match and not os.path.exists(path):
                file = io.BytesIO(_read_member(path, match))
            elif is_url(path):
                file = io.BytesIO(read_bytes(path))
            else:
                file = stack.enter_context(open_binary(path))
            if not file.seek(0, os.SEEK_END):
                raise AudioError(f"{path} is empty (0 bytes); copy it again or remove the row")
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


def _read_member(path: str, match: re.Match[str]) -> bytes:
    file, name, start, size = match.group("file", "name", "start", "bytes")
    if start is None:
        members = _tar_members(file, stamp(file))
        if name not in members:
            raise AudioError(f"{path}: there is no {name!r} among the {len(members)} members of {file}")
        start, size = members[name]
    data = read_bytes(file, int(start), int(size))
    if len(data) < int(size):
        raise AudioError(f"{path}: {file} ends within it: truncated, or changed since it was indexed")
    return data


@functools.lru_cache(maxsize=16)
def _tar_members(path: str, version: str) -> dict[str, tuple[int, int]]:
    """``{name: (first byte, bytes)}``. ``version`` keeps a changed tar from the cache."""
    return {one.name: (one.start, one.size) for one in walk_tar(path) if isinstance(one, Member)}
