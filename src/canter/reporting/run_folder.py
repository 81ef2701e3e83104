"""Read the folder of a training run, finished or not; missing and damaged files are listed, not fatal.

A run folder holds ``config.yaml`` and ``run.json`` (settings), ``metrics.jsonl`` (one JSON object a line, of kind
``train``, ``valid`` or ``event``), ``utterances.jsonl`` (the rows that each step was made of), ``validation/``
(transcripts), ``skipped.jsonl``, ``left_out.jsonl`` and ``lengths.skipped.jsonl`` (utterances that were not used),
``lengths.arrow``, ``budget.json`` and ``checkpoints/``.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from canter.corpus.index import LengthIndex
from canter.corpus.manifest import open_manifest, parse_line, scan_lines
from canter.errors import BudgetError, CheckpointError, ConfigError, ManifestError
from canter.planning.budget import Budget
from canter.untrusted import parse_yaml

Row = dict[str, Any]
"""A JSON object of a run folder; fields may be missing or of another type."""
FULLY_READ = 4 * 2**20  # bytes up to which utterances.jsonl is read completely
SAMPLED_STEPS = 2_000  # steps read of a longer utterances.jsonl


@dataclass(frozen=True)
class RunRecord:
    """The files of a run folder."""

    folder: Path
    train: list[Row]
    """``train`` rows by step; of a step that was repeated after a resume, the last one."""
    valid: list[Row]
    skipped: list[Row]
    """Utterances whose audio could not be used."""
    left_out: list[Row]
    """Utterances that fit in no batch."""
    unreadable: list[Row]
    """Manifest rows that the length index could not use."""
    events: list[Row]
    """Out-of-memory fallbacks, steps without a finite loss, settings that changed."""
    config: str
    resolved: Row
    """``run.json``: settings that were resolved at the start."""
    budget: Row
    checkpoints: list[str]
    best: Row
    """``checkpoints/best.json``."""
    missing: list[str] = field(default_factory=list)
    """Sentences about files and figures that are missing or cannot be read."""

    def column(self, name: str) -> np.ndarray:
        """Return a metric of every step as float64 (N,), NaN where a row lacks it."""
        return np.array([row[name] if is_number(row.get(name)) else math.nan for row in self.train], dtype=float)

    @cached_property
    def settings(self) -> Row:
        """Configuration as a mapping; empty where it is missing or not YAML."""
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
        """Length index and budget; None where one of them is missing or damaged."""
        try:
            return LengthIndex.open(self.folder / "lengths.arrow"), Budget.from_json(self.budget)
        except (BudgetError, ManifestError):
            return None

    def transcripts(self, step: int) -> list[Row]:
        """Return the transcripts that were kept of the validation at ``step``."""
        rows = _json_rows(self.folder / "validation" / f"step-{step:06d}.jsonl", [])
        return [row for row in rows if isinstance(row.get("text"), str) and isinstance(row.get("pred_text"), str)]

    def logged_steps(self) -> list[Row]:
        """Return rows of ``utterances.jsonl``: all, or for a long run about `SAMPLED_STEPS` evenly spaced ones."""
        path = self.folder / "utterances.jsonl"
        return [row for row in map(parse_line, _sampled_lines(path)) if _names_rows(row)] if path.exists() else []

    @property
    def padded_fraction(self) -> float | None:
        """Padded fraction of all steps' audio, 1 - sum(audio) / sum(audio / (1 - padding)); None where not recorded."""
        padding, audio = self.column("padding"), self.column("audio_seconds")
        known = np.isfinite(padding) & np.isfinite(audio) & (padding < 1) & (audio > 0)
        if not known.any():
            return None
        return float(1 - audio[known].sum() / (audio[known] / (1 - padding[known])).sum())


def read_run(folder: str | os.PathLike[str]) -> RunRecord:
    """Read a run folder. Raises ConfigError where the folder is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the run folder that canter train wrote")
    if not (folder / "metrics.jsonl").exists() and not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} is not a run folder: it has neither metrics.jsonl nor config.yaml")
    missing: list[str] = []
    if not (folder / "metrics.jsonl").exists():
        missing.append("No metrics.jsonl: the run has not reached its first step.")
    metrics = _json_rows(folder / "metrics.jsonl", missing)
    train = {row["step"]: row for row in metrics if row.get("kind") == "train" and _is_step(row)}
    valid = {row["step"]: row for row in metrics if row.get("kind") == "valid" and _is_step(row)}
    if metrics and not valid:
        missing.append("No validation yet, so no WER.")
    repeated = sum(row.get("kind") == "train" for row in metrics) - len(train)
    if repeated > 0:
        missing.append(f"{repeated} steps were repeated after a resume; the last time counts.")
    checkpoints = sorted(path.name for path in folder.glob("checkpoints/step-*") if path.is_dir())
    if not checkpoints:
        missing.append("No checkpoint yet.")
    return RunRecord(
        folder=folder,
        train=[train[step] for step in sorted(train)],
        valid=[valid[step] for step in sorted(valid)],
        skipped=_json_rows(folder / "skipped.jsonl", missing),
        left_out=_json_rows(folder / "left_out.jsonl", missing),
        unreadable=_json_rows(folder / "lengths.skipped.jsonl", missing),
        events=[row for row in metrics if row.get("kind") == "event"],
        config=_text(folder / "config.yaml", missing),
        resolved=_json(folder / "run.json", []),
        budget=_json(folder / "budget.json", missing),
        checkpoints=checkpoints,
        best=_json(folder / "checkpoints" / "best.json", []),
        missing=missing,
    )


def is_number(value: object) -> TypeGuard[float]:
    """Return True for a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _json_rows(path: Path, missing: list[str]) -> list[Row]:
    """Return the objects of a JSONL file, or none where it does not exist.

    Unreadable lines, such as a torn last one, are counted in ``missing``.
    """
    if not path.exists():
        return []
    rows: list[Row] = []
    broken: list[int] = []
    with open_manifest(path) as file:
        for _, number, line in scan_lines(file):
            row = parse_line(line) if line.strip() else None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                broken.append(number)
    if broken:
        missing.append(f"{path.name}: {len(broken)} unreadable lines, the first is line {broken[0]}.")
    return rows


def _sampled_lines(path: Path) -> Iterator[bytes]:
    """Yield all lines of a file, or for a large one the lines that follow evenly spaced bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= FULLY_READ:
            yield from file
            return
        for number in range(SAMPLED_STEPS):
            file.seek(number * size // SAMPLED_STEPS)
            if number:
                file.readline()
            yield file.readline()


def _names_rows(row: object) -> TypeGuard[Row]:
    """Return True for a line of ``utterances.jsonl`` with an epoch and the index rows of each micro-batch."""
    if not isinstance(row, dict):
        return False
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
    value = parse_line(text.encode()) if text else {}
    if isinstance(value, str):
        missing.append(f"{path.name}: {value}.")
    return value if isinstance(value, dict) else {}
