"""The folder of a training run.

config.yaml       the configuration in force
run.json          decisions: steps, precision, micro-batches per step, batches and their limits; and the configuration
lengths.arrow     the length index of the training data
left_out.jsonl    utterances in no batch, with the reason
valid.skipped.jsonl  validation rows that cannot be used, with the reason
budget.json       measured memory and time of a step
augment.json      usable noise and impulse responses of the augmentation
augment.skipped.jsonl  those that cannot be used, with the reason
tokenizer/        tokenizer and alphabet
metrics.jsonl     a line for each training step ("kind": "train"), validation ("valid") and unusual event ("event")
utterances.jsonl  the rows of each step
skipped.jsonl     utterances that could not be used, with the reason
validation/       step-000500.jsonl: the transcripts of a validation, a manifest with pred_text
checkpoints/      step-000500/ (a model folder with training/ beside the weights; README.md, the model card, in the best
                  one), best.json
tensorboard/      the metrics for TensorBoard
report.html       written by 'canter report'
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
from typing import Any, Never

import yaml

from canter.errors import CheckpointError, ConfigError
from canter.events import QUIET, Events
from canter.fields import to_mapping
from canter.files import to_disk, write_text
from canter.training.config import TrainConfig, changes, config_of_run, dump_config, load_run_config, rooted
from canter.training.run.checkpoints import CONFIG, RECORD, Checkpoints, checksum, text_checksum
from canter.training.run.reports import RunLog, writing

BEGUN_WITH = "batch_seconds of 0.1"  # key in run.json: Canter 0.1 began the run
CHECKSUM = "checksum"  # key in run.json, over all its other content
LOCK = ".lock"
# Files and folders that a run makes before its first step.
LEFTOVERS = (
    "tokenizer",
    "lengths.arrow",
    "lengths.skipped.jsonl",
    "lengths.arrow.parts",
    "budget.json",
    "augment.json",
    ".cache",
)
KEPT = ("tokenizer", "budget.json", "augment.json")  # those whose checksums are in run.json
REMADE = ("budget.json", "augment.json")  # those of them that --allow-changes may change
Record = dict[str, Any]
"""Content of run.json, whose known keys have these types:"""
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
# What an allowed change of a setting invalidates: keys of run.json and names of files.
STEPS, BATCHES = ("steps", "scheduled", "schedule"), ("batch_limits",)
VOID = {
    "manifest": ("lengths.arrow", "lengths.skipped.jsonl", "lengths.arrow.parts", ".cache", *STEPS, *BATCHES),
    **dict.fromkeys(
        ("text_column", "language_column", "audio_column"),
        ("lengths.arrow", "lengths.skipped.jsonl", "lengths.arrow.parts", ".cache", *STEPS, *BATCHES),
    ),
    "budget": ("budget.json", *STEPS, *BATCHES),
    "augment.noise": ("augment.json",),
    "augment.rir": ("augment.json",),
    "batch_seconds": BATCHES,
    "min_steps": BATCHES,
    "steps": (*STEPS, "timed"),
    "minutes": (*STEPS, "timed"),
    "epochs": STEPS,
    "precision": ("precision",),
    "micro_batches_per_step": ("micro_batches_per_step", *BATCHES),
}
FIXED = ("tokenizer", "vocab_size", "init", "model.", "lora.")  # settings that the weights depend on


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run, new or resumed. Only rank 0 writes (``writes``)."""

    folder: Path
    writes: bool = True
    changed: tuple[str, ...] = ()
    """Allowed changes of settings since the last start, as 'name: before -> now'."""
    config: Mapping[str, object] | None = None
    """Current settings, as run.json keeps them."""

    @classmethod
    def open(cls, config: TrainConfig, writes: bool = True) -> "RunFolder":
        """Make the folder ``config.output``, or open the run that it holds.

        Raises ConfigError if the folder cannot be written, holds something else or a run of another configuration, or
        does not hold the run that rank 0 has begun, and CheckpointError if its run.json is damaged.
        """
        folder = config.output
        if not writes:
            if not (folder / CONFIG).exists():
                raise ConfigError(
                    f"{folder} on {os.uname().nodename} does not hold the run that rank 0 has begun; the run folder "
                    "must be on a disk that all machines share, at the same path"
                )
            return cls(folder, writes=False)
        held, config = folder / CONFIG, rooted(config)
        # --allow-changes holds for one start only
        settings = dataclasses.replace(config, allow_changes=False)
        changed: list[tuple[str, object, object]] = []
        record = read_record(folder)
        if record:
            if "config" in record:
                before = config_of_run(record["config"], str(folder / RECORD))
            else:  # an older Canter wrote it
                before = load_run_config(held)
            changed = changes(config, rooted(before))
            _refuse(folder, changed, config.allow_changes)
            _invalidate(folder, record, [name for name, _, _ in changed], to_mapping(settings))
        elif held.exists():  # an earlier start ended here: its files may belong to other data
            _remove(folder, LEFTOVERS)
        else:
            _refuse_other_content(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(held, dump_config(settings))
            (folder / "checkpoints").mkdir(exist_ok=True)
        changes_made = tuple(f"{name}: {before} -> {now}" for name, before, now in changed)
        return cls(folder, changed=changes_made, config=to_mapping(settings))

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return Checkpoints(self.folder / "checkpoints", 1).complete()

    @property
    def log(self) -> RunLog:
        """Log files of the run."""
        return RunLog(self.folder, self.writes)

    def recorded(self) -> Record:
        """Return the content of run.json, empty for a new run. Raise CheckpointError as `read_record`."""
        return read_record(self.folder)

    def verify(self, allow_changes: bool, warn: Callable[[str], None] = lambda _: None) -> None:
        """Compare tokenizer, budget and list of noise with their checksums in run.json.

        Raises CheckpointError for a file that has changed; if changes are allowed, a changed budget or list of noise is
        only a warning.
        """
        for name, expected in self.recorded().get("files", {}).items():
            path = self.folder / name
            what = "missing" if not path.is_file() else "changed" if checksum(path) != expected else None
            if what is None:
                continue
            if name in REMADE and allow_changes:
                warn(f"{path} is {what} since the run began; the steps from here on follow it")
                continue
            copies = [one / path.name for one in reversed(self.checkpoints) if (one / path.name).exists()]
            way = f"copy {copies[0]} there" if copies and path.parent != self.folder else "restore it"
            also = "; --allow-changes uses it as it is" if name in REMADE else ""
            raise CheckpointError(f"{path} is {what} since the run began, and its steps would be others: {way}{also}")

    def record(self, values: Record) -> None:
        """Write run.json, with the checksums of tokenizer, budget and list of noise."""
        if not self.writes:
            return
        for name in LEFTOVERS:  # the files that decisions rest on must survive a power cut too
            for path in (self.folder / name, *(self.folder / name).glob("**/*")):
                to_disk(path)
        files = sorted(
            path for name in KEPT for path in (self.folder / name, *(self.folder / name).glob("**/*")) if path.is_file()
        )
        values = dict(values) | {"files": {str(path.relative_to(self.folder)): checksum(path) for path in files}}
        if self.config is not None:
            values["config"] = self.config
        with writing(self.folder / RECORD):
            _write_record(self.folder, values)


@contextmanager
def claimed(folder: Path, seconds: float = 10.0) -> Iterator[None]:
    """Context manager that makes ``folder`` and locks it against other processes.

    Waits ``seconds`` for a process that has the lock: the children of a killed launcher need a moment to end. Raises
    ConfigError if one still has it, or the folder cannot be written.
    """
    if not any((folder / name).exists() for name in (CONFIG, RECORD)):
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
                    f"{folder}: another process ({holder}) trains there; wait for it, stop it, or choose another "
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
        # otherwise the file system has no locks
    return True


def _refuse_other_content(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(not n.startswith(".") for n in os.listdir(folder))):
        raise ConfigError(f"{folder} exists and is not a run; choose another --output")


def _refuse(folder: Path, changed: list[tuple[str, object, object]], allowed: bool) -> None:
    lines = [f"{name}: {before} -> {now}" for name, before, now in changed]
    fixed = [line for (name, _, _), line in zip(changed, lines) if name.startswith(FIXED)]
    if fixed:
        raise ConfigError(
            f"{folder} holds a run of another configuration ({'; '.join(lines)}), and {'; '.join(fixed)} would make "
            "its weights useless; choose another --output, or set these as they were"
        )
    if lines and not allowed:
        raise ConfigError(
            f"{folder} holds a run of another configuration ({'; '.join(lines)}); choose another --output, "
            "remove the folder, set these as they were, or use the new ones with --allow-changes"
        )


def _invalidate(folder: Path, record: Record, changed: Sequence[str], config: Mapping[str, object]) -> None:
    """Remove decisions and files that follow from changed settings, and record the new settings."""
    void = {name for setting in changed for name in VOID.get(setting, ())}
    if changed or "config" in record:
        kept = {key: value for key, value in record.items() if key not in void}
        if "files" in kept:
            kept["files"] = {name: one for name, one in kept["files"].items() if name not in void}
        if "config" in record:
            kept["config"] = config
        with writing(folder / RECORD):
            _write_record(folder, kept)
    _remove(folder, sorted(void - record.keys()))


def _write_record(folder: Path, values: Mapping[str, object]) -> None:
    text = json.dumps({name: value for name, value in values.items() if name != CHECKSUM}, indent=2)
    write_text(folder / RECORD, json.dumps(json.loads(text) | {CHECKSUM: text_checksum(text)}, indent=2) + "\n")


def read_record(folder: Path) -> Record:
    """Return the content of run.json, empty if there are neither run.json nor checkpoints.

    Raises CheckpointError if it is damaged, or missing beside checkpoints, and names a copy.
    """
    path = folder / RECORD
    checkpoints = Checkpoints(folder / "checkpoints", 1).complete()
    if not path.exists() and not checkpoints:
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not values:
            raise ValueError("not a JSON object")
        stated = values.pop(CHECKSUM, None)
        if stated is not None and stated != text_checksum(json.dumps(values, indent=2)):
            raise ValueError("its checksum differs")
        for name, kind in TYPES.items():
            value = values.get(name)
            if name in values and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"{name} is {value!r}")
            if isinstance(value, int) and value < (name != "timed"):
                raise ValueError(f"{name} is {value!r}")
        return values
    except (OSError, ValueError, RecursionError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        copies = [one / "training" / RECORD for one in reversed(checkpoints)]
        copy = next((one for one in copies if one.exists()), None)
        way = f"copy {copy} there" if copy else "restore it from a copy"
        if not checkpoints:
            way = "remove it: no checkpoint was saved yet, and the same command starts the run again"
        raise CheckpointError(f"{path} {why}; {way}") from None


def is_first_version(record: Record) -> bool:
    """Return whether Canter 0.1 began the run of this record."""
    return BEGUN_WITH in record or (bool(record) and "batches" not in record)


def with_first_batch_seconds(config: TrainConfig, events: Events[Never] = QUIET) -> TrainConfig:
    """Return ``config`` with the --batch-seconds of a run that Canter 0.1 began, if it is 'auto'.

    The default of 0.1 was another, and the steps of the run must stay the same.
    """
    record = read_record(config.output)
    if config.batch_seconds != "auto" or not is_first_version(record):
        return config
    if BEGUN_WITH not in record:
        held = config.output / CONFIG
        try:
            record[BEGUN_WITH] = yaml.safe_load(held.read_text(encoding="utf-8")).get("batch_seconds", 24.0)
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"{held} cannot be read: {' '.join(str(error).split())}; restore it") from None
    begun = record[BEGUN_WITH]
    events.message(f"--batch-seconds {'none' if begun is None else begun}, with which the run began under Canter 0.1")
    return dataclasses.replace(config, batch_seconds=begun)


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
