"""What `compare`, `plan` and `inspect` read: a length index or a table of lengths, and a budget or a model's name."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from canter.errors import ManifestError, PlanError

if TYPE_CHECKING:
    from canter.corpus.index import LengthIndex
    from canter.planning import Budget


@dataclass(frozen=True)
class PlanOptions:
    """What `compare` and `plan` have in common."""

    index: tyro.conf.Positional[Path]
    """A length index, or a Parquet or Arrow table with `duration` and `num_tokens` (or `tokens`)."""
    budget: Path | None = None
    """A budget file, made by `canter tune`. Without one, an analytic budget of --model and --memory serves."""
    model: str | None = None
    """Shape of the analytic budget, canary-1b unless given. With --budget, the file is checked against it."""
    memory: float | None = None
    """Gigabytes of the analytic budget's device, 80 unless given."""
    ranks: int = 1
    """GPUs that share the micro-batches of a step."""
    micro_batches_per_step: int | None = None
    """Micro-batches of an optimiser step; the ranks unless given."""
    window: int | None = None
    """Utterances that are batched together; the strategy's own unless given (`balanced`: 50,000)."""
    mixing: float = 1.0
    """Dial of `balanced`: more mixes more and pads more; 0 pads least, by a slow search fit for small sets."""
    min_steps: int | None = None
    """Least number of optimiser steps an epoch; batches are made smaller evenly to reach it. Unless given 50, or fewer
    where a step would have less than 16 utterances; 1 makes the largest batches."""
    max_tokens_per_second: tuple[str, ...] = ()
    """Leave out utterances with more tokens a second: one limit such as `25`, or limits up to a duration in seconds
    such as `10:30 20:25 40:20`."""
    seed: int = 0
    """Another seed, another shuffle."""
    prompt_tokens: int = 0
    """Added, with one for the end, to the column `tokens` of a table of lengths."""


def open_lengths(path: Path, prompt_tokens: int = 0) -> LengthIndex:
    """The index at `path`, or one made in memory from a Parquet or Arrow table of lengths."""
    from canter.corpus.index import LengthIndex
    from canter.corpus.readers.lengths import read_lengths

    if prompt_tokens < 0:
        raise PlanError(f"--prompt-tokens is {prompt_tokens}; it must be 0 or more")
    if not path.exists():
        raise ManifestError(f"{path} does not exist; make it with: canter index MANIFEST -o {path.name}")
    if path.suffix != ".parquet" and is_index(path):
        return LengthIndex.open(path)
    if path.suffix not in (".parquet", ".arrow", ".feather"):
        raise ManifestError(
            f"{path} is neither an index nor a table of lengths; make one with: canter index {path} -o lengths.arrow"
        )
    seconds, tokens, _, problems = read_lengths(str(path), prompt_tokens=prompt_tokens)
    if not len(seconds):
        raise ManifestError(f"{path}: not one row can be used{f'; {problems[0].reason}' if problems else ''}")
    return LengthIndex(seconds, tokens, [path.stem], problems=problems)


def steps_folder(index: LengthIndex) -> Path | None:
    """Beside the index, where its plans keep their tables of steps; None where it cannot be written or is in memory."""
    if index.path is None or not os.access(index.path.parent, os.W_OK):
        return None
    return index.path.with_suffix(".steps")


def is_index(path: Path) -> bool:
    """Whether an Arrow file has the header of a length index (a bare table of lengths has not)."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            return b"canter" in (pa.ipc.open_file(file).schema.metadata or {})
    except (pa.ArrowInvalid, OSError):
        return False


def choose_budget(path: Path | None, model: str | None, memory: float | None) -> Budget:
    """The budget in a file, checked against `model` where that is named too, or an analytic one for a model's name."""
    from canter.errors import BudgetError
    from canter.planning import Budget, analytic_budget
    from canter.planning.shapes import check_shape

    if path is None:
        return analytic_budget(model or "canary-1b", 80.0 if memory is None else memory)
    if memory is not None:
        raise BudgetError(
            f"--memory is for the analytic budget; {path} has a limit of its own (memory.limit_bytes)"
        )
    budget = Budget.load(path)
    if model is not None:
        try:
            check_shape(budget, model)
        except BudgetError as error:
            raise BudgetError(f"{path}: {error}") from None
    return budget


def check_ranks(ranks: int, micro_batches: int, what: str = "micro-batches") -> None:
    """Raises PlanError where ranks are too many to have work."""
    if ranks < 1:
        raise PlanError(f"--ranks is {ranks}; it must be at least 1")
    if 0 < micro_batches < ranks:
        raise PlanError(
            f"--ranks is {ranks} and there are only {micro_batches} {what}: the others would only wait; "
            f"use {micro_batches} at most"
        )


def none_fits(index: LengthIndex, budget: Budget) -> PlanError:
    room = (budget.limit_bytes - budget.fixed_bytes) / 1e9
    return PlanError(
        f"not one of the {len(index):,} utterances can be used with this budget ({room:.3g} GB above what is fixed): "
        "raise its limit, or cut the utterances"
    )


def tell_skipped(index: LengthIndex) -> None:
    """Says on standard error which rows of the sources are not in the index, if any."""
    for kind, count in index.skipped.items():
        print(f"left out of {index.path or 'the table'}, {count:,}: {kind}", file=sys.stderr)
    for problem in index.problems[:3] if index.skipped else ():
        print(f"  {problem.file}:{problem.line}: {problem.reason}", file=sys.stderr)


def progress_console():
    """Progress goes to standard error, so that standard output stays machine-readable."""
    from rich.console import Console

    return Console(stderr=True)


def plain(value):
    """A JSON value without infinities, which JSON has not."""
    import math

    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
