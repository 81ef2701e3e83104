"""Defaults that depend on other settings: training from scratch or fine-tuning, CPU or GPU.

docs/training.md lists them, `canter train` prints them, and --print-config writes them out.
"""

import dataclasses
import math
import os
from pathlib import Path

from canter.training.config import TrainConfig, changes, dump_config, rooted

# Goals of --batch-seconds auto (docs/training.md has the measurement).
EPOCH_STEPS = 50  # minimum optimiser steps per epoch
TEACHER_WEIGHT = 0.5  # Distil-Whisper has 0.8 beside 1 for the labels, 0.44 of the sum (Gandhi et al., 2023)
LORA_SCALE = 2  # alpha / rank, as in PEFT's example for Whisper (rank 32, alpha 64)
LORA_RATE = 10  # times the learning rate of full fine-tuning (Schulman et al., LoRA Without Regret, 2025)
RUN_STEPS = {"scratch": 1000, "init": 200}  # minimum optimiser steps of a run


def decided(config: TrainConfig) -> TrainConfig:
    """Resolve unset options; fine-tuning and training from scratch have different defaults.

    Batch sizes depend on measurements and are chosen in `canter.training.schedule`.
    """
    scratch, optimizer, loss, lora = config.init is None, config.optimizer, config.loss, config.lora
    matrices = "muon" if scratch and config.parallel != "shard" else "adamw"
    name = matrices if optimizer.name == "auto" else optimizer.name
    chosen = 2e-3 if scratch else 3e-5 * LORA_RATE if lora.rank else 3e-5
    rate = chosen if optimizer.learning_rate is None else optimizer.learning_rate
    alpha = LORA_SCALE * float(lora.rank) if lora.rank and lora.alpha is None else lora.alpha
    weight = (0.3 if scratch else 0.0) if loss.ctc_weight is None else loss.ctc_weight
    warmup = (0.2 if scratch and weight else 0.0) if loss.ctc_warmup is None else loss.ctc_warmup
    teacher = TEACHER_WEIGHT if config.teacher and loss.teacher_weight is None else loss.teacher_weight
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(optimizer, name=name, learning_rate=rate),
        loss=dataclasses.replace(loss, ctc_weight=weight, ctc_warmup=warmup, teacher_weight=teacher),
        lora=dataclasses.replace(lora, alpha=alpha),
    )


def min_epoch_steps(config: TrainConfig) -> int:
    """Return the minimum optimiser steps per epoch of --batch-seconds auto.

    It is ``EPOCH_STEPS``, or more if the run's epochs would otherwise have fewer than ``RUN_STEPS``.
    """
    if config.steps is not None or config.minutes is not None:
        return EPOCH_STEPS
    run = RUN_STEPS["scratch" if config.init is None else "init"]
    return max(EPOCH_STEPS, math.ceil(run / config.epochs))


def describe_defaults(config: TrainConfig) -> str:
    """Return a line with the unset options that `decided` resolves; empty if there are none."""
    chosen = [f"--{name.replace('_', '-')} {value}" for name, _, value in changes(decided(config), config)]
    situation = "training from scratch" if config.init is None else "LoRA" if config.lora.rank else "fine-tuning"
    return f"defaults for {situation}: {', '.join(chosen)}" if chosen else ""


def print_config(config: TrainConfig, device: str) -> str:
    """Return the configuration as YAML, with unset options resolved and absolute paths, which trains alike.

    Settings that follow from measurements or data have a comment. ``device``: the device that 'auto' stands for here.
    """
    config = rooted(decided(config))
    config = dataclasses.replace(config, output=Path(os.path.abspath(config.output)))
    scratch, timed = config.init is None, "measured at the start"
    comments = {
        "steps": (config.steps, "epochs x steps of an epoch" if config.minutes is None else f"from minutes, {timed}"),
        "budget": (config.budget, timed),
        "tokenizer": (config.tokenizer, "trained on the transcripts" if scratch else "the checkpoint's"),
        "mixing": (config.mixing, "1" if config.strategy == "balanced" else ""),
        "micro_batches_per_step": (config.micro_batches_per_step, "one for each rank at the first start"),
        "threads": (config.threads, f"one, or one per core, {timed}" if device == "cpu" else ""),
        "save_every": (config.save_every, "as valid_every"),
        "pad_seconds": (config.pad_seconds, "" if scratch else "the checkpoint's own"),
    }
    notes = {name: what for name, (value, what) in comments.items() if value is None and what}
    if config.epochs and (config.steps or config.minutes):
        notes["epochs"] = "not used: steps decides" if config.steps else "not used: minutes decides"
    if config.batch_seconds == "auto":
        notes["batch_seconds"] = f"the memory budget, less where a run has few updates; {timed}"
        if config.min_steps is None:
            notes["min_steps"] = f"{min_epoch_steps(config)}, more with minutes; by batch_seconds: auto"
    if config.batch_seconds is None:
        notes["batch_seconds"] = "none: the memory budget only"
    if config.precision == "auto":
        notes["precision"] = f"the faster of float32 and bf16, {timed}"
    if config.device == "auto":
        notes["device"] = f"{device} on this machine"
    return dump_config(config, notes)
