"""The checkpoints of a run: copied in a moment, written by a thread beside the next steps, whole or not at all, and
verified by their checksums before a run goes on from them."""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from canter.errors import CanterError, CheckpointError
from canter.models.checkpoint import read_weights, save_model
from canter.models.files import read_tensors
from canter.models.model import SpeechModel
from canter.text import Characters

STATE, OPTIMIZERS, WEIGHTS = "state.json", "optimizers.pt", "weights.safetensors"
CHECKSUMS = "checksums.json"
BEST = "best.json"
DAMAGED = ".damaged-"
NAME = re.compile(r"step-\d+")


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run goes on from, in this process's memory and no longer touched by training."""

    state: dict[str, Any]
    """JSON; ``state["step"]`` names the checkpoint."""
    weights: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    average: dict[str, Tensor] | None = None
    """The weights' moving average, where there is one: it is the checkpoint's model, and ``weights`` lie beside."""


class Checkpoints:
    """Checkpoints in ``folder``, at most ``keep`` besides the best."""

    def __init__(self, folder: Path, keep: int, logs: Sequence[Path] = ()):
        self.folder, self.keep, self.logs = folder, keep, logs
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: list[Future] = []

    # -- writing --

    def save(self, snapshot: Snapshot, model: SpeechModel, characters: Characters | None) -> None:
        """Hands the snapshot to the writing thread, once the one before is on disk. ``model`` gives shape and
        tokenizer only. Raises CanterError where an earlier one could not be written."""
        self.wait()
        self.pending.append(self.thread.submit(self._write, snapshot, model, characters))

    def is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a validation is at least as good as the best so far: by BLEU where it has that, else by WER. One of
        other utterances, or scored in the other way, cannot be compared, and a new best begins."""
        best = self.best()
        if best is None or best.get("set", metrics["set"]) != metrics["set"]:
            return True
        if ("bleu" in best) != ("bleu" in metrics):
            return True
        return metrics["bleu"] >= best["bleu"] if "bleu" in best else metrics["wer"] <= best["wer"]

    def set_best(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Marks the checkpoint of ``step``, once it is written, as the best so far; returns when that is on disk."""
        kept = {name: metrics[name] for name in ("wer", "bleu", "set") if name in metrics}
        content = json.dumps({"checkpoint": self.path(step).name, **kept}) + "\n"

        def write() -> None:
            write_whole(self.folder / BEST, content)
            self._prune()  # the one that was best

        self.pending.append(self.thread.submit(write))
        self.wait()

    def wait(self) -> None:
        """Until all is on disk."""
        pending, self.pending = self.pending, []
        for one in pending:
            try:
                one.result()
            except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
                told = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
                raise CanterError(
                    f"{self.folder}: the checkpoint could not be written ({told}); the one before is whole: make room "
                    "there, and the same command goes on from it"
                ) from error

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _write(self, snapshot: Snapshot, model: SpeechModel, characters: Characters | None) -> None:
        final = self.path(snapshot.state["step"])
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_model(model, partial, weights=snapshot.average or snapshot.weights)
        if characters is not None:
            characters.save(partial)
        beside = partial / "training"
        beside.mkdir()
        torch.save(snapshot.optimizers, beside / OPTIMIZERS)
        if snapshot.average is not None:
            save_file({k: v.contiguous() for k, v in snapshot.weights.items()}, beside / WEIGHTS)
        write_whole(beside / STATE, json.dumps(snapshot.state, indent=2) + "\n")
        sums = {
            str(file.relative_to(partial)): checksum(file) for file in partial.rglob("*") if file.is_file()
        }
        write_whole(beside / CHECKSUMS, json.dumps(sums, indent=2, sort_keys=True) + "\n")
        for file in (*partial.rglob("*"), partial, *self.logs):
            to_disk(file)
        replaced = final.with_name(f".{final.name}.replaced")
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        to_disk(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        best = self.best()
        for old in self.whole()[: -self.keep]:
            if best is None or old.name != best["checkpoint"]:
                gone = old.with_name(f".{old.name}.gone")  # so that a half of it is never taken for one
                old.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

    # -- reading --

    def whole(self) -> list[Path]:
        """Checkpoints that were written to their end, oldest first."""
        found = [path.parent.parent for path in self.folder.glob(f"step-*/training/{STATE}")]
        return sorted(
            (path for path in found if NAME.fullmatch(path.name)), key=lambda path: int(path.name[5:])
        )

    def best(self) -> dict[str, Any] | None:
        """{"checkpoint", "wer", "set"}, and "bleu" of translations, of the best validation so far."""
        path = self.folder / BEST
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def tidy(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Removes what a killed run left half-written, and sets aside newest checkpoints that are damaged, saying
        so: the one before then is the newest."""
        for left in (*self.folder.glob(".step-*"), *self.folder.glob("..step-*")):
            shutil.rmtree(left, ignore_errors=True)
        for folder in reversed(self.whole()):
            problem = damage(folder)
            if problem is None:
                return
            aside = folder.with_name(f"{DAMAGED}{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            before = self.whole()
            onward = f"going on from {before[-1].name}" if before else "starting from the first step"
            say(f"{folder} is damaged ({problem}), put aside as {aside.name}; {onward}")


def read_snapshot(folder: Path, model: Any = None) -> Snapshot:
    """A checkpoint's training state; ``model`` is what it belongs to, by default one of ours. Raises CheckpointError
    where it is damaged; nothing is unpickled but plain tensors and numbers.
    """
    beside = folder / "training"
    try:
        state = json.loads((beside / STATE).read_text(encoding="utf-8"))
        optimizers = torch.load(beside / OPTIMIZERS, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{beside}: training state is damaged ({str(error)[:200]}); remove {folder} to go on from the one before it"
        ) from None
    weights = read_weights(folder, model)
    if (beside / WEIGHTS).exists():
        return Snapshot(state, read_tensors(beside / WEIGHTS), optimizers, weights)
    return Snapshot(state, weights, optimizers)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where each is as it was written, or none has a checksum."""
    listed = folder / "training" / CHECKSUMS
    if not listed.exists():
        return None
    try:
        sums = json.loads(listed.read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if checksum(folder / name) != expected:
                return f"{name} is not as it was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{getattr(error, 'filename', None) or listed.name} cannot be read"
    return None


def checksum(path: Path) -> str:
    """32 hex digits over a file's bytes (BLAKE2b)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_whole(path: Path, content: str) -> None:
    """Writes a text file so that it is there whole or as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Has the system write a file or a folder's entries out; nothing where there is none."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
