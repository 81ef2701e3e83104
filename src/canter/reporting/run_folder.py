"""Read the folder of a training run, finished or not, as far as it goes.

A run folder holds ``config.yaml`` and ``run.json`` (settings), ``metrics.jsonl`` (one JSON object a line, of kind
``train``, ``valid`` or ``event``), ``utterances.jsonl`` (the rows that each step was made of), ``validation/``
(transcripts), ``skipped.jsonl``, ``left_out.jsonl`` and ``lengths.skipped.jsonl`` (utterances that were not used),
``lengths.arrow``, ``budget.json`` and ``checkpoints/``.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from canter.corpus.index import LengthIndex
from canter.errors import BudgetError, CheckpointError, ConfigError, ManifestError
from canter.planning.budget import Budget
from canter.untrusted import parse_yaml

Row = dict[str, Any]
WHOLE_LOG = 4 * 2**20  # bytes up to which utterances.jsonl is read in full
SAMPLED_STEPS = 2_000  # steps read of a longer one


@dataclass(frozen=True)
class Run:
    """A run folder, and what of it is missing or unreadable."""

    folder: Path
    train: list[Row]
    """``train`` rows by step; a step that was repeated after a resume counts once, as it was last."""
    valid: list[Row]
    skipped: list[Row]
    """Utterances whose audio turned out unusable."""
    left_out: list[Row]
    """Utterances that fit in no batch."""
    unreadable: list[Row]
    """Manifest rows that the length index could not use."""
    events: list[Row]
    """Out-of-memory fallbacks, steps without a finite loss, settings that changed."""
    config: str
    settled: Row
    """``run.json``: what was resolved at the start."""
    budget: Row
    checkpoints: list[str]
    best: Row
    """``checkpoints/best.json``."""
    missing: list[str] = field(default_factory=list)
    """Sentences on what is not there or cannot be read."""

    def column(self, name: str, kind: str = "train") -> np.ndarray:
        """Return a metric of every row as float64 (N,), NaN where a row lacks it."""
        rows = self.train if kind == "train" else self.valid
        return np.array([row[name] if is_number(row.get(name)) else math.nan for row in rows], dtype=float)

    @cached_property
    def settings(self) -> Row:
        """The configuration as a mapping; empty where it is missing or no YAML."""
        try:
            value = parse_yaml(self.config, "config.yaml")
        except CheckpointError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def ranks(self) -> int:
        """Number of ranks at the last step."""
        seconds = [row["rank_seconds"] for row in self.train if isinstance(row.get("rank_seconds"), list)]
        return len(seconds[-1]) if seconds and seconds[-1] else 1

    @cached_property
    def planned(self) -> tuple[LengthIndex, Budget] | None:
        """The length index and the budget; None where one of them is missing or damaged."""
        try:
            return LengthIndex.open(self.folder / "lengths.arrow"), Budget.from_json(self.budget)
        except (BudgetError, ManifestError):
            return None

    def transcripts(self, step: int) -> list[Row]:
        """Return the transcripts kept of the validation at ``step``; empty without any."""
        path = self.folder / "validation" / f"step-{step:06d}.jsonl"
        rows = read_json_lines(path, []) if path.exists() else []
        return [row for row in rows if isinstance(row.get("text"), str) and isinstance(row.get("pred_text"), str)]

    def logged_steps(self) -> list[Row]:
        """Return rows of ``utterances.jsonl``: all, or of a long run about `SAMPLED_STEPS` evenly spaced ones."""
        path = self.folder / "utterances.jsonl"
        if not path.exists():
            return []
        return [row for row in map(_object, _sampled_lines(path)) if row and _names_rows(row)]


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run folder. Raises `ConfigError` where it is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the run folder that canter train wrote")
    if not (folder / "metrics.jsonl").exists() and not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} is not a run folder: it has neither metrics.jsonl nor config.yaml")
    missing: list[str] = []
    if (folder / "metrics.jsonl").exists():
        metrics = read_json_lines(folder / "metrics.jsonl", missing)
    else:
        metrics = []
        missing.append("No metrics.jsonl: the run has not reached its first step.")
    train = {row["step"]: row for row in metrics if row.get("kind") == "train" and _is_step(row)}
    valid = {row["step"]: row for row in metrics if row.get("kind") == "valid" and _is_step(row)}
    if metrics and not valid:
        missing.append("No validation yet, so no WER.")
    repeated = sum(row.get("kind") == "train" for row in metrics) - len(train)
    if repeated > 0:
        missing.append(f"{repeated} steps were repeated after a resume; the last time counts.")
    listed = {
        name: read_json_lines(folder / f"{name}.jsonl", missing) if (folder / f"{name}.jsonl").exists() else []
        for name in ("skipped", "left_out", "lengths.skipped")
    }
    checkpoints = sorted(path.name for path in folder.glob("checkpoints/step-*") if path.is_dir())
    if not checkpoints:
        missing.append("No checkpoint yet.")
    return Run(
        folder=folder,
        train=[train[step] for step in sorted(train)],
        valid=[valid[step] for step in sorted(valid)],
        skipped=listed["skipped"],
        left_out=listed["left_out"],
        unreadable=listed["lengths.skipped"],
        events=[row for row in metrics if row.get("kind") == "event"],
        config=_text(folder / "config.yaml", missing),
        settled=_json(folder / "run.json", []),
        budget=_json(folder / "budget.json", missing),
        checkpoints=checkpoints,
        best=_json(folder / "checkpoints" / "best.json", []),
        missing=missing,
    )


def is_number(value: object) -> bool:
    """Return True for a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_json_lines(path: Path, missing: list[str]) -> list[Row]:
    """Read the objects of a JSONL file. Unreadable lines, such as the torn last one of a killed run, are left out and
    counted in ``missing``."""
    rows, broken = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        row = _object(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            broken.append(number)
    if broken:
        missing.append(f"{path.name}: {len(broken)} unreadable lines, the first is line {broken[0]}.")
    return rows


def _object(line: str | bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _sampled_lines(path: Path) -> Iterator[bytes]:
    """Yield all lines of a file, or the whole lines after evenly spaced bytes of a large one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_LOG:
            yield from file
            return
        for number in range(SAMPLED_STEPS):
            file.seek(number * size // SAMPLED_STEPS)
            if number:
                file.readline()
            yield file.readline()


def _names_rows(row: Row) -> bool:
    """Return whether a line of ``utterances.jsonl`` has the index rows of each micro-batch, and a whole epoch."""
    batches, epoch = row.get("rows"), row.get("epoch") or 0
    return (
        isinstance(batches, list)
        and all(isinstance(batch, list) and all(type(one) is int for one in batch) for batch in batches)
        and type(epoch) is int
        and epoch >= 0
    )


def _is_step(row: Row) -> bool:
    return isinstance(row.get("step"), int)


def _text(path: Path, missing: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        missing.append(f"No {path.name}.")
        return ""


def _json(path: Path, missing: list[str]) -> Row:
    text = _text(path, missing)
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        missing.append(f"{path.name} is not JSON: {error}.")
        return {}
    return value if isinstance(value, dict) else {}
