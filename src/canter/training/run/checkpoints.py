"""Checkpoints of a run: copied from the training state, written by a thread during the next steps, verified, restored.

A checkpoint appears complete or not at all, and is the same whether ranks share the training state or not.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from canter.errors import CanterError, CheckpointError
from canter.files import replacing_folder, to_disk, write_text
from canter.loading import read_weights, save_module
from canter.models.formats.files import read_tensors
from canter.models.formats.fitting import fit_tensors
from canter.models.formats.torchfile import load_saved
from canter.models.lora import adapter_tensors
from canter.models.protocol import AnyModel, module_of
from canter.ranks import Ranks
from canter.text.characters import Characters
from canter.training.step.optimizers import Average, Optimizers, copy_into

STATE, OPTIMIZERS, WEIGHTS = "state.json", "optimizers.pt", "weights.safetensors"
CHECKSUMS = "checksums.json"
VERIFIED = "checksums"  # key in the state: the checkpoint was written with checksums
CONFIG, RECORD = "config.yaml", "run.json"  # files of the run folder, copied into each checkpoint
BEST, CARD = "best.json", "README.md"
DAMAGED = ".damaged-"
MAX_OPERATIONS = 10_000_000  # opcodes of the optimisers' pickle: a tensor takes about 45
NAME = re.compile(r"step-\d+")
Scores = Mapping[str, Any]
"""Metrics of a validation: "wer", "bleu" if translations are validated, "set" of utterances."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run is resumed from, in CPU memory that training no longer touches."""

    state: dict[str, Any]
    """JSON; ``state["step"]`` names the checkpoint."""
    weights: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    average: dict[str, Tensor] | None = None
    """Moving average of the weights. If there is one, it is the checkpoint's model, and ``weights`` are kept beside."""


class Checkpoints:
    """Checkpoints in ``folder``: the newest ``keep`` and the best. ``written`` is called after each that is written."""

    def __init__(self, folder: Path, keep: int, logs: Sequence[Path] = (), written: Callable[[], None] = lambda: None):
        self.folder, self.keep, self.logs, self.written = folder, keep, logs, written
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: list[Future] = []

    # -- writing --

    def save(self, snapshot: Snapshot, model: AnyModel, characters: Characters | None) -> None:
        """Hand the snapshot to the writing thread, once the one before is on disk.

        ``model`` gives shape and tokenizer only. Raises CanterError if an earlier checkpoint could not be written.
        """
        self.wait()
        self.pending.append(self.thread.submit(self._write, snapshot, model, characters))

    def is_best(self, metrics: Scores) -> bool:
        """Return whether a validation is at least as good as the best so far, by BLEU if it has one, else by WER.

        A validation of other utterances, or with another score, cannot be compared and counts as the best.
        """
        best = self.best()
        if best is None or best.get("set", metrics["set"]) != metrics["set"]:
            return True
        if ("bleu" in best) != ("bleu" in metrics):
            return True
        return metrics["bleu"] >= best["bleu"] if "bleu" in best else metrics["wer"] <= best["wer"]

    def set_best(self, step: int, metrics: Scores, card: str | None = None) -> None:
        """Mark the checkpoint of ``step`` as the best so far, with its model card; return when that is on disk."""
        kept = {name: metrics[name] for name in ("wer", "bleu", "set") if name in metrics}
        content = json.dumps({"checkpoint": self.path(step).name, **kept}) + "\n"

        def write() -> None:
            if card is not None:
                write_text(self.path(step) / CARD, card)
            write_text(self.folder / BEST, content)
            self._prune()  # the former best

        self.pending.append(self.thread.submit(write))
        self.wait()

    def add_card(self, step: int, card: str) -> None:
        """Write the model card of the checkpoint of ``step``, once that is on disk."""
        self.pending.append(self.thread.submit(write_text, self.path(step) / CARD, card))

    def wait(self) -> None:
        """Wait until everything is on disk. Raise CanterError if a checkpoint could not be written."""
        pending, self.pending = self.pending, []
        for one in pending:
            try:
                one.result()
            except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
                if "inline_container" in reason:  # torch does not say why a file could not be written
                    reason = "torch could not write a complete file; is the disk full?"
                complete = self.complete()
                way = (
                    f"the one before is complete ({complete[-1].name}): make room there, and the same command resumes "
                    "from it"
                    if complete
                    else "none was saved before it: make room there, and the same command starts from the first step"
                )
                raise CanterError(f"{self.folder}: the checkpoint could not be written ({reason}); {way}") from error

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _write(self, snapshot: Snapshot, model: AnyModel, characters: Characters | None) -> None:
        with replacing_folder(self.path(snapshot.state["step"])) as partial:
            self._fill(partial, snapshot, model, characters)
            for log in self.logs:
                to_disk(log)
        self._prune()
        self.written()

    def _fill(self, partial: Path, snapshot: Snapshot, model: AnyModel, characters: Characters | None) -> None:
        save_module(model, partial, weights=snapshot.average or snapshot.weights)
        if characters is not None:
            characters.save(partial)
        beside = partial / "training"
        beside.mkdir()
        torch.save(snapshot.optimizers, beside / OPTIMIZERS)
        if snapshot.average is not None:
            save_file({k: v.contiguous() for k, v in snapshot.weights.items()}, beside / WEIGHTS)
        for name in (CONFIG, RECORD):
            if (self.folder.parent / name).is_file():
                shutil.copyfile(self.folder.parent / name, beside / name)
        write_text(beside / STATE, json.dumps(snapshot.state | {VERIFIED: True}, indent=2) + "\n")
        sums = {str(file.relative_to(partial)): checksum(file) for file in partial.rglob("*") if file.is_file()}
        write_text(beside / CHECKSUMS, json.dumps(sums, indent=2, sort_keys=True) + "\n")

    def _prune(self) -> None:
        best = self.best()
        for old in self.complete()[: -self.keep]:
            if best is None or old.name != best["checkpoint"]:
                gone = old.with_name(f".{old.name}.gone")  # a half-removed folder is not taken for a checkpoint
                old.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

    # -- reading --

    def complete(self) -> list[Path]:
        """Return the folders of complete checkpoints, oldest first."""
        return [path for path in self._all() if (path / "training" / STATE).exists()]

    def best(self) -> Scores | None:
        """Return {"checkpoint", "wer", "set"}, and "bleu" of translations, of the best validation so far, if any.

        Raises CheckpointError if the file is damaged.
        """
        path = self.folder / BEST
        if not path.exists():
            return None
        try:
            best = json.loads(path.read_text(encoding="utf-8"))
            if not NAME.fullmatch(best["checkpoint"]):
                raise ValueError(f"checkpoint is {best['checkpoint']!r}")
            numbers = [best["wer"], *([best["bleu"]] if "bleu" in best else [])]
            if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
                raise ValueError(f"{numbers} are not scores")
            return best
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error!r}); remove it, and the next validation counts as the best, or restore it: "
                'its checkpoint, WER and set are in the "valid" lines of metrics.jsonl'
            ) from None

    def tidy(self, warn: Callable[[str], None] = lambda _: None) -> None:
        """Remove what a killed run left unfinished, and set aside newest checkpoints that are damaged.

        The one before then is the newest. Raises CheckpointError if none is intact, or best.json is damaged.
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
                warn(f"{folder} has no checksums, as an older Canter wrote it: used without verification")
            for one, why in damaged:
                aside = one.with_name(f"{DAMAGED}{one.name}")
                shutil.rmtree(aside, ignore_errors=True)
                one.rename(aside)
                warn(f"{one} is damaged ({why}), set aside as {aside.name}; resuming from {folder.name}")
            return
        if damaged:
            folder, problem = damaged[0]
            raise CheckpointError(
                f"{folder} is damaged ({problem}), and there is no intact checkpoint before it: restore its files from "
                f"a copy, or remove {self.folder} to start from the first step"
            )

    def _all(self) -> list[Path]:
        found = [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name[5:]))


def read_snapshot(folder: Path, model: AnyModel) -> Snapshot:
    """Return the training state of a checkpoint of ``model``; only plain tensors and numbers are unpickled.

    Raises CheckpointError if it is damaged.
    """
    beside = folder / "training"
    try:
        state = json.loads((beside / STATE).read_text(encoding="utf-8"))
        state.pop(VERIFIED, None)
        with open(beside / OPTIMIZERS, "rb") as file:
            optimizers = cast("list[dict[str, Any]]", load_saved(file, OPTIMIZERS, MAX_OPERATIONS))
        for one in optimizers:
            names = [name for group in one["param_groups"] for name in group["params"]]
            if not all(isinstance(values, dict) for values in one["state"].values()):
                raise ValueError(f"{OPTIMIZERS} holds no optimiser state of {len(names)} parameters")
    except Exception as error:  # torch.load raises anything for changed bytes
        raise CheckpointError(
            f"{beside}: training state is damaged ({' '.join(str(error).split())[:200]}); remove {folder} to resume "
            "from the one before it"
        ) from None
    weights = read_weights(model, folder)
    if (beside / WEIGHTS).exists():
        return Snapshot(state, read_tensors(beside / WEIGHTS), optimizers, weights)
    return Snapshot(state, weights, optimizers)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files; None if nothing is, or if an older Canter wrote no checksums."""
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
    """Return 32 hex digits over a file's bytes (BLAKE2b)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def text_checksum(text: str) -> str:
    """Return 32 hex digits over a text (BLAKE2b)."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def take_snapshot(
    state: dict[str, object], model: AnyModel, optimizers: Optimizers, average: Average | None, ranks: Ranks
) -> Snapshot | None:
    """Return a copy of the training state on rank 0, None on others. All ranks together gather shards."""
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    if not ranks.first and not sharded:
        return None
    weights = _copied(_trained(model))
    parts = _copied(optimizers.state_dict())
    mean = None
    if average is not None:
        mean = weights | _copied(average.shadow)
    return Snapshot(state, weights, parts, mean) if ranks.first else None


def restore_snapshot(
    snapshot: Snapshot, model: AnyModel, optimizers: Optimizers, average: Average | None, source: Path
) -> None:
    """Copy a snapshot into the training state, on every rank. Raise CheckpointError if shapes differ."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        targets = dict(model.named_parameters()) | dict(module_of(model).named_buffers())
        with torch.no_grad():
            for name, tensor in snapshot.weights.items():
                copy_into(targets[name], tensor)
    else:
        fit_tensors(module_of(model), snapshot.weights, source, _trained(model))
    try:
        optimizers.load_state_dict(_as_parameters(snapshot.optimizers, optimizers, source))
        if average is not None:
            average.load(snapshot.average or snapshot.weights)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{source}: the training state beside it is damaged ({error!r})") from None


def _trained(model: AnyModel) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint holds: those of the adapter, if there is one, else all."""
    return adapter_tensors(module_of(model)) if model.adapter is not None else model.state_dict()


def _copied(value: Any) -> Any:
    """Return nested values with copies of all tensors on the CPU, gathered if they are sharded."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


def _as_parameters(states: list[dict], optimizers: Optimizers, source: Path) -> list[dict]:
    """Return optimiser states whose tensors are sharded like the parameters that they belong to."""
    parameters = {name: parameter for parameter, name in optimizers.names.items()}
    if any(isinstance(number, int) for state in states for number in state["state"]):
        states = _by_name(states, optimizers, source)

    def shared(value: object, parameter: Tensor | None) -> object:
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.ndim:
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        return value

    return [
        state
        | {
            "state": {
                name: {key: shared(value, parameters.get(name)) for key, value in values.items()}
                for name, values in state["state"].items()
            }
        }
        for state in states
    ]


def _by_name(states: list[dict], optimizers: Optimizers, source: Path) -> list[dict]:
    """Return by name the states of a checkpoint of 0.1 that numbers its parameters.

    Raises CheckpointError if they may belong to other parameters than are trained now.
    """
    parameters = {name: parameter for parameter, name in optimizers.names.items()}
    found, numbered = [], optimizers.numbered()
    for state, (optimizer, _), names in zip(states, optimizers.parts, numbered):
        sizes = [[len(group["params"]) for group in one] for one in (state["param_groups"], optimizer.param_groups)]
        shapes = [
            value.shape == parameters[names[number]].shape
            for number, values in state["state"].items()
            if number < len(names)
            for value in values.values()
            if isinstance(value, Tensor) and value.ndim
        ]
        if len(states) != len(numbered) or sizes[0] != sizes[1] or not all(shapes):
            raise CheckpointError(
                f"{source}: the training state, of an older Canter, does not say which parameters it is of, and others "
                "are trained now; resume with --freeze and --optimizer.name as they were, and change them after the "
                "next checkpoint"
            )
        found.append(state | {"state": {names[n]: values for n, values in state["state"].items()}})
    return found
