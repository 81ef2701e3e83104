"""Train a model on a manifest, or resume the run in the output folder.

With a file, `canter train CONFIG.yaml [--flag value ...]`, whose settings flags override; without one, `canter train
--manifest train.jsonl --valid valid.jsonl --output runs/x`.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from canter.corpus.manifest import expand_shards
from canter.errors import ConfigError
from canter.training.config import TrainConfig, load_config
from canter.training.defaults import print_config

Options = TrainConfig


def parse(arguments: Sequence[str]) -> TrainConfig | None:
    """Return the configuration that file and flags give; None where it was only to be printed."""
    from canter.cli.options import parse as fill

    rest = list(arguments)
    printing = "--print-config" in rest
    if printing:
        rest.remove("--print-config")
    file = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    folder = file if file is not None and (file / "config.yaml").exists() else None
    if folder is not None:  # a run's: go on with it, wherever it is by now
        default = load_config(folder / "config.yaml", relative=False)
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
        from canter.models.device import choose_device

        sys.stdout.write(print_config(config, choose_device(config.device).type))
        return None
    return config


def _refuse_missing(folder: Path, config: TrainConfig) -> None:
    """Raises ConfigError for data of a run that is no longer where it was."""
    for name in ("manifest", "valid"):
        for path in getattr(config, name):
            files = expand_shards(str(path).partition("::")[0])
            missing = next((file for file in files if "*" not in file and not os.path.exists(file)), None)
            if missing is not None:
                allowed = " --allow-changes" if name == "manifest" else ""
                raise ConfigError(
                    f"{missing}: no such file, the --{name} of {folder}; if it was moved, 'canter train {folder} "
                    f"--{name} FILE{allowed}' names it anew"
                )


def run(config: TrainConfig | None) -> None:
    if config is None:
        return
    from canter.cli.progress import TrainingProgress, say, track
    from canter.loading import load_module
    from canter.training.run.checkpoints import Checkpoints
    from canter.training.session import train

    finished = train(config, TrainingProgress, say, track, load_module)
    if not finished.first:
        return
    progress, run_ = finished.progress, finished.prepared.run
    hours = progress.audio_seconds / 3600
    say(
        f"done: {progress.step} steps, {hours:.2f} h of audio in {progress.seconds / 60:.1f} min "
        f"({progress.audio_seconds / progress.seconds:.0f} h/h), {progress.skipped} skipped"
    )
    best = Checkpoints(run_.folder / "checkpoints", 1).best()
    if best:
        scored = f"BLEU {best['bleu']:.1f}" if "bleu" in best else f"WER {best['wer']:.1%}"
        say(f"best: {run_.folder}/checkpoints/{best['checkpoint']}, validation {scored}")
    say(f"next: canter transcribe {run_.folder} FILES..., canter report {run_.folder}")
