"""Audio in Parquet files, read where it lies: a row is addressed by its column, row group and place in the group.

Pages of Parquet are compressed, so no byte range of the file is the audio. Reading a row decodes its row group up to
the row; rows read in order are decoded once. Format: parquet.apache.org; the Hub writes row groups of 100 rows.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from canter.corpus.remote import is_url, open_binary, refuse_special, stamp
from canter.errors import ManifestError

ROWS_AT_ONCE = 16  # of audio in memory
OPEN_FILES = 16
_REFERENCE = re.compile(r"(?P<name>.*)@(?P<column>[^@]+):(?P<group>\d{1,9}):(?P<row>\d{1,9})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a value: column (with dots for fields of a struct), row group, and row in the group."""

    column: str
    group: int
    row: int


def parquet_ref(path: str, name: str, place: Place) -> str:
    """Return how a manifest names the audio at a place: ``FILE::NAME@COLUMN:GROUP:ROW``."""
    return f"{path}::{name}@{place.column}:{place.group}:{place.row}"


def place_of(name: str) -> Place | None:
    """Return the place that a reference names behind ``FILE::``; None where it is another container's."""
    found = _REFERENCE.fullmatch(name)
    return Place(found["column"], int(found["group"]), int(found["row"])) if found else None


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
        raise ManifestError(f"{path} is not a Parquet file ({_short(error)})") from None


def read_audio(path: str, place: Place) -> bytes:
    """Return the bytes of the audio at a place. Raises ManifestError where there is none."""
    with _lock:
        try:
            return _reader(path).read(place)
        except (pa.ArrowException, OSError, ValueError, IndexError, KeyError) as error:
            _readers.clear()
            raise ManifestError(
                f"{path} has changed or is damaged at row {place.row} of row group {place.group} ({_short(error)}); "
                "index it again"
            ) from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


class _Reader:
    """Reads rows of an open file, and goes on where it stopped if they are asked for in their order."""

    def __init__(self, path: str):
        self.file = open_parquet(path)
        self.rest()

    def rest(self) -> None:
        """Forget the row group, which may take as much memory as its pages."""
        self.at: tuple[str, int] | None = None
        self.batches: Iterator[pa.RecordBatch] = iter(())
        self.batch: Any = None
        self.start = 0  # the batch's first row in the group

    def read(self, place: Place) -> bytes:
        if self.at != (place.column, place.group) or place.row < self.start:
            if not 0 <= place.group < self.file.num_row_groups:
                raise IndexError(f"it has {self.file.num_row_groups} row groups")
            self.batches = self.file.iter_batches(ROWS_AT_ONCE, row_groups=[place.group], columns=[place.column])
            self.at, self.batch, self.start = (place.column, place.group), None, 0
        while self.batch is None or place.row >= self.start + self.batch.num_rows:
            self.start += 0 if self.batch is None else self.batch.num_rows
            self.batch = next(self.batches, None)
            if self.batch is None:
                self.at = None
                raise IndexError("the row group has fewer rows")
        column = leaf(self.batch, place.column)
        value = column[place.row - self.start]
        if not value.is_valid:
            raise ValueError("the row holds no audio")
        return value.as_py()


def leaf(batch: pa.RecordBatch, column: str) -> Any:
    """Return the array of a column, or of a field of a struct in it (``audio.bytes``)."""
    name, *inside = column.split(".") if column not in batch.schema.names else [column]
    found = batch.column(name)
    for field in inside:
        found = found.field(field)
    return found


_lock = threading.Lock()
_readers: OrderedDict[tuple[str, str], _Reader] = OrderedDict()


def _reader(path: str) -> _Reader:
    """Return the reader of a file, kept open; a changed file gets another."""
    key = (path, stamp(path))
    if _readers and next(reversed(_readers)) != key:
        _readers[next(reversed(_readers))].rest()  # one row group is held at a time
    if key not in _readers:
        _readers[key] = _Reader(path)
        while len(_readers) > OPEN_FILES:
            _readers.popitem(last=False)
    _readers.move_to_end(key)
    return _readers[key]


def _start_anew() -> None:
    """Give a forked process readers and a lock of its own."""
    global _lock, _readers
    _lock, _readers = threading.Lock(), OrderedDict()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
