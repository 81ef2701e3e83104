"""Train a model on a manifest, or resume the run in the output folder.

With a file: `canter train CONFIG.yaml [--flag value ...]`; flags override its settings. Without one: `canter train
--manifest train.jsonl --valid valid.jsonl --output runs/x`.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from canter.corpus.manifest import expand_shards
from canter.errors import ConfigError
from canter.training.config import TrainConfig, load_config, load_run_config
from canter.training.defaults import print_config

Options = TrainConfig


def parse(arguments: Sequence[str]) -> TrainConfig | None:
    """Return the configuration from file and flags, or None if --print-config printed it."""
    from canter.cli.options import parse as fill

    rest = list(arguments)
    printing = "--print-config" in rest
    if printing:
        rest.remove("--print-config")
    file = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    folder = file if file is not None and (file / "config.yaml").exists() else None
    if folder is not None:  # a run, which may have been moved: resume it
        default = load_run_config(folder / "config.yaml")
        default = dataclasses.replace(default, output=folder, allow_changes=False)
    else:
        default = load_config(file) if file is not None else TrainConfig()
    description = (
        f"{__doc__}\n\nWith --print-config, print the configuration as YAML and stop; unset options are resolved where "
        "no measurement decides them."
    )
    config = fill(TrainConfig, rest, "canter train [CONFIG.yaml]", description, default)
    if folder is not None:
        _refuse_missing(folder, config)
    if printing:
        from canter.runtime import choose_device

        sys.stdout.write(print_config(config, choose_device(config.device).type))
        return None
    return config


def _refuse_missing(folder: Path, config: TrainConfig) -> None:
    for name in ("manifest", "valid"):
        for path in getattr(config, name):
            files = expand_shards(str(path).partition("::")[0])
            missing = next((file for file in files if "*" not in file and not os.path.exists(file)), None)
            if missing is not None:
                allowed = " --allow-changes" if name == "manifest" else ""
                raise ConfigError(
                    f"{missing}: no such file, the --{name} of {folder}; if it was moved, 'canter train {folder} "
                    f"--{name} FILE{allowed}' gives its new place"
                )


def run(config: TrainConfig | None) -> None:
    if config is None:
        return
    from canter.cli.progress import TerminalEvents
    from canter.training.recipe import run_training
    from canter.training.run.checkpoints import Checkpoints

    events = TerminalEvents()
    finished = run_training(config, events)
    if not finished.first:
        return
    progress, folder = finished.progress, finished.prepared.run.folder
    hours = progress.audio_seconds / 3600
    events.message(
        f"done: {progress.step} steps, {hours:.2f} h of audio in {progress.seconds / 60:.1f} min "
        f"({progress.audio_seconds / max(progress.seconds, 1e-9):.0f} h/h), {progress.skipped} skipped"
    )
    best = Checkpoints(folder / "checkpoints", 1).best()
    if best:
        scored = f"BLEU {best['bleu']:.1f}" if "bleu" in best else f"WER {best['wer']:.1%}"
        events.message(f"best: {folder}/checkpoints/{best['checkpoint']}, validation {scored}")
    events.message(f"next: canter transcribe {folder} FILES..., canter report {folder}")
