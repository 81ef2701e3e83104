"""Audio in: any file, URL or container member to mono float32 at one rate.

A member of a container is written ``FILE::NAME`` (a tar; found by walking its headers once) or
``FILE::NAME@START+BYTES`` (any file in which the member lies uncompressed; read directly). The index always
writes the second form, so a shard is read in runs and never searched.
"""

import contextlib
import functools
import io
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from canter.corpus.tar import Member, walk_tar
from canter.corpus.utterance import Utterance
from canter.errors import AudioError, ManifestError

_MEMBER = re.compile(r"(?P<file>.+?)::(?P<name>.*?)(?:@(?P<start>\d+)\+(?P<bytes>\d+))?", re.DOTALL)
_WAV_LENGTH = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED = 0x7FFF0000  # data sizes from here on are what writers to a pipe leave in the header
SHORT_SECONDS, SHORT_SHARE = 0.2, 0.02  # how much less than the manifest's duration still is rounding


def member_ref(file: str | os.PathLike[str], name: str, start: int, size: int) -> str:
    """How a manifest names ``size`` bytes from byte ``start`` of a container."""
    return f"{os.fspath(file)}::{name}@{start}+{size}"


def container_of(path: str) -> str:
    """The file on disk that holds the audio: the container of a member, or the path itself."""
    match = _MEMBER.fullmatch(path)
    return match["file"] if match else path


def load_audio(
    path: str | os.PathLike[str],
    *,
    offset: float = 0.0,
    duration: float | None = None,
    sample_rate: int = 16000,
) -> np.ndarray:
    """``(S,)`` float32 samples, mono, at ``sample_rate``: ``duration`` seconds from ``offset`` on, read
    by seeking.

    Channels are averaged and other rates resampled (soxr, HQ). Raises `AudioError`, naming the file and
    the way out, where it is missing, not audio, empty, truncated, shorter than asked (by more than 0.2 s
    and 2 %), or holds samples that are not finite.
    """
    path = os.fspath(path)
    with _open(path) as file:
        try:
            samples, rate = _decode(path, file, offset, duration)
        except soundfile.LibsndfileError as error:
            samples, rate = _decode_with_av(path, file, offset, duration, error)
    if samples.size == 0:
        raise AudioError(
            f"{path} holds no sample" + (f" from {offset:g} s on" if offset else "") + "; remove the row"
        )
    if duration is not None:
        got = len(samples) / rate
        if duration - got > max(SHORT_SECONDS, SHORT_SHARE * duration):
            raise AudioError(
                f"{path} gives {got:.2f} s from {offset:g} s on where the manifest says {duration:.2f} s: "
                "the file is truncated or the duration wrong"
            )
    if samples.ndim == 2:
        samples = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    if not np.isfinite(samples).all():
        bad = int(np.flatnonzero(~np.isfinite(samples))[0])
        raise AudioError(_not_finite(path, bad))
    if rate != sample_rate:
        samples = soxr.resample(samples, rate, sample_rate, quality="HQ")
    return np.ascontiguousarray(samples, dtype=np.float32)


def load_utterance(utterance: Utterance, sample_rate: int = 16000) -> np.ndarray:
    """The utterance's samples (S,), as `load_audio` gives them: the whole file, unless it starts within one."""
    duration = utterance.duration if utterance.offset else None
    return load_audio(
        utterance.audio_filepath, offset=utterance.offset, duration=duration, sample_rate=sample_rate
    )


def audio_blocks(
    utterance: Utterance, sample_rate: int = 16000, seconds: float = 30.0
) -> Iterator[np.ndarray]:
    """The utterance's samples in runs of about so many seconds, mono, at ``sample_rate``, so that audio of any
    length needs the memory of one run alone (what only FFmpeg can read is decoded as a whole).

    Raises `AudioError` as `load_audio` does, once it comes to what is damaged.
    """
    path = utterance.audio_filepath
    with _open(path) as file:
        try:
            sound = soundfile.SoundFile(file)
        except soundfile.LibsndfileError:
            yield load_utterance(utterance, sample_rate)
            return
        with sound:
            _refuse_truncated(path, sound)
            rate, empty = sound.samplerate, True
            resample = soxr.ResampleStream(rate, sample_rate, 1, "float32", "HQ")
            start = min(round(utterance.offset * rate), sound.frames)
            left = round(utterance.duration * rate) if utterance.offset else sound.frames - start
            while left > 0:
                samples = _read(path, sound, start, min(left, round(seconds * rate))).mean(axis=1)
                if not np.isfinite(samples).all():
                    bad = start + int(np.flatnonzero(~np.isfinite(samples))[0])
                    raise AudioError(_not_finite(path, bad))
                start, left = start + len(samples), left - len(samples) if len(samples) else 0
                if rate != sample_rate:
                    samples = resample.resample_chunk(samples, last=left <= 0)
                if len(samples):
                    empty = False
                    yield np.ascontiguousarray(samples, dtype=np.float32)
        if empty:
            raise AudioError(f"{path} holds no sample; remove the row")


def _refuse_truncated(path: str, sound: soundfile.SoundFile) -> None:
    short = _WAV_LENGTH.search(sound.extra_info)
    if short and int(short[2]) < int(short[1]) < _STREAMED:
        raise AudioError(
            f"{path} is truncated: its header promises {short[1]} bytes of samples, {short[2]} are "
            "there; copy the file again or remove the row"
        )


def _read(path: str, sound: soundfile.SoundFile, start: int, size: int) -> np.ndarray:
    """``size`` samples (S, channels) from ``start`` on."""
    try:
        if start != sound.tell():
            sound.seek(start)
        return sound.read(size, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path} is damaged or truncated ({_reason(error)}); copy the file again or remove the row"
        ) from None


def _not_finite(path: str, sample: int) -> str:
    return f"{path}: sample {sample} is not a finite number; write the file anew as 16-bit PCM or FLAC"


def audio_seconds(path: str | os.PathLike[str]) -> float:
    """The length in seconds from the header alone. Raises `AudioError` as `load_audio` does."""
    path = os.fspath(path)
    with _open(path) as file:
        try:
            with soundfile.SoundFile(file) as sound:
                return sound.frames / sound.samplerate
        except soundfile.LibsndfileError as error:
            samples, rate = _decode_with_av(path, file, 0.0, None, error)
            return len(samples) / rate


def _decode(path: str, file: BinaryIO, offset: float, duration: float | None) -> tuple[np.ndarray, int]:
    with soundfile.SoundFile(file) as sound:
        rate = sound.samplerate
        _refuse_truncated(path, sound)
        start = min(round(offset * rate), sound.frames)
        wanted = sound.frames - start if duration is None else round(duration * rate)
        return _read(path, sound, start, wanted), rate


def _decode_with_av(
    path: str, file: BinaryIO, offset: float, duration: float | None, error: soundfile.LibsndfileError
) -> tuple[np.ndarray, int]:
    """What libsndfile does not know (AAC, M4A, WMA, WebM) through FFmpeg, where the extra ``av`` is
    installed."""
    try:
        import av  # pyright: ignore[reportMissingImports]  # an extra
    except ModuleNotFoundError:
        raise AudioError(
            f"{path} is not audio that libsndfile knows ({_reason(error)}); convert it to WAV or FLAC, or, "
            "if it is AAC, M4A, WMA or WebM, pip install 'canter[av]'"
        ) from None
    file.seek(0)
    pieces = []
    try:
        with av.open(file, metadata_errors="ignore") as container:
            stream = container.streams.audio[0]
            rate = stream.rate
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
            for frame in container.decode(stream):
                pieces += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
    except (av.FFmpegError, IndexError) as other:
        raise AudioError(
            f"{path} is not audio: {_reason(error)}; FFmpeg says: {other}; remove the row"
        ) from None
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    start = round(
        offset * rate
    )  # compressed streams are cut after decoding: seeking there is not sample-exact
    return samples[start : None if duration is None else start + round(duration * rate)], rate


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
            elif "://" in path:
                import fsspec

                with fsspec.open(path, "rb") as remote:
                    file = io.BytesIO(remote.read())  # type: ignore[union-attr]
            else:
                file = stack.enter_context(open(path, "rb"))
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
        raise AudioError(f"{path} cannot be read: {error}") from None


def _read_member(path: str, match: re.Match[str]) -> bytes:
    file, name, start, size = match.group("file", "name", "start", "bytes")
    if start is None:
        members = _tar_members(file, os.stat(file).st_mtime_ns)
        if name not in members:
            raise AudioError(f"{path}: there is no {name!r} among the {len(members)} members of {file}")
        start, size = members[name]
    with open(file, "rb") as container:
        container.seek(int(start))
        data = container.read(int(size))
    if len(data) < int(size):
        raise AudioError(f"{path}: {file} ends within it: truncated, or changed since it was indexed")
    return data


@functools.lru_cache(maxsize=16)
def _tar_members(path: str, mtime: int) -> dict[str, tuple[int, int]]:
    """``{name: (first byte, bytes)}``. ``mtime`` (ns) keeps a changed tar from the cache."""
    return {one.name: (one.start, one.size) for one in walk_tar(path) if isinstance(one, Member)}
