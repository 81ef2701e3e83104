"""Hugging Face data sets, read by Arrow only: Arrow files (``Dataset.save_to_disk``) and Parquet (the Hub).

Audio inside an Arrow file is uncompressed, so an utterance names its byte range, as for a tar; audio inside Parquet is
named by row group and row. Nothing is copied out. A missing duration is read from the audio's header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from canter.corpus.columns import ANY, AUDIO_NAMES, TEXT_NAMES, Columns, ReadOptions, common_fields, no_column
from canter.corpus.containers import Place, leaf, member_ref, open_parquet, parquet_ref
from canter.corpus.manifest import utterance_from_row
from canter.corpus.remote import folder_of, refuse_special
from canter.corpus.utterance import Found, NumberedRows, one_line
from canter.errors import ManifestError

BYTES_NAMES = ("audio", "audio_bytes", "bytes", "wav", "flac", "mp3")
ROWS_AT_ONCE = 1024  # of the small columns
References = list[str | bytes | None]  # bytes: text that is not UTF-8
Reader = pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader


def dataset_files(folder: str) -> list[str]:
    """Return the Arrow files of a saved data set, in order. Raises ManifestError for a folder of several splits."""
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        splits = ", ".join(sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name))))
        raise ManifestError(f"{folder} holds several splits ({splits}); name one: {folder.rstrip('/')}/SPLIT")
    state = os.path.join(folder, "state.json")
    try:
        with open(state, encoding="utf-8") as file:
            names = [one["filename"] for one in json.load(file)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ManifestError(f"{state} does not list a dataset's files ({error}); save the dataset again") from None
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ManifestError(f"{state}: {name!r} is not the name of a file beside it")
    return [os.path.join(folder, name) for name in names]


def read_huggingface(path: str, options: ReadOptions) -> NumberedRows:
    """Yield the rows of one Arrow file of a saved data set, with a column of audio (bytes and/or path) or of paths."""
    path = os.path.abspath(path)
    reader, mapped = open_arrow(path)
    rows = _Rows(reader.schema, path, options)
    number = 0
    try:
        for batch in arrow_batches(reader):
            for column in batch.columns:
                _validate(column)
            for row in rows.of(batch, _references(batch.column(rows.audio), path, mapped)):
                number += 1
                yield number, row
    except _DAMAGE as error:
        yield number + 1, f"damaged Arrow file: {one_line(error)}"


def read_parquet(path: str, options: ReadOptions) -> NumberedRows:
    """Yield the rows of one Parquet file, whose audio (bytes and/or path, or paths) stays where it is."""
    file = open_parquet(path)
    rows = _Rows(file.schema_arrow, path, options)
    number = 0
    for group in range(file.num_row_groups):
        first = number
        try:
            for batch, references in _batches_of_group(file, group, rows.audio, path, rows.small):
                for row in rows.of(batch, references):
                    number += 1
                    yield number, row
        except _DAMAGE as error:
            yield number + 1, f"damaged Parquet file: {one_line(error)}"
        number = first + file.metadata.row_group(group).num_rows


_DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError, IndexError)  # what Arrow raises for damaged files


def _batches_of_group(
    file: pq.ParquetFile, group: int, name: str, path: str, small: list[str]
) -> Iterator[tuple[pa.RecordBatch, References]]:
    """Yield batches of the small columns of a row group, and the reference to the audio of each row."""
    kind = file.schema_arrow.field(name).type
    if not (pa.types.is_struct(kind) or _is_binary(kind)):
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[*small, name]):
            yield batch, _strings(batch.column(name))
        return
    bytes_in = f"{name}.bytes" if pa.types.is_struct(kind) else name
    path_in = [f"{name}.path"] if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 else []
    inside = _is_inside(file, group, bytes_in)
    start = 0
    # without a column the batches would have no rows
    read = [*small, *path_in] or [bytes_in]
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=read):
        names = _strings(leaf(batch, path_in[0])) if path_in else [None] * batch.num_rows
        there = [inside] * batch.num_rows if isinstance(inside, bool) else inside[start:][: batch.num_rows]
        references = [
            parquet_ref(path, os.path.basename(str(one or start + row)), Place(bytes_in, group, start + row))
            if held
            else one
            for row, (one, held) in enumerate(zip(names, there, strict=True))
        ]
        start += batch.num_rows
        yield batch.select([one for one in small if one in batch.schema.names]), references


def _is_inside(file: pq.ParquetFile, group: int, column: str) -> bool | list[bool]:
    """Return whether all rows of a group hold the audio's bytes, or none, or a list of one value a row."""
    details = file.metadata.row_group(group)
    for number in range(details.num_columns):
        one = details.column(number)
        if one.path_in_schema == column:
            if one.statistics is not None and one.statistics.has_null_count:
                if one.statistics.null_count == 0:
                    return True
                if one.statistics.null_count == details.num_rows:
                    return False
            break
    else:
        return False
    batches = file.iter_batches(16, row_groups=[group], columns=[column])
    return [valid for batch in batches for valid in leaf(batch, column).is_valid().to_pylist()]


class _Rows:
    """Converts batches of a table to utterances. Raises ManifestError for a table without the columns."""

    def __init__(self, schema: pa.Schema, path: str, options: ReadOptions):
        self.audio = chosen_audio(schema, options.columns, path)
        options.columns.check(schema.names, path, options.require_text)
        self.small = [one.name for one in schema if one.name != self.audio and _is_small(one.type)]
        self.names = class_names(schema)
        self.options, self.folder = options, folder_of(path)

    def of(self, batch: pa.RecordBatch, audio: References) -> Iterator[Found]:
        """Yield an utterance, or the reason why the row cannot be used, for each row."""
        values = {name: self._values(batch.column(name), name) for name in self.small}
        for row, where in enumerate(audio):
            fields = {name: column[row] for name, column in values.items()}
            broken = next((name for name, value in fields.items() if isinstance(value, bytes)), None)
            if broken is not None:
                yield f"invalid UTF-8: in column {broken}"
                continue
            found = common_fields(fields, self.options.columns)
            found["audio_filepath"] = where
            yield utterance_from_row(found, self.folder, self.options.for_fields)

    def _values(self, column: pa.Array, name: str) -> list[Any]:
        if _is_text(column.type):
            return _strings(column)
        values = column.to_pylist()
        names = self.names.get(name)
        if names is None:
            return values
        return [names[one] if isinstance(one, int) and 0 <= one < len(names) else None for one in values]


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes of each ClassLabel column, which a data set's schema lists."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {
            str(name): one["names"]
            for name, one in features.items()
            if isinstance(one, dict) and one.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
    return {
        name: names
        for name, names in found.items()
        if isinstance(names, list) and all(isinstance(one, str) for one in names)
    }


def arrow_batches(reader: Reader) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of an Arrow file, stream or random-access."""
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def open_arrow(path: str) -> tuple[Reader, pa.Buffer]:
    """Return a reader of an Arrow file, stream or random-access, and the mapped bytes that it reads.

    Raises ManifestError where the file is missing or not Arrow.
    """
    try:
        refuse_special(path)
        mapped = pa.memory_map(path).read_buffer()
        source = pa.BufferReader(mapped)
        if mapped[:6].to_pybytes() == b"ARROW1":
            return pa.ipc.open_file(source), mapped
        return pa.ipc.open_stream(source), mapped
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ManifestError(f"{path} is not an Arrow file ({error})") from None


def audio_column(schema: pa.Schema, columns: Columns = ANY) -> str | None:
    """Return the column with audio, or None.

    It is the chosen one, else the first with a struct of bytes and path, with bytes, or with paths under a customary
    name.
    """
    if columns.audio:
        return columns.audio if columns.audio in schema.names else None
    for field in schema:
        inside = {one.name for one in field.type} if pa.types.is_struct(field.type) else set[str]()
        if "bytes" in inside and ("path" in inside or field.name in BYTES_NAMES):
            return field.name
    fits: tuple[tuple[tuple[str, ...], Callable[[pa.DataType], bool]], ...] = (
        (BYTES_NAMES, _is_binary),
        (AUDIO_NAMES, _is_text),
    )
    for names, fit in fits:
        for name in names:
            if name in schema.names and fit(schema.field(name).type):
                return name
    return None


def holds_audio(schema: pa.Schema, columns: Columns = ANY) -> bool:
    """Return whether a table holds utterances, not only lengths to plan with."""
    name = audio_column(schema, columns)
    if name is None:
        return False
    inside = not _is_text(schema.field(name).type)
    return inside or bool(columns) or bool(set(TEXT_NAMES) & set(schema.names)) or "duration" not in schema.names


def chosen_audio(schema: pa.Schema, columns: Columns, path: str) -> str:
    """Return the column with audio. Raises ManifestError, with the table's columns, where there is none."""
    columns.check(schema.names, path)
    name = audio_column(schema, columns)
    if name is None:
        raise no_column(path, "audio", schema.names)
    kind = schema.field(name).type
    if not (_is_text(kind) or _is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
        raise ManifestError(
            f"{path}: column {name} is of type {str(kind)[:80]}; audio is a path, bytes, or bytes and path of an Audio "
            "column of datasets"
        )
    return name


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view"


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_small(kind: pa.DataType) -> bool:
    return _is_text(kind) or pa.types.is_primitive(kind)


def _validate(column: pa.Array) -> None:
    """Raise ArrowInvalid where a column's buffers are too short; invalid UTF-8 in texts is accepted."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.view(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
    column.validate(full=True)


def _strings(column: pa.Array) -> References:
    """Return the texts of a column; text that is not UTF-8 stays bytes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = column.view(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()).to_pylist()
    return [one if one is None else _decoded(one) for one in raw]


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _references(column: pa.Array, path: str, mapped: pa.Buffer) -> References:
    """Return the reference to the audio of each row of an Arrow file: its byte range, or its path."""
    if _is_text(column.type):
        return _strings(column)
    struct = pa.types.is_struct(column.type)
    blobs = column.field("bytes") if struct else column
    named = struct and column.type.get_field_index("path") >= 0
    names = _strings(column.field("path")) if named else [None] * len(column)
    _, offsets, data = blobs.buffers()
    wide = pa.types.is_large_binary(blobs.type)
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[blobs.offset :][: len(blobs) + 1]
    inside = blobs.is_valid().to_numpy(zero_copy_only=False)
    base = data.address - mapped.address if data is not None else 0
    return [
        member_ref(path, os.path.basename(str(name or at)), base + int(ends[at]), int(ends[at + 1] - ends[at]))
        if inside[at]
        else name
        for at, name in enumerate(names)
    ]
