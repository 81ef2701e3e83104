"""Sources to a length index: every row read, checked and counted once, in parallel, resumable.

The work is cut into parts (a shard, or 8 MiB of a large JSONL file). What is known of a part is kept in
the folder ``INDEX.parts`` beside the index, under a key of everything it depends on, so that after an
interruption, or when a source is added, only what is new is read. Formats without lines to seek to are
written out there as JSONL.
"""

import concurrent.futures
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from canter.corpus.index import FORMAT, MOST_SOURCES, PLACE_BITS, LengthIndex, Shard, Source
from canter.corpus.manifest import no_usable_row
from canter.corpus.mixture import Group, leaves, shares
from canter.corpus.parts import (
    KEPT,
    Counting,
    Encoder,
    Part,
    load_part,
    part_path,
    ranges,
    read_part,
    rows_path,
)
from canter.corpus.remote import is_url, stamp, urls_forbidden
from canter.corpus.sources import tars_of, units_of
from canter.corpus.utterance import DUPLICATE, Problem
from canter.errors import ManifestError
from canter.processes import start_pool_worker

READERS = 4  # counts up when readers take rows otherwise than before: what they left in .parts is read anew


def index_sources(
    sources: str | os.PathLike[str] | Group | Iterable[str | os.PathLike[str] | Source],
    output: str | os.PathLike[str],
    tokenizer: Encoder | None = None,
    *,
    prompt_tokens: int = 0,
    workers: int = 0,
    measure_durations: bool = False,
    progress: bool = False,
) -> LengthIndex:
    """Writes the length index of ``sources`` to ``output`` and opens it.

    A row's tokens are its ``num_tokens``, or ``prompt_tokens`` + tokens of the text + 1 for the end
    token. ``workers`` processes share the reading (0: this one; the tokenizer must then be picklable).
    Raises `ManifestError` where a source cannot be read or has no usable row; single bad rows are listed
    in the index's ``problems`` instead.
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
    counting = Counting(str(folder.absolute()), tokenizer, prompt_tokens, measure_durations)
    parts = [part for number, source in enumerate(mixture) for part in _parts(number, source, counting)]
    waiting = [part for part in parts if not part_path(counting, part).exists()]
    for _ in _progress(_read_parts(waiting, counting, workers), parts, waiting, progress):
        pass
    index = _merge(mixture, parts, counting)
    if isinstance(given, Group):
        weights = shares(given, index.rows_of.tolist())
        index.sources = tuple(replace(one, weight=float(w)) for one, w in zip(mixture, weights, strict=True))
    index.save(output)
    kept = {part.key for part in parts}
    for stale in folder.iterdir():
        if KEPT.fullmatch(stale.name) and stale.name.split(".")[0] not in kept:
            stale.unlink()
    return LengthIndex.open(output)


def _check_output(output: Path, folder: Path) -> None:
    """Makes room for the index, and never writes over what is none."""
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


def _parts(number: int, source: Source, counting: Counting) -> Iterator[Part]:
    tags = dict(sorted(source.tags.items()))
    for unit in units_of(source.path, source.audio, source.columns):
        for start, end, size in ranges(unit):
            tokenizer = counting.tokenizer.fingerprint if counting.tokenizer else None
            facts = [FORMAT, READERS, astuple(unit), start, end, tags, tokenizer, counting.prompt_tokens]
            facts += [astuple(source.columns)] if source.columns else []
            facts += [getattr(counting.tokenizer, name, None) for name in ("prompt_format", "defaults")]
            facts += [counting.measure_durations, _stamp(unit.path), [_stamp(tar) for tar in tars_of(unit)]]
            facts += ["without URLs"] if urls_forbidden() else []
            key = blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()
            yield Part(unit, number, start, end, size, tags, key, source.columns)


def _stamp(path: str) -> list:
    """What changes when a file, or anything in a folder, does."""
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


_worker: Counting


def _start_worker(counting: Counting) -> None:
    global _worker
    _worker = counting
    start_pool_worker()  # on Ctrl-C a part begun is finished and kept


def _read_in_worker(part: Part) -> Part:
    return read_part(part, _worker)


def _read_parts(parts: Sequence[Part], counting: Counting, workers: int) -> Iterator[Part]:
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


def _merge(mixture: Sequence[Source], parts: Sequence[Part], counting: Counting) -> LengthIndex:
    shards: list[Shard] = []
    problems: list[Problem] = []
    columns: dict[str, list[np.ndarray]] = {"seconds": [], "tokens": [], "place": [], "source": []}
    total = 0
    for number, source in enumerate(mixture):
        mine = [part for part in parts if part.source == number]
        loaded = [load_part(counting, part) for part in mine]
        keep = _first_of_each(loaded)
        found: list[Problem] = []
        seen = lines = 0
        before = total
        for part, one in zip(mine, loaded, strict=True):
            lines = 0 if part.start == 0 else lines
            count = len(one["seconds"])
            kept = keep[seen : seen + count]
            seen += count
            found += [Problem(file, line + lines, why) for file, line, why in json.loads(one["problems"].tobytes())]
            again = one["line"][~kept] if not kept.all() else ()
            found += [Problem(part.unit.path, int(line) + lines, DUPLICATE) for line in again]
            lines += int(one["lines"])
            rows = int(kept.sum())
            path = rows_path(part, counting)
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


def _first_of_each(loaded: Sequence[dict[str, Any]]) -> np.ndarray:
    """(N,) bool over the rows of a source's parts: False for what has been met before. Bare lengths have
    no identity."""
    identity = np.concatenate([one["identity"] for one in loaded])
    if len(identity) != sum(len(one["seconds"]) for one in loaded):
        return np.ones(sum(len(one["seconds"]) for one in loaded), bool)
    ordered = np.sort(identity)
    if not (ordered[1:] == ordered[:-1]).any():  # nearly always, and half the work
        return np.ones(len(identity), bool)
    keep = np.zeros(len(identity), bool)
    keep[np.unique(identity, return_index=True)[1]] = True
    return keep


def _progress(done: Iterator[Part], parts: Sequence[Part], waiting: Sequence[Part], show: bool) -> Iterator[Part]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not (show and console.is_terminal):  # a disabled bar of rich before 14.3 prints an empty line
        yield from done
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("indexing", total=sum(part.size for part in parts))
        bar.advance(task, sum(part.size for part in parts) - sum(part.size for part in waiting))
        for part in done:
            bar.advance(task, part.size)
            yield part
