"""Find out what a path holds, and read it: `units_of` recognises the format, `read_unit` calls its reader.

A reader turns the rows of one file or folder into utterances, or reasons why they cannot be used. `read_unit` then
makes these reasons Problems of the file, refuses repeated utterances, and raises where no row is usable.
"""

import glob
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from canter.corpus.columns import ANY, Columns, ReadOptions
from canter.corpus.manifest import checked_rows, expand_shards, open_manifest, read_nemo, scan_lines
from canter.corpus.media import AUDIO_SUFFIXES, MANIFEST_SUFFIXES, container_format, head_of, is_data, media_in
from canter.corpus.readers.documents import is_document, read_document
from canter.corpus.readers.folder import read_media_folder
from canter.corpus.readers.huggingface import dataset_files, holds_audio, read_huggingface, read_parquet
from canter.corpus.readers.kaldi import read_kaldi
from canter.corpus.readers.lengths import is_lengths, table_schema
from canter.corpus.readers.lhotse import is_cut, read_lhotse, read_shar, shar_tar
from canter.corpus.readers.tables import is_list, names_audio, read_commonvoice, read_list, read_table
from canter.corpus.readers.tarred import read_nemo_tarred, read_webdataset
from canter.corpus.remote import absolute, is_url, list_files, refuse_special, suffix_of
from canter.corpus.utterance import NumberedRows, Problem, Rows, Utterance
from canter.errors import ManifestError

READERS: dict[str, Callable[..., NumberedRows]] = {
    "nemo": read_nemo,
    "nemo_tarred": read_nemo_tarred,
    "lhotse": read_lhotse,
    "shar": read_shar,
    "huggingface": read_huggingface,
    "commonvoice": read_commonvoice,
    "webdataset": read_webdataset,
    "folder": read_media_folder,
    "parquet": read_parquet,
    "table": read_table,
    "list": read_list,
    "kaldi": read_kaldi,
    "document": read_document,
}
METADATA = ("jsonl", "csv", "parquet")  # suffixes of AudioFolder's table
SHARD = re.compile(r"([-_.]?\d+)?([-_]of[-_]\d+)?([-_][0-9a-f]{8,})?(\.parquet)?$")
SPLIT = re.compile(r"(^|[/_.-])(train|test|valid|validation|dev|eval|evaluation|other|validated)($|[/_.-])")
_CONTENTS = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}  # first bytes of a file -> the suffix that it should have
LENGTHS = "lengths"  # tables of lengths, whose rows are no utterances: `canter.corpus.readers.lengths` reads them


@dataclass(frozen=True, slots=True)
class Unit:
    """A file or folder that one reader reads; ``audio`` is the tar, or the pattern of tars, of a manifest."""

    kind: str
    path: str
    audio: str = ""


def units_of(path: str, audio: str = "", columns: Columns = ANY) -> list[Unit]:
    """Return the units behind a path, their formats recognised from the content.

    ``{0..N}``, ``_OP_0..N_CL_`` and ``*`` in ``path`` and ``audio`` are expanded. Instead of ``audio``, a tarred
    NeMo manifest may name its tars in the path: ``manifest_{0..3}.json::audio_{0..3}.tar``. Raises ManifestError where
    nothing can be read.
    """
    if not audio and "::" in path:
        path, audio = path.split("::", 1)
    paths = [found for one in expand_shards(path) for found in expand_glob(absolute(one))]
    if audio:
        audio = absolute(audio)
        if len(paths) == 1:
            return [Unit("nemo_tarred", paths[0], audio)]
        tars = expand_shards(audio)
        if len(tars) != len(paths):
            raise ManifestError(f"{len(paths)} manifests ({path}) but {len(tars)} tars ({audio}): name one for each")
        return [Unit("nemo_tarred", manifest, tar) for manifest, tar in zip(paths, tars, strict=True)]
    return [
        unit for one in paths for unit in (_in_folder(one, columns) if os.path.isdir(one) else [_of_file(one, columns)])
    ]


def expand_glob(path: str) -> list[str]:
    """Return the files that a path with ``*`` matches, in the order of their numbers; any other path by itself.

    Raises ManifestError where nothing matches.
    """
    if not any(mark in path for mark in "*?[") or (not is_url(path) and os.path.exists(path)):
        return [path]
    if is_url(path) and "*" not in path:  # a query begins with ?
        return [path]
    found = sorted(list_files(path) if is_url(path) else glob.glob(path, recursive=True), key=_natural)
    if not found:
        raise ManifestError(f"{path} matches no file")
    return found


def tars_of(unit: Unit) -> list[str]:
    """Return the tars that hold the audio of a unit's rows."""
    if unit.kind == "shar":
        return [shar_tar(unit.path)]
    return expand_shards(unit.audio) if unit.audio else []


def read_unit(
    unit: Unit, *, require_text: bool = True, measure_durations: bool = False, columns: Columns = ANY
) -> Iterator[tuple[int, Utterance | Problem]]:
    """Yield the rows of one unit, each with the number of its line, member or row.

    Raises ManifestError at the end if no row is usable.
    """
    if unit.kind == LENGTHS:
        raise ManifestError(f"{unit.path} is a table of lengths: it can be planned with, but has no audio")
    options = ReadOptions(require_text, measure_durations, columns)
    found = READERS[unit.kind](unit.path, options, *([unit.audio] if unit.audio else []))
    return checked_rows(found, unit.path)


def open_source(
    path: str | os.PathLike[str],
    *,
    audio: str = "",
    require_text: bool = True,
    measure_durations: bool = False,
    columns: Columns = ANY,
) -> Rows:
    """Return an iterator over the utterances and problems of a manifest of any format, of shards or of a folder.

    audio: tar, or pattern of tars, of a tarred manifest.
    require_text: refuse rows without a text.
    measure_durations: read a missing duration from the header of the audio.
    columns: names of the columns (or keys) of text, language and audio.

    Raises ManifestError where the path cannot be read or, at the end, has no usable row.
    """
    units = units_of(os.fspath(path), audio, columns)

    def read(unit: Unit) -> Iterator[tuple[int, Utterance | Problem]]:
        return read_unit(unit, require_text=require_text, measure_durations=measure_durations, columns=columns)

    return (row for _, row in read(units[0])) if len(units) == 1 else _chain(units, read)


def _chain(units: list[Unit], read: Callable[[Unit], Iterator[tuple[int, Utterance | Problem]]]) -> Rows:
    error = None
    some = False
    for unit in units:
        try:
            for _, row in read(unit):
                some = some or isinstance(row, Utterance)
                yield row
        except ManifestError as reason:  # this shard has no usable row; another may have some
            error = error or reason
            yield Problem(unit.path, 0, f"unusable: {reason}")
    if error and not some:
        raise error


def _of_file(path: str, columns: Columns) -> Unit:
    suffix = suffix_of(path)
    if not is_url(path) and not os.path.exists(path):  # the reader reports a missing URL
        raise ManifestError(f"{path} does not exist")
    if not is_url(path):
        try:
            refuse_special(path)
        except OSError as error:
            raise ManifestError(f"{path} cannot be read: {error.strerror}") from None
    head = head_of(path) if os.path.isfile(path) else b""
    if container_format(head) or (suffix in AUDIO_SUFFIXES and not is_data(head)):
        raise ManifestError(f"{path} is audio, not a manifest; name its folder, or a manifest that lists it")
    if suffix not in MANIFEST_SUFFIXES:
        suffix = next((name for start, name in _CONTENTS.items() if head.startswith(start)), suffix)
        suffix = ".tar" if head[257:262] == b"ustar" else suffix
    if suffix in (".yaml", ".yml"):
        raise ManifestError(f"{path} is a mixture; give it to the index by itself")
    if suffix == ".tar":
        return Unit("webdataset", path)
    if is_url(path) and suffix in (".arrow", ".feather"):
        raise ManifestError(
            f"{path}: of URLs, JSONL manifests, Lhotse cuts, tars, Parquet, CSV and TSV are read; copy it to a disk"
        )
    if os.path.basename(path) in ("wav.scp", "segments") and not is_url(path):
        return Unit("kaldi", os.path.dirname(path))
    if suffix in (".tsv", ".csv", ".txt", ".psv"):
        return _of_table(path, suffix)
    if suffix in (".parquet", ".arrow", ".feather"):
        schema = table_schema(path)
        if b"canter" in (schema.metadata or {}):
            raise ManifestError(f"{path} is a length index already; name what it was made from")
        if not columns.audio and not holds_audio(schema, columns):
            if is_lengths(schema):
                return Unit(LENGTHS, path)
            raise ManifestError(
                f"{path} has no column of audio, which --audio-column names, nor lengths to plan with, duration "
                f"(seconds) and num_tokens, or tokens; it has {', '.join(schema.names)}"
            )
        return Unit("parquet" if suffix == ".parquet" else "huggingface", path)
    if is_document(path):
        return Unit("document", path)
    return Unit("lhotse" if _holds_cuts(path) else "nemo", path)


def _of_table(path: str, suffix: str) -> Unit:
    """Return the unit of a table of text: Common Voice's, any other with a header, or a list without a header."""
    with open_manifest(path) as file:
        first = file.readline(1 << 16).decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if suffix == ".tsv" and {"path", "sentence"} <= set(first.split("\t")):
        return Unit("commonvoice", path)
    if first.startswith("{") or (suffix == ".txt" and not {"\t", "|"} & set(first)):  # JSONL by another name
        return Unit("lhotse" if _holds_cuts(path) else "nemo", path)
    return Unit("list" if is_list(path) else "table", path)


def _holds_cuts(path: str) -> bool:
    """Return whether the first object in a JSONL file is a Lhotse cut."""
    try:
        with open_manifest(path) as file:
            for _, _, line in itertools.islice(scan_lines(file), 10):
                if line.strip():
                    return is_cut(json.loads(line))
    except (ValueError, RecursionError, OSError, EOFError, zlib.error):
        pass  # the reader reports what is wrong with each line
    return False


def _in_folder(folder: str, columns: Columns) -> list[Unit]:
    def found(pattern: str) -> list[str]:
        return sorted(glob.glob(os.path.join(glob.escape(folder), pattern)), key=_natural)

    if found("wav.scp"):
        return [Unit("kaldi", folder)]
    if found("dataset_dict.json") or found("state.json"):
        return [Unit("huggingface", one) for one in dataset_files(folder)]
    cuts = [one for one in found("cuts.*.jsonl*") if os.path.exists(shar_tar(one))]
    if cuts:
        return [Unit("shar", one) for one in cuts]
    tars = found("*.tar")
    if tars:
        return list(_tarred(folder, tars, found))
    described = [one for kind in METADATA for one in found(f"metadata.{kind}")]
    manifests = described[:1] or [  # an index writes .skipped.jsonl beside itself
        one for one in found("*.jsonl") or found("*.jsonl.gz") if not one.endswith(".skipped.jsonl")
    ]
    if len(manifests) == 1:
        return [_of_file(manifests[0], columns)]
    tables = [one for one in found("*.tsv") if os.path.basename(one) != "clip_durations.tsv"]
    if not os.path.isdir(os.path.join(folder, "clips")):
        tables = [one for one in [*tables, *found("*.csv")] if columns.audio or names_audio(one)]
    if len(tables) == 1 and not manifests:
        return [_of_file(tables[0], columns)]
    if manifests or tables:
        names = ", ".join(os.path.basename(one) for one in manifests or tables)
        raise ManifestError(f"{folder} holds several manifests ({names}); name one")
    parquet = found("*.parquet") or found("data/*.parquet") or found("*/*.parquet") or found("*/*/*.parquet")
    if parquet:
        return [_of_file(one, columns) for one in _of_one_split(folder, parquet)]
    arrow = found("*.arrow")
    if arrow:
        return [_of_file(one, columns) for one in arrow]
    described = [one for kind in METADATA for one in found(f"*/metadata.{kind}")]
    if described:
        splits = sorted(os.path.basename(os.path.dirname(one)) for one in described)
        if len(described) == 1:
            return [_of_file(described[0], columns)]
        raise ManifestError(
            f"{folder} holds several splits ({', '.join(splits)}); name one: {os.path.join(folder, splits[0])}"
        )
    if media_in(folder)[0]:
        return [Unit("folder", folder)]
    raise ManifestError(
        f"{folder} holds nothing that Canter reads: no manifest, cuts, dataset, tars, tables or audio (docs/corpus.md)"
    )


def _of_one_split(folder: str, files: list[str]) -> list[str]:
    """Return the files, which the Hub names ``SPLIT-00000-of-00003.parquet`` or puts into folders.

    Raises ManifestError where they belong to several splits.
    """
    stems = {SHARD.sub("", one.removesuffix(".parquet")): one for one in files}
    names = {os.path.relpath(stem, folder): one for stem, one in stems.items()}
    if len(names) < 2 or not any(SPLIT.search(name.lower()) for name in names):
        return files
    first = next((name for name in names if "train" in name), min(names))
    pattern = names[first] if SHARD.sub("", names[first]) == names[first] else f"{os.path.join(folder, first)}*"
    raise ManifestError(
        f"{folder} holds several splits ({', '.join(sorted(names))}); name one by its files: '{pattern}'"
    )


def _tarred(folder: str, tars: list[str], found: Callable[[str], list[str]]) -> Iterator[Unit]:
    """Yield the units of a folder of tars: one of NeMo's layouts, or else WebDataset."""
    sharded = found("sharded_manifests/manifest_*.json*")
    single = found("tarred_audio_manifest.json*")
    if sharded:
        if len(sharded) != len(tars):
            raise ManifestError(f"{folder} has {len(tars)} tars but {len(sharded)} sharded manifests: name them both")
        yield from (Unit("nemo_tarred", manifest, tar) for manifest, tar in zip(sharded, tars, strict=True))
    elif single:
        numbers = [re.fullmatch(r"(.*?)(\d+)\.tar", one) for one in tars]
        if {(one and int(one[2])) for one in numbers} != set(range(len(tars))):
            raise ManifestError(f"{folder}: the tars are not numbered 0 to {len(tars) - 1}; name them in the path")
        stem = numbers[0][1] if numbers[0] else ""
        yield Unit("nemo_tarred", single[0], f"{stem}{{0..{len(tars) - 1}}}.tar")
    else:
        yield from (Unit("webdataset", one) for one in tars)


def _natural(path: str) -> list[int | str]:
    """Return the key that sorts ``audio_10`` after ``audio_9``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]
