"""Hugging Face datasets on disk (``Dataset.save_to_disk``), read with Arrow alone.

Audio inside the Arrow file is not copied out: it lies there uncompressed, so an utterance names its byte
range, as for a tar. A duration that no column gives is read from the audio's header.
"""

import json
import os
from typing import Any

import numpy as np
import pyarrow as pa

from canter.corpus.audio import member_ref
from canter.corpus.manifest import utterance_from_row
from canter.corpus.readers.common import common_fields
from canter.corpus.remote import refuse_special
from canter.corpus.utterance import NumberedFinds
from canter.errors import ManifestError

PATH_NAMES = ("audio", "audio_filepath", "path", "file", "audio_path")


def dataset_files(folder: str) -> list[str]:
    """The Arrow files of a saved dataset, in order. Raises `ManifestError` for a folder of several splits."""
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        splits = ", ".join(
            sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name)))
        )
        raise ManifestError(f"{folder} holds several splits ({splits}); name one: {folder.rstrip('/')}/SPLIT")
    state = os.path.join(folder, "state.json")
    try:
        with open(state, encoding="utf-8") as file:
            names = [one["filename"] for one in json.load(file)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"{state} does not list a dataset's files ({error}); save the dataset again"
        ) from None
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ManifestError(f"{state}: {name!r} is not the name of a file beside it")
    return [os.path.join(folder, name) for name in names]


def read_huggingface(
    path: str, *, require_text: bool = True, measure_durations: bool = False
) -> NumberedFinds:
    """One Arrow file of a saved dataset, with a column of audio (bytes and/or path) or of paths."""
    path = os.path.abspath(path)
    reader, whole = open_arrow(path)
    name = audio_column(reader.schema)
    if name is None:
        raise ManifestError(f"{path} has no column of audio; it has {', '.join(reader.schema.names)}")
    count = getattr(reader, "num_record_batches", None)
    batches = reader if count is None else (reader.get_batch(number) for number in range(count))
    number = 0
    try:
        for batch in batches:
            others = [
                one for one in batch.schema.names if one != name and _small(batch.schema.field(one).type)
            ]
            fields = batch.select(others).to_pylist() if others else [{}] * batch.num_rows
            audio = _audio_refs(batch.column(name), path, whole)
            for row, where in zip(fields, audio, strict=True):
                number += 1
                row = common_fields(row)
                row["audio_filepath"] = where
                yield (
                    number,
                    utterance_from_row(
                        row, os.path.dirname(path), require_text=require_text, measure_durations=True
                    ),
                )
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        yield number + 1, f"damaged Arrow file: {error}"


def open_arrow(path: str) -> tuple[Any, pa.Buffer]:
    """A reader of an Arrow file, stream or random-access, and the mapped bytes it reads."""
    try:
        refuse_special(path)
        whole = pa.memory_map(path).read_buffer()
        source = pa.BufferReader(whole)
        if whole[:6].to_pybytes() == b"ARROW1":
            return pa.ipc.open_file(source), whole
        return pa.ipc.open_stream(source), whole
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ManifestError(f"{path} is not an Arrow file ({error})") from None


def audio_column(schema: pa.Schema) -> str | None:
    """The column with audio: a struct of bytes and path, or else a string column of a customary name."""
    for field in schema:
        if pa.types.is_struct(field.type) and {"bytes", "path"} <= {one.name for one in field.type}:
            return field.name
    names = (name for name in PATH_NAMES if name in schema.names)
    return next((name for name in names if pa.types.is_string(schema.field(name).type)), None)


def _small(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_primitive(kind) or pa.types.is_large_string(kind)


def _audio_refs(column: Any, path: str, whole: pa.Buffer) -> list[str | None]:
    if not pa.types.is_struct(column.type):
        return column.to_pylist()
    names, blobs = column.field("path").to_pylist(), column.field("bytes")
    _, offsets, data = blobs.buffers()
    wide = pa.types.is_large_binary(blobs.type)
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[blobs.offset :][: len(blobs) + 1]
    inside = blobs.is_valid().to_numpy(zero_copy_only=False)
    base = data.address - whole.address if data is not None else 0
    return [
        member_ref(
            path, os.path.basename(name or str(at)), base + int(ends[at]), int(ends[at + 1] - ends[at])
        )
        if inside[at]
        else name
        for at, name in enumerate(names)
    ]
