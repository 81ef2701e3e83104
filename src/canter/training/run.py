"""The folder of a training run.

config.yaml      the configuration in force
run.json         what was settled at the start: steps, precision
lengths.arrow    the length index of the training data
budget.json      measured memory and time of a step
tokenizer/       where one was trained on the way
metrics.jsonl    a line a training step ("kind": "train") and a validation ("kind": "valid")
skipped.jsonl    utterances that could not be used, with the reason
checkpoints/     step-000500/ (a model folder with training/ beside the weights), best.json
report.html      by 'canter report'
"""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from canter.corpus.manifest import Problem
from canter.errors import CheckpointError, ConfigError
from canter.models.checkpoint import save_model
from canter.models.model import SpeechModel
from canter.text import Characters
from canter.training.config import TrainConfig, differences, dump_config, from_mapping

BEST = "best.json"
SETTLED = "run.json"
LEFTOVERS = ("tokenizer", "lengths.arrow", "lengths.skipped.jsonl", "lengths.parts", "budget.json", ".cache")


@dataclass(frozen=True)
class Run:
    """A run's folder; ``open`` makes or continues one."""

    folder: Path

    @classmethod
    def open(cls, config: TrainConfig) -> "Run":
        """Claims ``config.output``, or continues the run that is there.

        Raises ConfigError if the folder cannot be written, holds something else, or a run of another configuration.
        """
        folder = config.output
        held = folder / "config.yaml"
        if (folder / SETTLED).exists():
            before = from_mapping(TrainConfig, yaml.safe_load(held.read_text(encoding="utf-8")), str(held))
            changed = differences(config, before)
            if changed:
                raise ConfigError(
                    f"{folder} holds a run of another configuration ({'; '.join(changed)}); choose another --output, "
                    "remove the folder, or set these as they were"
                )
        elif held.exists():  # of an attempt that got no further: its leftovers may be of other data
            for name in LEFTOVERS:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists and is not a run; choose another --output")
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_whole(held, dump_config(config))
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot write there ({error.strerror}); choose another --output"
            ) from None
        return cls(folder)

    @property
    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(
            path.parent.parent for path in self.folder.glob("checkpoints/step-*/training/state.json")
        )

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def settled(self) -> dict[str, Any]:
        """What an earlier start settled; empty for a new run."""
        path = self.folder / SETTLED
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def settle(self, values: dict[str, Any]) -> None:
        write_whole(self.folder / SETTLED, json.dumps(values, indent=2) + "\n")

    def log(self, **values: Any) -> None:
        """Appends a line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values | {"time": time.time()}, ensure_ascii=False) + "\n")

    def skip(self, problems: list[Problem]) -> None:
        """Appends unusable utterances to skipped.jsonl."""
        if problems:
            with (self.folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
                for p in problems:
                    line = {"file": p.file, "line": p.line, "reason": p.reason}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops what was logged after ``step``: those steps are taken again."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
            write_whole(self.metrics, "".join(kept))

    def save(
        self,
        model: SpeechModel,
        characters: Characters | None,
        state: dict[str, Any],
        optimizers: list[dict],
        keep: int,
    ) -> Path:
        """Writes the checkpoint of ``state["step"]`` whole or not at all, and removes the oldest beyond ``keep``."""
        final = self.folder / "checkpoints" / f"step-{state['step']:06d}"
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_model(model, partial)
        if characters is not None:
            characters.save(partial)
        (partial / "training").mkdir()
        with (partial / "training" / "optimizers.pt").open("wb") as file:
            torch.save(optimizers, file)
            file.flush()
            os.fsync(file.fileno())
        write_whole(partial / "training" / "state.json", json.dumps(state, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        best = self.best()
        for old in self.checkpoints[:-keep]:
            if best is None or old.name != best["checkpoint"]:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def best(self) -> dict[str, Any] | None:
        """{"checkpoint", "wer"} of the best validation so far."""
        path = self.folder / "checkpoints" / BEST
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def set_best(self, checkpoint: Path, wer: float) -> None:
        content = json.dumps({"checkpoint": checkpoint.name, "wer": wer}) + "\n"
        write_whole(self.folder / "checkpoints" / BEST, content)

    def restore(self, checkpoint: Path) -> tuple[dict[str, Any], list[dict]]:
        """State and optimisers of a checkpoint. Raises CheckpointError where they are damaged."""
        folder = checkpoint / "training"
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            optimizers = torch.load(folder / "optimizers.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError, EOFError) as error:
            raise CheckpointError(
                f"{folder}: training state is damaged ({error}); remove {checkpoint} to go on from the one before it"
            ) from None
        return state, optimizers


def write_whole(path: Path, content: str) -> None:
    """Writes a text file so that it is there whole or as it was."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
