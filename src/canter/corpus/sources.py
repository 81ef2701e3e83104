"""Finds out what a path holds, and reads it: one reader a format, all with the same signature."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from canter.corpus.manifest import Rows, expand_shards, read_manifest, usable
from canter.errors import ManifestError


@dataclass(frozen=True, slots=True)
class Unit:
    """What is read in one go by one reader: a file, or a folder. ``audio`` is the tar that goes with a
    manifest."""

    kind: str
    path: str
    audio: str = ""


def units_of(path: str, audio: str = "") -> list[Unit]:
    """The units behind a path (with ``{0..N}`` expanded), their kinds found by looking."""
    return [Unit("nemo", os.path.abspath(one)) for one in expand_shards(path)]


READERS: dict[str, Callable[..., Rows]] = {"nemo": read_manifest}


def read_unit(unit: Unit, *, require_text: bool = True, measure_durations: bool = False) -> Rows:
    """The rows of one unit."""
    arguments = (unit.path, unit.audio) if unit.audio else (unit.path,)
    return READERS[unit.kind](*arguments, require_text=require_text, measure_durations=measure_durations)


def open_source(
    path: str | os.PathLike[str], *, require_text: bool = True, measure_durations: bool = False
) -> Rows:
    """The rows of whatever ``path`` holds. Raises `ManifestError` where that is nothing Canter reads."""
    for unit in units_of(os.fspath(path)):
        yield from read_unit(unit, require_text=require_text, measure_durations=measure_durations)


__all__ = ["READERS", "ManifestError", "Path", "Unit", "open_source", "read_unit", "units_of", "usable"]
