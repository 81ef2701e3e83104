"""Parts of a build: a shard, or 8 MiB of a large JSONL file, read and counted by one worker and kept on disk.

What is known of a part is in ``KEY.npz``, under a key of everything it depends on. Formats without lines to seek to are
written out as ``KEY.jsonl`` beside it, and read from there again.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from canter.corpus.columns import ANY, Columns
from canter.corpus.counting import PromptCheck
from canter.corpus.index import MOST_TOKENS, PLACE_BITS
from canter.corpus.manifest import open_manifest, row_from_utterance, scan_lines, utterance_from_line
from canter.corpus.readers.lengths import read_lengths
from canter.corpus.remote import is_url
from canter.corpus.sources import LENGTHS, Unit, read_unit
from canter.corpus.utterance import Problem, Utterance
from canter.errors import CanterError, ManifestError
from canter.files import replacing

PART_BYTES = 8 << 20
KEPT = re.compile(r"[0-9a-f]{24}\.(npz|jsonl)(\.\d+)?")  # the names of parts, whole and begun
_COLUMNS = {"seconds": "f4", "tokens": "u2", "place": "u8", "identity": "u8", "line": "u8"}


class Encoder(Protocol):
    """What the index asks of a tokenizer."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str, lang: str | None = None) -> Sequence[int]: ...


@dataclass(frozen=True)
class Counting:
    """How the rows of a build are counted; travels to the workers."""

    folder: str
    tokenizer: Encoder | None
    prompt_tokens: int
    measure_durations: bool

    def tokens(self, row: Utterance, tags: Mapping[str, str]) -> int | str:
        """Target tokens, prompt and end token included, or the reason why they cannot be counted. ``tags`` are those of
        the row's source."""
        count = row.num_tokens
        row = replace(row, **{name: value for name, value in tags.items() if getattr(row, name) is None})
        fault = self._prompts.fault(row)
        if fault is not None:
            return fault
        if count is None:
            if self.tokenizer is None:
                return "num_tokens missing: name a tokenizer (--tokenizer) to count them"
            try:
                count = self.prompt_tokens + len(self.tokenizer.encode(row.text, row.text_lang)) + 1
            except (CanterError, ValueError, KeyError) as error:
                return f"text cannot be tokenised: {error}"
        return count if count <= MOST_TOKENS else f"text is too long: {count} tokens, at most {MOST_TOKENS}"

    @cached_property
    def _prompts(self) -> PromptCheck:
        return PromptCheck(self.tokenizer)


@dataclass(frozen=True)
class Part:
    """Bytes ``[start, end)`` of a unit (all of it where ``end`` is None), read by one worker at a time."""

    unit: Unit
    source: int
    start: int
    end: int | None
    size: int
    tags: Mapping[str, str]
    key: str = ""
    columns: Columns = ANY


def ranges(unit: Unit) -> Iterator[tuple[int, int | None, int]]:
    """``(start, end, size)`` in bytes, cut at line ends where the file can be read line by line."""
    if not in_place(unit):
        size = os.stat(unit.path).st_size if os.path.exists(unit.path) else 0
        yield 0, None, size
        return
    with open_manifest(unit.path) as file:
        size = file.seek(0, os.SEEK_END)
        start = 0
        while start < size or start == 0:
            file.seek(min(start + PART_BYTES, size))
            file.readline()
            end = file.tell()
            yield start, end, end - start
            start = max(end, 1)


def in_place(unit: Unit) -> bool:
    return unit.kind == "nemo" and not unit.path.endswith(".gz") and not is_url(unit.path)


def part_path(counting: Counting, part: Part) -> Path:
    return Path(counting.folder, part.key + ".npz")


def lines_path(counting: Counting, part: Part) -> Path:
    return Path(counting.folder, part.key + ".jsonl")


def rows_path(part: Part, counting: Counting) -> str:
    """The JSONL file that rows are read from again; "" for bare lengths."""
    if part.unit.kind == LENGTHS:
        return ""
    return part.unit.path if in_place(part.unit) else str(lines_path(counting, part))


def read_part(part: Part, counting: Counting) -> Part:
    """Reads one part and leaves ``KEY.npz`` (and ``KEY.jsonl``, where the rows had to be written out)."""
    columns: dict[str, Any] = {name: [] for name in _COLUMNS}
    problems: list[Problem] = []
    number = 0

    def take(place: int, number: int, row: Utterance | Problem | str | None) -> bool:
        if isinstance(row, Utterance):
            count = counting.tokens(row, part.tags)
            if isinstance(count, int):
                columns["seconds"].append(row.duration)
                columns["tokens"].append(count)
                columns["place"].append(place)
                columns["identity"].append(row.identity)
                columns["line"].append(number)
                return True
            row = count
        if isinstance(row, str):
            row = Problem(part.unit.path, number, row)
        if row is not None:
            problems.append(row)
        return False

    if in_place(part.unit):
        base = os.path.dirname(part.unit.path)
        with open_manifest(part.unit.path) as file:
            for place, number, line in scan_lines(file, part.start, part.end):
                if line.strip():
                    row = utterance_from_line(
                        line, base, measure_durations=counting.measure_durations, columns=part.columns
                    )
                    take(place, number, row)
    elif part.unit.kind == LENGTHS:
        table = read_lengths(part.unit.path, prompt_tokens=counting.prompt_tokens, most_tokens=MOST_TOKENS)
        columns["seconds"], columns["tokens"], columns["place"], problems = table
    else:
        rows = read_unit(part.unit, measure_durations=counting.measure_durations, columns=part.columns)
        with replacing(lines_path(counting, part), durable=False) as partial, open(partial, "wb") as file:
            place = 0
            for number, row in _until_empty(rows, part.unit.path, problems):
                if take(place, number, row):
                    assert isinstance(row, Utterance)
                    place += file.write(json.dumps(row_from_utterance(row), ensure_ascii=False).encode() + b"\n")
    if len(columns["place"]) and columns["place"][-1] >= 1 << PLACE_BITS:
        raise ManifestError(f"{part.unit.path} is larger than {1 << PLACE_BITS} bytes; cut it into shards")
    stored: dict[str, Any] = {name: np.array(columns[name], dtype) for name, dtype in _COLUMNS.items()}
    listed = json.dumps([astuple(problem) for problem in problems]).encode()
    stored |= {"lines": np.int64(number), "problems": np.frombuffer(listed, np.uint8)}
    with replacing(part_path(counting, part), durable=False) as partial, open(partial, "wb") as file:
        np.savez(file, **stored)
    return part


def _until_empty(
    rows: Iterator[tuple[int, Utterance | Problem]], path: str, problems: list[Problem]
) -> Iterator[tuple[int, Utterance | Problem]]:
    """``rows``; one shard of many without a usable row is listed, and does not end the build."""
    try:
        yield from rows
    except ManifestError as error:
        if not problems:
            problems.append(Problem(path, 0, f"unusable: {error}"))


def load_part(counting: Counting, part: Part) -> dict[str, Any]:
    path = part_path(counting, part)
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ManifestError(f"{path} is damaged ({error}); remove it and index again") from None
