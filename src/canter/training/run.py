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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from canter.corpus.manifest import Problem
from canter.errors import ConfigError
from canter.training.checkpoints import Checkpoints, to_disk, write_whole
from canter.training.config import TrainConfig, changes, dump_config, from_mapping, rooted

SETTLED = "run.json"
LOCK = ".lock"
LEFTOVERS = (
    "tokenizer",
    "lengths.arrow",
    "lengths.skipped.jsonl",
    "lengths.arrow.parts",
    "budget.json",
    ".cache",
)
# What an allowed change makes void: settled values by their key, files by their name.
STEPS, BATCHES = ("steps", "scheduled", "schedule"), ("batch_limits",)
VOID = {
    "manifest": ("lengths.arrow", "lengths.skipped.jsonl", "lengths.arrow.parts", ".cache", *STEPS, *BATCHES),
    **dict.fromkeys(
        ("text_column", "lang_column", "audio_column"),
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

    @classmethod
    def open(cls, config: TrainConfig, writes: bool = True) -> "Run":
        """Claims ``config.output``, or continues the run that is there.

        Raises ConfigError if the folder cannot be written, holds something else, or a run of another configuration.
        """
        folder = config.output
        if not writes:
            return cls(folder, writes=False)
        held, config = folder / "config.yaml", rooted(config)
        changed: list[tuple[str, Any, Any]] = []
        if (folder / SETTLED).exists():
            before = from_mapping(TrainConfig, yaml.safe_load(held.read_text(encoding="utf-8")), str(held))
            changed = changes(config, rooted(before))
            _refuse(folder, changed, config.allow_changes)
            _void(folder, [name for name, _, _ in changed])
        elif held.exists():  # of an attempt that got no further: its leftovers may be of other data
            _remove(folder, LEFTOVERS)
        else:
            _refuse_other_content(folder)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # what is allowed to this start is not to the next
            write_whole(held, dump_config(dataclasses.replace(config, allow_changes=False)))
            (folder / "checkpoints").mkdir(exist_ok=True)
        return cls(folder, changed=tuple(f"{name}: {before} -> {now}" for name, before, now in changed))

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
        """What an earlier start settled; empty for a new run."""
        path = self.folder / SETTLED
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def settle(self, values: dict[str, Any]) -> None:
        if not self.writes:
            return
        for name in LEFTOVERS:  # what they rest on outlives a power cut too
            for path in (self.folder / name, *(self.folder / name).glob("**/*")):
                to_disk(path)
        write_whole(self.folder / SETTLED, json.dumps(values, indent=2) + "\n")

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
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
            write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _append(self, path: Path, lines: Sequence[dict[str, Any]]) -> None:
        if lines and self.writes:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            with _writing(path), path.open("a", encoding="utf-8") as file:
                file.write(text)

    def forget_after(self, step: int) -> None:
        """Drops what was logged after ``step``, and a line that was torn: those steps are taken again."""
        for path in self.logs if self.writes else ():
            if path.exists():
                with _writing(path):
                    os.truncate(path, _bytes_up_to(path, step))

    def validated(self, step: int) -> bool:
        """Whether the metrics have a validation at this step."""
        if not self.metrics.exists():
            return False
        with self.metrics.open(encoding="utf-8") as file:
            return any(f'"kind": "valid", "step": {step},' in line for line in file)


@contextmanager
def claimed(folder: Path, seconds: float = 10.0) -> Iterator[None]:
    """Keeps other processes from training in ``folder``, which is made, in this context. Waits for one that has the
    folder for as many seconds: what a killed launcher leaves needs a moment to notice.

    Raises ConfigError where one still has it, or the folder cannot be written.
    """
    if not (folder / "config.yaml").exists():
        _refuse_other_content(folder)
    with _writing(folder):
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
def _writing(path: Path) -> Iterator[None]:
    """Says which file or folder it is that cannot be written."""
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


def _void(folder: Path, changed: Sequence[str]) -> None:
    """Takes back what followed from settings that have changed."""
    void = {name for setting in changed for name in VOID.get(setting, ())}
    settled = json.loads((folder / SETTLED).read_text(encoding="utf-8"))
    if void & settled.keys():
        kept = {key: value for key, value in settled.items() if key not in void}
        write_whole(folder / SETTLED, json.dumps(kept, indent=2) + "\n")
    _remove(folder, sorted(void - settled.keys()))


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _bytes_up_to(path: Path, step: int) -> int:
    """How much of a log is of steps up to ``step``: lines are in their order."""
    size = 0
    with path.open("rb") as file:
        for line in file:
            try:
                later = json.loads(line).get("step", 0) > step
            except (ValueError, AttributeError):
                return size
            if later or not line.endswith(b"\n"):
                return size
            size += len(line)
    return size
