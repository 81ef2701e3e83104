"""Audio inside tars, Arrow and Parquet files: its name in a manifest, and its bytes. Nothing is unpacked to disk.

A member is named ``FILE::NAME`` (in a tar, found by walking its headers once), ``FILE::NAME@START+BYTES`` (bytes that
lie uncompressed in any file; what indexing writes) or ``FILE::NAME@COLUMN:GROUP:ROW`` (in Parquet, whose pages are
compressed). Reading a row of Parquet decodes its row group up to the row; rows read in order are decoded once.
"""

from __future__ import annotations

import functools
import os
import posixpath
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from canter.corpus.remote import is_url, open_binary, read_bytes, refuse_special, size_of, stamp
from canter.corpus.utterance import Problem, one_line
from canter.errors import AudioError, ManifestError

_MEMBER = re.compile(r"(?P<file>.+?)::(?P<name>.*?)(?:@(?P<start>\d+)\+(?P<bytes>\d+))?", re.DOTALL)
_PLACE = re.compile(r"(?P<name>.*)@(?P<column>[^@]+):(?P<group>\d{1,9}):(?P<row>\d{1,9})", re.DOTALL)
AUDIO_ROWS_AT_ONCE = 16
OPEN_FILES = 16


def member_ref(file: str | os.PathLike[str], name: str, start: int, size: int) -> str:
    """Return the name that a manifest gives to ``size`` bytes from byte ``start`` of a container."""
    return f"{os.fspath(file)}::{name}@{start}+{size}"


def read_member(path: str) -> bytes | None:
    """Return the bytes of a container's member, or None for a path that names a file.

    Raises AudioError, ManifestError or OSError where the member cannot be read.
    """
    match = _MEMBER.fullmatch(path)
    if match is None or os.path.exists(path):
        return None
    file, name, start, size = match.group("file", "name", "start", "bytes")
    if start is None and (row := _PLACE.fullmatch(name)):
        return _read_parquet_row(file, Place(row["column"], int(row["group"]), int(row["row"])))
    if start is None:
        members = _tar_members(file, stamp(file))
        if name not in members:
            raise AudioError(f"{path}: there is no {name!r} among the {len(members)} members of {file}")
        start, size = members[name]
    data = read_bytes(file, int(start), int(size))
    if len(data) < int(size):
        raise AudioError(f"{path}: {file} ends within it: truncated, or changed since it was indexed")
    return data


# -- tars --


class Member(NamedTuple):
    """A regular file in a tar: ``size`` bytes from byte ``start``; ``number`` counts members from 1."""

    name: str
    start: int
    size: int
    number: int


def walk_tar(path: str) -> Iterator[Member | Problem]:
    """Yield the regular files of a tar from its headers, and a Problem for an unsafe name, a link or a torn end.

    Files that macOS and pax add (``._name``, ``PaxHeaders/``) are skipped. Raises ManifestError where the file is
    missing or no plain tar.
    """
    try:
        end = size_of(path)
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error}") from None
    number = 0
    try:
        with open_binary(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for number, info in enumerate(tar, 1):
                name = posixpath.normpath(info.name)
                if info.isdir() or _holds_attributes(name):
                    continue
                if info.name.startswith("/") or name.split("/")[0] == "..":
                    yield Problem(path, number, f"unsafe member name: {info.name!r} leads out of the tar")
                elif not info.isreg():
                    yield Problem(path, number, f"not a regular file: {info.name!r} is a link or a device")
                elif info.offset_data + info.size > end:
                    yield Problem(path, number, f"truncated tar: it ends within {name!r}")
                    return
                else:
                    yield Member(name, info.offset_data, info.size, number)
    except (tarfile.TarError, OSError, ValueError) as error:
        if not number:
            raise ManifestError(f"{path} is not a plain tar ({error}); unpack compressed ones first") from None
        yield Problem(path, number + 1, f"damaged tar: {error}")


def _holds_attributes(name: str) -> bool:
    """Return whether a member holds attributes of another: AppleDouble, or a pax header unpacked as a file."""
    *folders, base = name.split("/")
    attributes = any(one == "__MACOSX" or one.startswith("PaxHeaders") for one in folders)
    return attributes or base.startswith("._") or base == ".DS_Store"


@functools.lru_cache(maxsize=16)
def _tar_members(path: str, version: str) -> dict[str, tuple[int, int]]:
    """Return ``{name: (first byte, bytes)}``; ``version`` keeps a tar that has changed out of the cache."""
    return {one.name: (one.start, one.size) for one in walk_tar(path) if isinstance(one, Member)}


# -- Parquet --


@dataclass(frozen=True, slots=True)
class Place:
    """A value in a Parquet file: column (with dots for fields of a struct), row group, and row in the group."""

    column: str
    group: int
    row: int


def parquet_ref(path: str, name: str, place: Place) -> str:
    """Return the name that a manifest gives to the audio at a place: ``FILE::NAME@COLUMN:GROUP:ROW``."""
    return f"{path}::{name}@{place.column}:{place.group}:{place.row}"


def open_parquet(path: str) -> pq.ParquetFile:
    """Open a file or URL. Raises ManifestError where it is missing or not Parquet."""
    try:
        if is_url(path):
            return pq.ParquetFile(open_binary(path))
        refuse_special(path)
        return pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ManifestError(f"{path} is not a Parquet file ({one_line(error)})") from None


def leaf(batch: pa.RecordBatch, column: str) -> pa.Array:
    """Return the array of a column, or of a field of a struct in it (``audio.bytes``)."""
    name, *inside = column.split(".") if column not in batch.schema.names else [column]
    found = batch.column(name)
    for field in inside:
        found = found.field(field)
    return found


class _Reader:
    """Rows of an open Parquet file; reading resumes after the last row where rows are asked for in order."""

    def __init__(self, path: str):
        self.file = open_parquet(path)
        self.close_group()

    def close_group(self) -> None:
        """Release the row group, which may take as much memory as its pages."""
        self.at: tuple[str, int] | None = None
        self.batches: Iterator[pa.RecordBatch] = iter(())
        self.batch: pa.RecordBatch | None = None
        self.start = 0  # the batch's first row in the group

    def read(self, place: Place) -> bytes:
        if self.at != (place.column, place.group) or place.row < self.start:
            if not 0 <= place.group < self.file.num_row_groups:
                raise IndexError(f"it has {self.file.num_row_groups} row groups")
            self.batches = self.file.iter_batches(AUDIO_ROWS_AT_ONCE, row_groups=[place.group], columns=[place.column])
            self.at, self.batch, self.start = (place.column, place.group), None, 0
        while self.batch is None or place.row >= self.start + self.batch.num_rows:
            self.start += 0 if self.batch is None else self.batch.num_rows
            self.batch = next(self.batches, None)
            if self.batch is None:
                self.at = None
                raise IndexError("the row group has fewer rows")
        value = leaf(self.batch, place.column)[place.row - self.start]
        if not value.is_valid:
            raise ValueError("the row holds no audio")
        return value.as_py()


_lock = threading.Lock()
_readers: OrderedDict[tuple[str, str], _Reader] = OrderedDict()


def _read_parquet_row(path: str, place: Place) -> bytes:
    with _lock:
        try:
            return _reader(path).read(place)
        except (pa.ArrowException, OSError, ValueError, IndexError, KeyError) as error:
            _readers.clear()
            raise ManifestError(
                f"{path} has changed or is damaged at row {place.row} of row group {place.group} ({one_line(error)}); "
                "index it again"
            ) from None


def _reader(path: str) -> _Reader:
    """Return the reader of a file, kept open; a file that has changed gets a new one."""
    key = (path, stamp(path))
    if _readers and next(reversed(_readers)) != key:
        _readers[next(reversed(_readers))].close_group()  # only one row group is in memory
    if key not in _readers:
        _readers[key] = _Reader(path)
        while len(_readers) > OPEN_FILES:
            _readers.popitem(last=False)
    _readers.move_to_end(key)
    return _readers[key]


def _reset_after_fork() -> None:
    global _lock, _readers
    _lock, _readers = threading.Lock(), OrderedDict()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
