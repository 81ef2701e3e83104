"""Defaults that depend on the situation: from scratch or fine-tuning, CPU or GPU. docs/training.md has them in a table,
`canter train` prints what they are, and --print-config writes them out."""

import dataclasses
import math
import os
from pathlib import Path

from canter.training.config import TrainConfig, changes, dump_config, rooted

# What --batch-seconds auto aims at (docs/training.md has the measurement).
EPOCH_STEPS = 50  # optimiser steps an epoch, at least
RUN_STEPS = {"scratch": 1000, "init": 200}  # optimiser steps of the run, at least


def decided(config: TrainConfig) -> TrainConfig:
    """Resolve the settings that were left open: fine-tuning and training from scratch have different defaults. All such
    defaults are chosen here, but for the batch, which depends on what is measured (`canter.training.batches`)."""
    scratch, optimizer, loss = config.init is None, config.optimizer, config.loss
    matrices = "muon" if scratch and config.parallel != "shard" else "adamw"
    name = matrices if optimizer.name == "auto" else optimizer.name
    rate = (2e-3 if scratch else 3e-5) if optimizer.learning_rate is None else optimizer.learning_rate
    weight = (0.3 if scratch else 0.0) if loss.ctc_weight is None else loss.ctc_weight
    alone = (0.2 if scratch and weight else 0.0) if loss.ctc_warmup is None else loss.ctc_warmup
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(optimizer, name=name, learning_rate=rate),
        loss=dataclasses.replace(loss, ctc_weight=weight, ctc_warmup=alone),
    )


def least_steps(config: TrainConfig) -> int:
    """Return the number of optimiser steps that an epoch should have with --batch-seconds auto: ``EPOCH_STEPS``, more
    where the run's epochs would not make ``RUN_STEPS`` of that."""
    if config.steps is not None or config.minutes is not None:
        return EPOCH_STEPS
    run = RUN_STEPS["scratch" if config.init is None else "init"]
    return max(EPOCH_STEPS, math.ceil(run / config.epochs))


def describe_defaults(config: TrainConfig) -> str:
    """Return a line with the settings that ``decided`` chooses for this situation; empty where none was left open."""
    chosen = [f"--{name.replace('_', '-')} {value}" for name, _, value in changes(decided(config), config)]
    situation = "training from scratch" if config.init is None else "fine-tuning"
    return f"defaults for {situation}: {', '.join(chosen)}" if chosen else ""


def print_config(config: TrainConfig, device: str) -> str:
    """Return the configuration as YAML with unset options resolved, paths absolute, and a comment behind each setting
    that is decided by measurement or by the data. ``device`` is what 'auto' stands for here. Training with it is
    training with ``config``."""
    config = rooted(decided(config))
    config = dataclasses.replace(config, output=Path(os.path.abspath(config.output)))
    scratch, timed = config.init is None, "measured at the start"
    comments = {
        "steps": (
            config.steps,
            "epochs x steps of an epoch" if config.minutes is None else f"from minutes, {timed}",
        ),
        "budget": (config.budget, timed),
        "tokenizer": (config.tokenizer, "trained on the transcripts" if scratch else "the checkpoint's"),
        "mixing": (config.mixing, "1" if config.strategy == "balanced" else ""),
        "micro_batches_per_step": (config.micro_batches_per_step, "one for each rank at the first start"),
        "threads": (config.threads, f"one, or one a core, {timed}" if device == "cpu" else ""),
        "save_every": (config.save_every, "as valid_every"),
        "pad_seconds": (config.pad_seconds, "" if scratch else "the checkpoint's own"),
    }
    told = {name: what for name, (value, what) in comments.items() if value is None and what}
    if config.epochs and (config.steps or config.minutes):
        told["epochs"] = "not used: steps decides" if config.steps else "not used: minutes decides"
    if config.batch_seconds == "auto":
        told["batch_seconds"] = f"the memory budget, less where a run has few updates; {timed}"
        if config.min_steps is None:
            told["min_steps"] = f"{least_steps(config)}, more with minutes; by batch_seconds: auto"
    if config.batch_seconds is None:
        told["batch_seconds"] = "none: the memory budget alone"
    if config.precision == "auto":
        told["precision"] = f"the faster of float32 and bf16, {timed}"
    if config.device == "auto":
        told["device"] = f"{device} on this machine"
    return dump_config(config, told)
