"""Finds out what a path holds, and reads it: one reader a format, all with the same signature."""

import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from canter.corpus.manifest import (
    expand_shards,
    open_manifest,
    read_nemo,
    scan_lines,
    usable,
)
from canter.corpus.readers.common import AUDIO_SUFFIXES
from canter.corpus.readers.commonvoice import read_commonvoice
from canter.corpus.readers.folder import audio_files, read_folder
from canter.corpus.readers.huggingface import audio_column, dataset_files, read_huggingface
from canter.corpus.readers.lengths import table_schema
from canter.corpus.readers.lhotse import read_lhotse, read_shar, shar_tar
from canter.corpus.readers.tarred import read_nemo_tarred, read_webdataset
from canter.corpus.remote import absolute, is_url, refuse_special
from canter.corpus.utterance import NumberedFinds, Problem, Rows, Utterance
from canter.errors import ManifestError

READERS: dict[str, Callable[..., NumberedFinds]] = {
    "nemo": read_nemo,
    "nemo_tarred": read_nemo_tarred,
    "lhotse": read_lhotse,
    "shar": read_shar,
    "huggingface": read_huggingface,
    "commonvoice": read_commonvoice,
    "webdataset": read_webdataset,
    "folder": read_folder,
}
LENGTHS = "lengths"  # read by `canter.corpus.readers.lengths`: these rows are no utterances


@dataclass(frozen=True, slots=True)
class Unit:
    """What one reader reads in one go: a file, or a folder of audio; ``audio`` is a manifest's tar or
    tars."""

    kind: str
    path: str
    audio: str = ""


def units_of(path: str, audio: str = "") -> list[Unit]:
    """The units behind a path, their kinds found by looking. Raises `ManifestError` for what Canter
    cannot read.

    ``{0..N}`` and ``_OP_0..N_CL_`` in ``path`` and ``audio`` are expanded. Instead of ``audio``, a tarred
    NeMo manifest may name its tars in the path: ``manifest_{0..3}.json::audio_{0..3}.tar``.
    """
    if not audio and "::" in path:
        path, audio = path.split("::", 1)
    paths = [absolute(one) for one in expand_shards(path)]
    if audio:
        audio = absolute(audio)
        if len(paths) == 1:
            return [Unit("nemo_tarred", paths[0], audio)]
        tars = expand_shards(audio)
        if len(tars) != len(paths):
            raise ManifestError(
                f"{len(paths)} manifests ({path}) but {len(tars)} tars ({audio}): name one for each"
            )
        return [Unit("nemo_tarred", manifest, tar) for manifest, tar in zip(paths, tars, strict=True)]
    return [unit for one in paths for unit in (_in_folder(one) if os.path.isdir(one) else [_of_file(one)])]


def tars_of(unit: Unit) -> list[str]:
    """The tars that a unit's rows name members of."""
    if unit.kind == "shar":
        return [shar_tar(unit.path)]
    return expand_shards(unit.audio) if unit.audio else []


def read_unit(
    unit: Unit, *, require_text: bool = True, measure_durations: bool = False
) -> Iterator[tuple[int, Utterance | Problem]]:
    """The rows of one unit, each with its line (or the like). Raises `ManifestError` if none is usable."""
    if unit.kind == LENGTHS:
        raise ManifestError(
            f"{unit.path} is a table of lengths alone: it can be planned with, but has no audio"
        )
    arguments = (unit.path, unit.audio) if unit.audio else (unit.path,)
    found = READERS[unit.kind](*arguments, require_text=require_text, measure_durations=measure_durations)
    return usable(found, unit.path)


def open_source(
    path: str | os.PathLike[str],
    *,
    audio: str = "",
    require_text: bool = True,
    measure_durations: bool = False,
) -> Rows:
    """The utterances and problems of whatever ``path`` holds: a manifest of any kind, shards, a folder of
    audio. ``audio`` names a tarred manifest's tars.

    Raises `ManifestError` where that is nothing Canter reads, or has no usable row.
    """
    units = units_of(os.fspath(path), audio)
    if len(units) == 1:
        rows = read_unit(units[0], require_text=require_text, measure_durations=measure_durations)
        return (row for _, row in rows)
    return _chain(units, require_text, measure_durations)


def _chain(units: list[Unit], require_text: bool, measure_durations: bool) -> Rows:
    error = None
    some = False
    for unit in units:
        try:
            for _, row in read_unit(unit, require_text=require_text, measure_durations=measure_durations):
                some = some or isinstance(row, Utterance)
                yield row
        except ManifestError as one:  # a shard without a usable row; the others may have some
            error = error or one
            yield Problem(unit.path, 0, f"unusable: {one}")
    if error and not some:
        raise error


def _of_file(path: str) -> Unit:
    suffix = os.path.splitext(path.removesuffix(".gz"))[1].lower()
    if not is_url(path) and not os.path.exists(path):  # of a URL the reader will say so
        raise ManifestError(f"{path} does not exist")
    if not is_url(path):
        try:
            refuse_special(path)
        except OSError as error:
            raise ManifestError(f"{path} cannot be read: {error.strerror}") from None
    if suffix in AUDIO_SUFFIXES:
        raise ManifestError(f"{path} is audio, not a manifest; name its folder, or a manifest that lists it")
    if suffix in (".yaml", ".yml"):
        raise ManifestError(f"{path} is a mixture; give it to the index by itself")
    if suffix == ".tar":
        return Unit("webdataset", path)
    if is_url(path) and suffix in (".tsv", ".parquet", ".arrow", ".feather"):
        raise ManifestError(
            f"{path}: of URLs, JSONL manifests, Lhotse cuts and tars are read; copy it to a disk"
        )
    if suffix == ".tsv":
        return Unit("commonvoice", path)
    if suffix in (".parquet", ".arrow", ".feather"):
        schema = table_schema(path)
        if b"canter" in (schema.metadata or {}):
            raise ManifestError(f"{path} is a length index already; name what it was made from")
        if suffix != ".parquet":
            return Unit("huggingface" if audio_column(schema) else LENGTHS, path)
        if (
            audio_column(schema) and "duration" not in schema.names
        ):  # compressed: no byte range of it is a file
            raise ManifestError(
                f"{path} holds audio inside Parquet; save it as Arrow: "
                f"datasets.Dataset.from_parquet({path!r}).save_to_disk(FOLDER), and name the folder"
            )
        return Unit(LENGTHS, path)
    return Unit("lhotse" if _holds_cuts(path) else "nemo", path)


def _holds_cuts(path: str) -> bool:
    """Whether the first object in a JSONL file is a Lhotse cut."""
    try:
        with open_manifest(path) as file:
            for _, _, line in itertools.islice(scan_lines(file), 10):
                if not line.strip():
                    continue
                row = json.loads(line)
                return (
                    isinstance(row, dict)
                    and "audio_filepath" not in row
                    and bool({"recording", "tracks"} & set(row))
                )
    except (ValueError, RecursionError, OSError, EOFError):
        pass  # the reader will say what is wrong, line by line
    return False


def _in_folder(folder: str) -> list[Unit]:
    def found(pattern: str) -> list[str]:
        return sorted(glob.glob(os.path.join(glob.escape(folder), pattern)), key=_natural)

    if found("dataset_dict.json") or found("state.json"):
        return [Unit("huggingface", one) for one in dataset_files(folder)]
    cuts = [one for one in found("cuts.*.jsonl*") if os.path.exists(shar_tar(one))]
    if cuts:
        return [Unit("shar", one) for one in cuts]
    tars = found("*.tar")
    if tars:
        return list(_tarred(folder, tars, found))
    manifests = [  # not what an index has left beside itself
        one for one in found("*.jsonl") or found("*.jsonl.gz") if not one.endswith(".skipped.jsonl")
    ]
    if len(manifests) == 1:
        return [_of_file(manifests[0])]
    tables = [one for one in found("*.tsv") if os.path.basename(one) != "clip_durations.tsv"]
    if not os.path.isdir(os.path.join(folder, "clips")):
        tables = []
    if len(tables) == 1 and not manifests:
        return [_of_file(tables[0])]
    if manifests or tables:
        names = ", ".join(os.path.basename(one) for one in manifests or tables)
        raise ManifestError(f"{folder} holds several manifests ({names}); name one")
    if found("*.parquet"):
        return [_of_file(one) for one in found("*.parquet")]
    if audio_files(folder):
        return [Unit("folder", folder)]
    raise ManifestError(
        f"{folder} holds nothing that Canter reads: no manifest, cuts, dataset, tars, "
        "tables or audio (docs/corpus.md)"
    )


def _tarred(folder: str, tars: list[str], found: Callable[[str], list[str]]) -> Iterator[Unit]:
    """NeMo's layouts of a folder of tars, or else WebDataset."""
    sharded = found("sharded_manifests/manifest_*.json*")
    single = found("tarred_audio_manifest.json*")
    if sharded:
        if len(sharded) != len(tars):
            raise ManifestError(
                f"{folder} has {len(tars)} tars but {len(sharded)} sharded manifests: name them both"
            )
        yield from (Unit("nemo_tarred", manifest, tar) for manifest, tar in zip(sharded, tars, strict=True))
    elif single:
        numbers = [re.fullmatch(r"(.*?)(\d+)\.tar", one) for one in tars]
        if {(one and int(one[2])) for one in numbers} != set(range(len(tars))):
            raise ManifestError(
                f"{folder}: the tars are not numbered 0 to {len(tars) - 1}; name them in the path"
            )
        stem = numbers[0][1] if numbers[0] else ""
        yield Unit("nemo_tarred", single[0], f"{stem}{{0..{len(tars) - 1}}}.tar")
    else:
        yield from (Unit("webdataset", one) for one in tars)


def _natural(path: str) -> list:
    """Sorts ``audio_10`` after ``audio_9``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]
