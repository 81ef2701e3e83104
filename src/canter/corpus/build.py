"""Build a length index: every row of the sources is read, checked and counted once, in parallel, resumably.

The work is split into parts: a shard, or 8 MiB of a large JSONL file, read and counted by one worker. The result is
kept as ``INDEX.parts/KEY.npz``, under a key of everything that it depends on, so that after an interruption, or when a
source is added, only new parts are read. Rows of formats that cannot be read line by line are written as ``KEY.jsonl``
beside it, and read from there again.
"""

import concurrent.futures
import json
import multiprocessing
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from canter.corpus.columns import ANY, Columns, ReadOptions
from canter.corpus.counting import PromptCheck, TokenCounter
from canter.corpus.index import FORMAT, MOST_SOURCES, MOST_TOKENS, PLACE_BITS, LengthIndex, Shard, Source
from canter.corpus.manifest import no_usable_row, open_manifest, row_from_utterance, scan_lines, utterance_from_line
from canter.corpus.mixture import Group, fractions, leaves
from canter.corpus.readers.lengths import read_lengths
from canter.corpus.remote import is_url, stamp, urls_forbidden
from canter.corpus.sources import LENGTHS, Unit, read_unit, tars_of, units_of
from canter.corpus.utterance import DUPLICATE, Found, Problem, Utterance
from canter.errors import CanterError, ManifestError
from canter.files import replacing
from canter.processes import start_pool_worker

READERS = 4  # increased when readers interpret rows differently, so that the parts of earlier versions are read again
PART_BYTES = 8 << 20
KEPT = re.compile(r"[0-9a-f]{24}\.(npz|jsonl)(\.\d+)?")  # file names of parts, complete or not
_COLUMNS = {"seconds": "f4", "tokens": "u2", "place": "u8", "identity": "u8", "line": "u8"}


def index_sources(
    sources: str | os.PathLike[str] | Group | Iterable[str | os.PathLike[str] | Source],
    output: str | os.PathLike[str],
    tokenizer: TokenCounter | None = None,
    *,
    prompt_tokens: int = 0,
    workers: int = 0,
    measure_durations: bool = False,
    progress: bool = False,
) -> LengthIndex:
    """Write the length index of ``sources`` to ``output`` and open it.

    A row's tokens are its ``num_tokens``, or ``prompt_tokens`` + tokens of the text + 1 for the end token. ``workers``
    processes share the reading (0: this process). Rows that cannot be used are listed in the index's ``problems``.
    Raises ManifestError where a source cannot be read or has no usable row.
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    listed = leaves(given) if isinstance(given, Group) else given
    mixture = [one if isinstance(one, Source) else Source(os.fspath(one)) for one in listed]
    if not mixture:
        raise ManifestError("nothing to index: name at least one source")
    if len(mixture) > MOST_SOURCES:
        raise ManifestError(f"{len(mixture)} sources; an index holds {MOST_SOURCES}")
    output = Path(output)
    folder = output.with_name(output.name + ".parts")
    _check_output(output, folder)
    counting = Counting(folder.absolute(), tokenizer, prompt_tokens, measure_durations)
    parts = [part for number, source in enumerate(mixture) for part in _parts(number, source, counting)]
    waiting = [part for part in parts if not counting.file_of(part).exists()]
    for _ in _progress(_read_parts(waiting, counting, workers), parts, waiting, progress):
        pass
    index = _merge(mixture, parts, counting)
    if isinstance(given, Group):
        weights = fractions(given, index.rows_of.tolist())
        index.sources = tuple(replace(one, weight=float(w)) for one, w in zip(mixture, weights, strict=True))
    index.save(output)
    kept = {part.key for part in parts}
    for stale in folder.iterdir():
        if KEPT.fullmatch(stale.name) and stale.name.split(".")[0] not in kept:
            stale.unlink()
    return LengthIndex.open(output)


def _check_output(output: Path, folder: Path) -> None:
    """Raise ManifestError where ``output`` is another kind of file, or ``folder`` cannot be written."""
    if output.exists():
        try:
            LengthIndex.open(output)
        except ManifestError:
            raise ManifestError(f"{output} exists and is not a length index; choose another name") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ManifestError(f"{folder} cannot be written ({error.strerror}); choose another output") from None


# -- parts --


@dataclass(frozen=True)
class IndexPart:
    """Bytes ``[start, end)`` of a unit (the complete unit where ``end`` is None), read by one worker."""

    unit: Unit
    source: int
    start: int
    end: int | None
    size: int
    tags: Mapping[str, str]
    key: str = ""
    columns: Columns = ANY

    @property
    def in_place(self) -> bool:
        """True if rows can be read again from the unit itself, line by line."""
        return _is_seekable(self.unit)


@dataclass(frozen=True)
class Counting:
    """Settings by which the rows of a build are counted; every worker gets a copy."""

    folder: Path
    tokenizer: TokenCounter | None
    prompt_tokens: int
    measure_durations: bool

    def tokens(self, row: Utterance, tags: Mapping[str, str]) -> int | str:
        """Return the target tokens, prompt and end token included, or the reason why they cannot be counted.

        ``tags`` are those of the row's source.
        """
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

    def file_of(self, part: IndexPart, suffix: str = ".npz") -> Path:
        return self.folder / (part.key + suffix)

    def rows_of(self, part: IndexPart) -> str:
        """Return the JSONL file from which rows are read again; "" for tables of lengths."""
        if part.unit.kind == LENGTHS:
            return ""
        return part.unit.path if part.in_place else str(self.file_of(part, ".jsonl"))


def _is_seekable(unit: Unit) -> bool:
    return unit.kind == "nemo" and not unit.path.endswith(".gz") and not is_url(unit.path)


def _parts(number: int, source: Source, counting: Counting) -> Iterator[IndexPart]:
    tags = dict(sorted(source.tags.items()))
    for unit in units_of(source.path, source.audio, source.columns):
        for start, end, size in _ranges(unit):
            tokenizer = counting.tokenizer.fingerprint if counting.tokenizer else None
            facts = [FORMAT, READERS, astuple(unit), start, end, tags, tokenizer, counting.prompt_tokens]
            facts += [astuple(source.columns)] if source.columns else []
            facts += [getattr(counting.tokenizer, name, None) for name in ("prompt_format", "defaults")]
            facts += [counting.measure_durations, _stamp(unit.path), [_stamp(tar) for tar in tars_of(unit)]]
            facts += ["without URLs"] if urls_forbidden() else []
            key = blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()
            yield IndexPart(unit, number, start, end, size, tags, key, source.columns)


def _ranges(unit: Unit) -> Iterator[tuple[int, int | None, int]]:
    """Yield ``(start, end, size)`` in bytes, split at line ends where the file can be read line by line."""
    if not _is_seekable(unit):
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


def _stamp(path: str) -> list[int | str]:
    """Return a value that changes when the file, or a file in the folder, changes."""
    if is_url(path):
        try:
            return [1, stamp(path)]
        except FileNotFoundError:
            raise ManifestError(f"{path} does not exist") from None
        except OSError as error:
            raise ManifestError(f"{path} cannot be read: {error}") from None
    if not os.path.exists(path):
        raise ManifestError(f"{path} does not exist")
    found = [path] if os.path.isfile(path) else sorted(
        os.path.join(root, name) for root, _, names in os.walk(path) for name in names
    )  # fmt: skip
    stats = [(name, os.stat(name)) for name in found]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return [len(stats), blake2b(text.encode(errors="surrogateescape"), digest_size=12).hexdigest()]


def read_part(part: IndexPart, counting: Counting) -> IndexPart:
    """Read one part and write ``KEY.npz``, and ``KEY.jsonl`` where the rows cannot be read from the unit again."""
    taken: list[tuple[float, int, int, int, int]] = []
    problems: list[Problem] = []
    number = 0

    def add(place: int, number: int, row: Found) -> bool:
        if isinstance(row, Utterance):
            count = counting.tokens(row, part.tags)
            if isinstance(count, int):
                taken.append((row.duration, count, place, row.identity, number))
                return True
            row = count
        if isinstance(row, str):
            row = Problem(part.unit.path, number, row)
        if row is not None:
            problems.append(row)
        return False

    columns: dict[str, Sequence[float] | np.ndarray] = {}
    if part.in_place:
        base = os.path.dirname(part.unit.path)
        options = ReadOptions(measure_durations=counting.measure_durations, columns=part.columns)
        with open_manifest(part.unit.path) as file:
            for place, number, line in scan_lines(file, part.start, part.end):
                if line.strip():
                    add(place, number, utterance_from_line(line, base, options))
    elif part.unit.kind == LENGTHS:
        found = read_lengths(part.unit.path, prompt_tokens=counting.prompt_tokens, most_tokens=MOST_TOKENS)
        *table, problems = found
        columns = dict(zip(("seconds", "tokens", "place"), table, strict=True))
    else:
        rows = read_unit(part.unit, measure_durations=counting.measure_durations, columns=part.columns)
        with replacing(counting.file_of(part, ".jsonl"), durable=False) as partial, open(partial, "wb") as file:
            place = 0
            for number, row in _until_empty(rows, part.unit.path, problems):
                if add(place, number, row):
                    assert isinstance(row, Utterance)
                    place += file.write(json.dumps(row_from_utterance(row), ensure_ascii=False).encode() + b"\n")
    columns = {name: [row[at] for row in taken] for at, name in enumerate(_COLUMNS)} | columns
    if len(columns["place"]) and columns["place"][-1] >= 1 << PLACE_BITS:
        raise ManifestError(f"{part.unit.path} is larger than {1 << PLACE_BITS} bytes; cut it into shards")
    stored = {name: np.array(columns[name], dtype) for name, dtype in _COLUMNS.items()}
    listed = json.dumps([astuple(problem) for problem in problems]).encode()
    stored |= {"lines": np.array(number, np.int64), "problems": np.frombuffer(listed, np.uint8)}
    with replacing(counting.file_of(part), durable=False) as partial, open(partial, "wb") as file:
        np.savez(file, **stored)  # pyright: ignore[reportArgumentType]
    return part


def _until_empty(
    rows: Iterator[tuple[int, Utterance | Problem]], path: str, problems: list[Problem]
) -> Iterator[tuple[int, Utterance | Problem]]:
    """Yield ``rows``; a shard without a usable row becomes a problem, because other shards may have some."""
    try:
        yield from rows
    except ManifestError as error:
        if not problems:
            problems.append(Problem(path, 0, f"unusable: {error}"))


_worker: Counting


def _start_worker(counting: Counting) -> None:
    global _worker
    _worker = counting
    start_pool_worker()  # on Ctrl-C a part that has begun is finished and kept


def _read_in_worker(part: IndexPart) -> IndexPart:
    return read_part(part, _worker)


def _read_parts(parts: Sequence[IndexPart], counting: Counting, workers: int) -> Iterator[IndexPart]:
    if workers <= 1 or len(parts) <= 1:
        for part in parts:
            yield read_part(part, counting)
        return
    # spawn: a fork of a process with threads (torch, a progress bar) can hang
    with concurrent.futures.ProcessPoolExecutor(
        min(workers, len(parts)), multiprocessing.get_context("spawn"), _start_worker, (counting,)
    ) as pool:
        futures = [pool.submit(_read_in_worker, part) for part in parts]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise ManifestError(
                "a worker process died, perhaps for want of memory; what was read is kept: "
                "run the same command again, with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# -- the index --


def _load_part(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ManifestError(f"{path} is damaged ({error}); remove it and index again") from None


def _merge(mixture: Sequence[Source], parts: Sequence[IndexPart], counting: Counting) -> LengthIndex:
    shards: list[Shard] = []
    problems: list[Problem] = []
    columns: dict[str, list[np.ndarray]] = {"seconds": [], "tokens": [], "place": [], "source": []}
    total = 0
    for number, source in enumerate(mixture):
        own = [part for part in parts if part.source == number]
        loaded = [_load_part(counting.file_of(part)) for part in own]
        keep = _first_of_each(loaded)
        found: list[Problem] = []
        seen = lines = 0
        before = total
        for part, one in zip(own, loaded, strict=True):
            lines = 0 if part.start == 0 else lines
            count = len(one["seconds"])
            kept = keep[seen : seen + count]
            seen += count
            found += [Problem(file, line + lines, why) for file, line, why in json.loads(one["problems"].tobytes())]
            again = one["line"][~kept] if not kept.all() else ()
            found += [Problem(part.unit.path, int(line) + lines, DUPLICATE) for line in again]
            lines += int(one["lines"])
            rows = int(kept.sum())
            path = counting.rows_of(part)
            last = shards[-1] if shards else None
            if last and part.start and last.path == path and last.source == number:
                shards[-1] = Shard(path, path, last.size + part.size, number, last.start, total + rows)
            elif rows:
                size = part.size if path in ("", part.unit.path) else os.stat(path).st_size
                shards.append(Shard(path, part.unit.path, size, number, total, total + rows))
            if rows:
                columns["seconds"].append(one["seconds"][kept])
                columns["tokens"].append(one["tokens"][kept])
                columns["place"].append(one["place"][kept] | np.uint64((len(shards) - 1) << PLACE_BITS))
                columns["source"].append(np.full(rows, number, np.uint16))
            total += rows
        if total == before:
            raise no_usable_row(source.path, found)
        problems += found
    tokenizer = counting.tokenizer.fingerprint if counting.tokenizer else None
    return LengthIndex(
        np.concatenate(columns["seconds"]),
        np.concatenate(columns["tokens"]),
        mixture,
        np.concatenate(columns["source"]),
        places=np.concatenate(columns["place"]),
        shards=shards,
        problems=problems,
        made_with={"tokenizer": tokenizer, "prompt_tokens": counting.prompt_tokens},
    )


def _first_of_each(loaded: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    """Return (N,) bool over the rows of a source's parts: False for a repeated row.

    Rows of a table of lengths have no identity, and are all kept.
    """
    identity = np.concatenate([one["identity"] for one in loaded])
    rows = sum(len(one["seconds"]) for one in loaded)
    ordered = np.sort(identity)
    if len(identity) != rows or not (ordered[1:] == ordered[:-1]).any():  # nearly always, and half the work
        return np.ones(rows, bool)
    keep = np.zeros(rows, bool)
    keep[np.unique(identity, return_index=True)[1]] = True
    return keep


def _progress(
    done: Iterator[IndexPart], parts: Sequence[IndexPart], waiting: Sequence[IndexPart], show: bool
) -> Iterator[IndexPart]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not (show and console.is_terminal):  # a disabled bar of rich before 14.3 prints an empty line
        yield from done
        return
    with Progress(*columns, console=console, transient=True) as bar:
        total = sum(part.size for part in parts)
        task = bar.add_task("indexing", total=total, completed=total - sum(part.size for part in waiting))
        for part in done:
            bar.advance(task, part.size)
            yield part
