"""The checkpoints of a run: copied in a moment, written by a thread beside the next steps, whole or not at all, and
verified by their checksums before a run goes on from them."""

import hashlib
import json
import os
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
from canter.files import replacing_folder, to_disk, write_text
from canter.loading import read_weights, save_module
from canter.models.formats.files import read_tensors
from canter.models.formats.torchfile import load_saved
from canter.models.model import SpeechModel
from canter.text import Characters

STATE, OPTIMIZERS, WEIGHTS = "state.json", "optimizers.pt", "weights.safetensors"
CHECKSUMS = "checksums.json"
VERIFIED = "checksums"  # in the state: the checkpoint was written with checksums
CONFIG, SETTLED = "config.yaml", "run.json"  # of the run, of which each checkpoint has a copy
BEST = "best.json"
DAMAGED = ".damaged-"
MOST_OPERATIONS = 10_000_000  # opcodes of the optimisers' pickle: a tensor takes about 45
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
            write_text(self.folder / BEST, content)
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
                if "inline_container" in told:  # torch's, which does not say why a file could not be written whole
                    told = "torch could not write a file whole; is the disk full?"
                whole = self.whole()
                onward = (
                    f"the one before is whole ({whole[-1].name}): make room there, and the same command goes on from it"
                    if whole
                    else "none was saved before it: make room there, and the same command starts from the first step"
                )
                raise CanterError(f"{self.folder}: the checkpoint could not be written ({told}); {onward}") from error

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _write(self, snapshot: Snapshot, model: SpeechModel, characters: Characters | None) -> None:
        with replacing_folder(self.path(snapshot.state["step"])) as partial:
            self._fill(partial, snapshot, model, characters)
            for log in self.logs:
                to_disk(log)
        self._prune()

    def _fill(self, partial: Path, snapshot: Snapshot, model: SpeechModel, characters: Characters | None) -> None:
        """Write the files of a checkpoint."""
        save_module(model, partial, weights=snapshot.average or snapshot.weights)
        if characters is not None:
            characters.save(partial)
        beside = partial / "training"
        beside.mkdir()
        torch.save(snapshot.optimizers, beside / OPTIMIZERS)
        if snapshot.average is not None:
            save_file({k: v.contiguous() for k, v in snapshot.weights.items()}, beside / WEIGHTS)
        for name in (CONFIG, SETTLED):
            if (self.folder.parent / name).is_file():
                shutil.copyfile(self.folder.parent / name, beside / name)
        write_text(beside / STATE, json.dumps(snapshot.state | {VERIFIED: True}, indent=2) + "\n")
        sums = {str(file.relative_to(partial)): checksum(file) for file in partial.rglob("*") if file.is_file()}
        write_text(beside / CHECKSUMS, json.dumps(sums, indent=2, sort_keys=True) + "\n")

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
        return [path for path in self._all() if (path / "training" / STATE).exists()]

    def best(self) -> dict[str, Any] | None:
        """Return {"checkpoint", "wer", "set"}, and "bleu" of translations, of the best validation so far; None without
        any. Raises CheckpointError where the file is damaged."""
        path = self.folder / BEST
        if not path.exists():
            return None
        try:
            best = json.loads(path.read_text(encoding="utf-8"))
            if not NAME.fullmatch(best["checkpoint"]):
                raise ValueError(f"checkpoint is {best['checkpoint']!r}")
            numbers = [best["wer"], *([best["bleu"]] if "bleu" in best else [])]
            if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
                raise ValueError(f"{numbers} are no scores")
            return best
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error!r}); remove it, and the next validation counts as the best, or put it "
                'back: its checkpoint, WER and set are in the "valid" lines of metrics.jsonl'
            ) from None

    def tidy(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Remove what a killed run left half-written, and set aside newest checkpoints that are damaged, saying so:
        the one before then is the newest.

        Raises CheckpointError where none is sound, or best.json is damaged.
        """
        for left in (*self.folder.glob(".step-*"), *self.folder.glob("..step-*")):
            shutil.rmtree(left, ignore_errors=True)
        self.best()
        damaged: list[tuple[Path, str]] = []
        for folder in reversed(self._all()):
            problem = damage(folder)
            if problem is not None:
                damaged.append((folder, problem))
                continue
            if not (folder / "training" / CHECKSUMS).exists():
                say(f"{folder} has no checksums, as an older Canter wrote it: taken without being verified")
            for one, why in damaged:
                aside = one.with_name(f"{DAMAGED}{one.name}")
                shutil.rmtree(aside, ignore_errors=True)
                one.rename(aside)
                say(f"{one} is damaged ({why}), put aside as {aside.name}; going on from {folder.name}")
            return
        if damaged:
            folder, problem = damaged[0]
            raise CheckpointError(
                f"{folder} is damaged ({problem}), and there is no sound checkpoint before it: put its files back from "
                f"a copy, or remove {self.folder} to start from the first step"
            )

    def _all(self) -> list[Path]:
        """All folders with the name of a checkpoint, oldest first."""
        found = [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name[5:]))


def read_snapshot(folder: Path, model: Any = None) -> Snapshot:
    """A checkpoint's training state; ``model`` is what it belongs to, by default one of ours. Raises CheckpointError
    where it is damaged; nothing is unpickled but plain tensors and numbers.
    """
    beside = folder / "training"
    try:
        state = json.loads((beside / STATE).read_text(encoding="utf-8"))
        state.pop(VERIFIED, None)
        with open(beside / OPTIMIZERS, "rb") as file:
            optimizers = load_saved(file, OPTIMIZERS, MOST_OPERATIONS)
        for one in optimizers:
            names = [name for group in one["param_groups"] for name in group["params"]]
            if not all(isinstance(values, dict) for values in one["state"].values()):
                raise ValueError(f"{OPTIMIZERS} holds no optimiser state of {len(names)} parameters")
    except Exception as error:  # what bytes that were changed make torch.load raise is of any kind
        raise CheckpointError(
            f"{beside}: training state is damaged ({' '.join(str(error).split())[:200]}); remove {folder} to go on "
            "from the one before it"
        ) from None
    weights = read_weights(model, folder)
    if (beside / WEIGHTS).exists():
        return Snapshot(state, read_tensors(beside / WEIGHTS), optimizers, weights)
    return Snapshot(state, weights, optimizers)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files; None where each is as it was written, or where an older Canter
    wrote them without checksums."""
    listed, state = folder / "training" / CHECKSUMS, folder / "training" / STATE
    try:
        if not listed.exists():
            held = json.loads(state.read_text(encoding="utf-8"))
            return f"training/{CHECKSUMS} is missing" if VERIFIED in held else None
        sums = json.loads(listed.read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if checksum(folder / name) != expected:
                return f"{name} is not as it was written"
        written = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json", ".pt")]
        for path in written:
            if path != listed and str(path.relative_to(folder)) not in sums:
                return f"{path.relative_to(folder)} has no checksum"
    except FileNotFoundError as error:
        return f"{os.path.relpath(error.filename, folder)} is missing"
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return f"{getattr(error, 'filename', None) or listed.name} cannot be read"
    return None


def checksum(path: Path) -> str:
    """32 hex digits over a file's bytes (BLAKE2b)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def text_checksum(text: str) -> str:
    """32 hex digits over a text (BLAKE2b)."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
