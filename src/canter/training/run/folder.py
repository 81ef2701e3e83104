"""The folder of a training run.

config.yaml       the configuration in force
run.json          what was decided at the start: steps, precision, micro-batches a step, batches and their limits
lengths.arrow     the length index of the training data
left_out.jsonl    utterances that are in no batch, with the reason
valid.skipped.jsonl  validation rows that cannot be used, with the reason
budget.json       measured memory and time of a step
tokenizer/        where one was trained on the way
metrics.jsonl     a line a training step ("kind": "train"), a validation ("valid") and anything unusual ("event")
utterances.jsonl  the rows that each step was made of
skipped.jsonl     utterances that could not be used, with the reason
validation/       step-000500.jsonl: the transcripts of a validation, a manifest with pred_text
checkpoints/      step-000500/ (a model folder with training/ beside the weights), best.json
tensorboard/      the metrics once more
report.html       by 'canter report'
"""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from canter.corpus.manifest import Problem
from canter.errors import CheckpointError, ConfigError
from canter.fields import to_mapping
from canter.files import to_disk, write_text
from canter.training.config import (
    TrainConfig,
    changes,
    config_of_run,
    dump_config,
    load_run_config,
    rooted,
)
from canter.training.run.checkpoints import (
    CONFIG,
    SETTLED,
    Checkpoints,
    checksum,
    text_checksum,
)

CHECKSUM = "checksum"  # in run.json, over all else that it holds
LOCK = ".lock"
LEFTOVERS = (
    "tokenizer",
    "lengths.arrow",
    "lengths.skipped.jsonl",
    "lengths.arrow.parts",
    "budget.json",
    ".cache",
)
KEPT = ("tokenizer", "budget.json")  # of these, what run.json has the checksums of
# Types of what run.json holds.
TYPES = {
    "steps": int,
    "scheduled": int,
    "timed": int,
    "threads": int,
    "micro_batches_per_step": int,
    "precision": str,
    "schedule": list,
    "batch_limits": dict,
    "batches": dict,
    "config": dict,
    "files": dict,
}
# What an allowed change makes void: settled values by their key, files by their name.
STEPS, BATCHES = ("steps", "scheduled", "schedule"), ("batch_limits",)
VOID = {
    "manifest": ("lengths.arrow", "lengths.skipped.jsonl", "lengths.arrow.parts", ".cache", *STEPS, *BATCHES),
    **dict.fromkeys(
        ("text_column", "language_column", "audio_column"),
        ("lengths.arrow", "lengths.skipped.jsonl", "lengths.arrow.parts", ".cache", *STEPS, *BATCHES),
    ),
    "budget": ("budget.json", *STEPS, *BATCHES),
    "batch_seconds": BATCHES,
    "min_steps": BATCHES,
    "steps": (*STEPS, "timed"),
    "minutes": (*STEPS, "timed"),
    "epochs": STEPS,
    "precision": ("precision",),
    "micro_batches_per_step": ("micro_batches_per_step", *BATCHES),
}
FIXED = ("tokenizer", "vocabulary", "init", "model.")  # what the weights were made for


@dataclass(frozen=True)
class Run:
    """A run's folder; ``open`` makes or continues one. With ``writes`` false (any rank but the first) nothing is
    written."""

    folder: Path
    writes: bool = True
    changed: tuple[str, ...] = ()
    """Settings that differ from those that the run had, where that is allowed: 'name: before -> now'."""
    config: Mapping[str, Any] | None = None
    """The settings in force, as run.json keeps them."""

    @classmethod
    def open(cls, config: TrainConfig, writes: bool = True) -> "Run":
        """Claims ``config.output``, or continues the run that is there.

        Raises ConfigError if the folder cannot be written, holds something else, or a run of another configuration;
        CheckpointError if its run.json is damaged.
        """
        folder = config.output
        if not writes:
            return cls(folder, writes=False)
        held, config = folder / CONFIG, rooted(config)
        # what is allowed to this start is not to the next
        settings = dataclasses.replace(config, allow_changes=False)
        changed: list[tuple[str, Any, Any]] = []
        settled = read_settled(folder)
        if settled:
            if "config" in settled:
                before = config_of_run(settled["config"], str(folder / SETTLED))
            else:  # of an older Canter
                before = load_run_config(held)
            changed = changes(config, rooted(before))
            _refuse(folder, changed, config.allow_changes)
            _void(folder, settled, [name for name, _, _ in changed], to_mapping(settings))
        elif held.exists():  # of an attempt that got no further: its leftovers may be of other data
            _remove(folder, LEFTOVERS)
        else:
            _refuse_other_content(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(held, dump_config(settings))
            (folder / "checkpoints").mkdir(exist_ok=True)
        told = tuple(f"{name}: {before} -> {now}" for name, before, now in changed)
        return cls(folder, changed=told, config=to_mapping(settings))

    @property
    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return Checkpoints(self.folder / "checkpoints", 1).whole()

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def logs(self) -> tuple[Path, ...]:
        """Files with a line for steps, in their order."""
        return (self.metrics, self.folder / "utterances.jsonl", self.folder / "skipped.jsonl")

    def settled(self) -> dict[str, Any]:
        """Return what run.json holds: what was decided at the start; empty for a new run.

        Raises CheckpointError where the file is damaged, or missing beside checkpoints.
        """
        return read_settled(self.folder)

    def verify(self, allow_changes: bool, say: Callable[[str], None] = lambda _: None) -> None:
        """Compare the tokenizer and the budget with their checksums in run.json.

        Raises CheckpointError for a file that is not as it was written; a changed budget is only told of where changes
        are allowed.
        """
        for name, expected in self.settled().get("files", {}).items():
            path = self.folder / name
            what = "missing" if not path.is_file() else "changed" if checksum(path) != expected else None
            if what is None:
                continue
            if name == "budget.json" and allow_changes:
                say(f"{path} is {what} since the run began; the steps from here on follow it")
                continue
            copies = [one / path.name for one in reversed(self.checkpoints) if (one / path.name).exists()]
            way = f"copy {copies[0]} there" if copies and path.parent != self.folder else "put it back as it was"
            also = "; --allow-changes takes it as it is" if name == "budget.json" else ""
            raise CheckpointError(f"{path} is {what} since the run began, and its steps would be others: {way}{also}")

    def settle(self, values: dict[str, Any]) -> None:
        if not self.writes:
            return
        for name in LEFTOVERS:  # what they rest on outlives a power cut too
            for path in (self.folder / name, *(self.folder / name).glob("**/*")):
                to_disk(path)
        files = sorted(
            path for name in KEPT for path in (self.folder / name, *(self.folder / name).glob("**/*")) if path.is_file()
        )
        values = dict(values) | {"files": {str(path.relative_to(self.folder)): checksum(path) for path in files}}
        if self.config is not None:
            values["config"] = self.config
        with writing(self.folder / SETTLED):
            _write_settled(self.folder, values)

    def log(self, **values: Any) -> None:
        """Appends a line to the metrics."""
        self._append(self.metrics, [values | {"time": time.time()}])

    def log_utterances(self, step: int, epoch: int, micro_batches: Sequence[np.ndarray]) -> None:
        """Appends the rows of the length index that a step was made of, micro-batch by micro-batch."""
        rows = [rows.tolist() for rows in micro_batches]
        self._append(self.folder / "utterances.jsonl", [{"step": step, "epoch": epoch, "rows": rows}])

    def skip(self, step: int, problems: Iterable[Problem]) -> None:
        """Appends unusable utterances of a step to skipped.jsonl; ``line`` is the row of the length index."""
        lines = [{"file": p.file, "line": p.line, "reason": p.reason, "step": step} for p in problems]
        self._append(self.folder / "skipped.jsonl", lines)

    def keep_transcripts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the transcripts of a validation to validation/step-NNNNNN.jsonl, whole or not at all."""
        if not rows or not self.writes:
            return
        path = self.folder / "validation" / f"step-{step:06d}.jsonl"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _append(self, path: Path, lines: Sequence[dict[str, Any]]) -> None:
        if lines and self.writes:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(text)

    def forget_after(self, step: int, say: Callable[[str], None] = lambda _: None) -> None:
        """Drop what was logged after ``step``, and a last line that was torn: those steps are taken again. Damaged
        lines before that are kept, with all lines after them, and told of."""
        for path in self.logs if self.writes else ():
            if path.exists():
                with writing(path):
                    size, damaged = _bytes_up_to(path, step)
                if damaged:
                    lines = f"line {damaged[0]} is" if len(damaged) == 1 else f"lines {_some(damaged)} are"
                    say(f"{path}: {lines} damaged, and kept as found; the run itself does not need them")
                with writing(path):
                    os.truncate(path, size)

    def validated(self, step: int) -> bool:
        """Whether the metrics have a validation at this step."""
        if not self.metrics.exists():
            return False
        with self.metrics.open(encoding="utf-8", errors="replace") as file:
            return any(f'"kind": "valid", "step": {step},' in line for line in file)


@contextmanager
def claimed(folder: Path, seconds: float = 10.0) -> Iterator[None]:
    """Keeps other processes from training in ``folder``, which is made, in this context. Waits for one that has the
    folder for as many seconds: what a killed launcher leaves needs a moment to notice.

    Raises ConfigError where one still has it, or the folder cannot be written.
    """
    if not any((folder / name).exists() for name in (CONFIG, SETTLED)):
        _refuse_other_content(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        end = time.monotonic() + seconds
        while not _locked(handle):
            if time.monotonic() > end:
                holder = os.pread(handle, 100, 0).decode(errors="replace").strip()
                raise ConfigError(
                    f"{folder}: another process ({holder}) trains there; wait for it or stop it, or choose another "
                    "--output"
                )
            time.sleep(0.1)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        # else a file system without locks, which has none to wait for
    return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager that raises ConfigError, naming ``path``, where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot write there ({error.strerror}); make room or choose another --output"
        ) from None


def _refuse_other_content(folder: Path) -> None:
    """Raises ConfigError where a folder without config.yaml is not empty, hidden files aside."""
    if folder.exists() and (not folder.is_dir() or any(not n.startswith(".") for n in os.listdir(folder))):
        raise ConfigError(f"{folder} exists and is not a run; choose another --output")


def _refuse(folder: Path, changed: list[tuple[str, Any, Any]], allowed: bool) -> None:
    """Raises ConfigError where settings differ that may not."""
    told = [f"{name}: {before} -> {now}" for name, before, now in changed]
    fixed = [line for (name, _, _), line in zip(changed, told) if name.startswith(FIXED)]
    if fixed:
        raise ConfigError(
            f"{folder} holds a run of another configuration ({'; '.join(told)}), and {'; '.join(fixed)} would leave "
            "its weights without use; choose another --output, or set these as they were"
        )
    if told and not allowed:
        raise ConfigError(
            f"{folder} holds a run of another configuration ({'; '.join(told)}); choose another --output, "
            "remove the folder, set these as they were, or go on with the new ones by --allow-changes"
        )


def _void(folder: Path, settled: dict[str, Any], changed: Sequence[str], config: Mapping[str, Any]) -> None:
    """Take back what followed from settings that have changed, and note those that hold now."""
    void = {name for setting in changed for name in VOID.get(setting, ())}
    if changed or "config" in settled:
        kept = {key: value for key, value in settled.items() if key not in void}
        if "files" in kept:
            kept["files"] = {name: one for name, one in kept["files"].items() if name not in void}
        if "config" in settled:
            kept["config"] = config
        with writing(folder / SETTLED):
            _write_settled(folder, kept)
    _remove(folder, sorted(void - settled.keys()))


def _write_settled(folder: Path, values: Mapping[str, Any]) -> None:
    """Write run.json, with a checksum over all else that it holds."""
    text = json.dumps({name: value for name, value in values.items() if name != CHECKSUM}, indent=2)
    write_text(folder / SETTLED, json.dumps(json.loads(text) | {CHECKSUM: text_checksum(text)}, indent=2) + "\n")


def read_settled(folder: Path) -> dict[str, Any]:
    """Return what run.json holds; empty where there is none and no checkpoint either.

    Raises CheckpointError where it is damaged, or missing beside checkpoints, naming where a copy is.
    """
    path = folder / SETTLED
    checkpoints = Checkpoints(folder / "checkpoints", 1).whole()
    if not path.exists() and not checkpoints:
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not values:
            raise ValueError("not a JSON object")
        stated = values.pop(CHECKSUM, None)
        if stated is not None and stated != text_checksum(json.dumps(values, indent=2)):
            raise ValueError("it is not as it was written")
        for name, kind in TYPES.items():
            value = values.get(name)
            if name in values and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"{name} is {value!r}")
            if isinstance(value, int) and value < (name != "timed"):
                raise ValueError(f"{name} is {value!r}")
        return values
    except (OSError, ValueError, RecursionError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        copies = [one / "training" / SETTLED for one in reversed(checkpoints)]
        copy = next((one for one in copies if one.exists()), None)
        way = f"copy {copy} there" if copy else "put it back from a copy"
        if not checkpoints:
            way = "remove it: no checkpoint was saved yet, and the same command starts the run anew"
        raise CheckpointError(f"{path} {why}; {way}") from None


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _bytes_up_to(path: Path, step: int) -> tuple[int, list[int]]:
    """Return (size, numbers of damaged lines in it) of that part of a log which is of steps up to ``step``: all up to
    the last whole line of such a step."""
    size = place = 0
    damaged: list[int] = []
    pending: list[int] = []  # damaged lines that count only if a line of such a step follows
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place += len(line)
            try:
                kept = json.loads(line).get("step", 0) <= step and line.endswith(b"\n")
            except (ValueError, AttributeError, TypeError, RecursionError):
                pending.append(number)
                continue
            if kept:
                size, damaged = place, damaged + pending
                pending = []
    return size, damaged


def _some(numbers: Sequence[int], most: int = 5) -> str:
    told = ", ".join(map(str, numbers[:most]))
    return f"{told} and {len(numbers) - most} more" if len(numbers) > most else told
