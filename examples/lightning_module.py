"""Train a model with PyTorch Lightning under a plan.

python examples/lightning_module.py --model MODEL --manifest train.jsonl --output FOLDER [--devices 4]

MODEL is anything that canter.load takes. To resume, run it again with more --steps, on any number of devices.
FOLDER/model is the trained model.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
import tyro
from pytorch_lightning.callbacks import ModelCheckpoint

import canter
from canter.integrations.lightning import PlanDataModule, PlanModule
from canter.integrations.loop import MicroBatches


@dataclass(frozen=True)
class Options:
    model: Path
    """Model to start from."""
    manifest: Path
    """Training data."""
    output: Path
    """Folder for checkpoints, the length index and the trained model."""
    steps: int = 1000
    """Optimiser steps."""
    save_every: int = 500
    """Optimiser steps between checkpoints."""
    learning_rate: float = 1e-5
    """Learning rate, constant after 100 warm-up steps."""
    batch_seconds: float = 60.0
    """Seconds of audio in a micro-batch, padding included; set it to what fits into memory."""
    micro_batches: int = 1
    """Micro-batches in an optimiser step, over all devices."""
    devices: int = 1
    """Number of devices, each with one process."""
    workers: int = 0
    """Processes that decode audio ahead, for each device."""


def main(options: Options) -> None:
    recognizer = canter.load(options.model, device="cpu", precision="float32")
    model = recognizer.module.train()
    if model.padded_seconds:
        model.set_features(pad_seconds=0.0)  # a Whisper at the utterances' lengths instead of 30 s each

    # the plan, from the lengths of all utterances and transcripts and the size of a micro-batch
    lengths = options.output / "lengths.arrow"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # Lightning starts the other processes in `fit`
        options.output.mkdir(parents=True, exist_ok=True)
        canter.build_index(options.manifest, lengths, tokenizer=model.tokenizer)
    index = canter.LengthIndex.open(lengths)
    budget = canter.Budget.from_batch_seconds(options.batch_seconds, frame_seconds=model.frame_seconds)
    plan = canter.Plan(index, budget, micro_batches_per_step=options.micro_batches)
    # no alphabet: only the attention decoder is trained; utterances longer than the model takes are left out and listed
    data = MicroBatches(
        index,
        model.tokenizer,
        None,
        model.sample_rate,
        longest_seconds=model.longest_seconds,
        most_tokens=model.positions,
    )

    module = PlanModule(
        model,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, options.learning_rate),
        schedule=lambda step: min(1.0, (step + 1) / 100),
    )
    folder = options.output / "checkpoints"
    # checkpoints hold the state after the update, as resuming needs
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    keep = ModelCheckpoint(folder, every_n_train_steps=options.save_every, save_last=True)
    trainer = pl.Trainer(
        max_steps=options.steps,
        devices=options.devices,
        callbacks=[keep],
        logger=False,
        default_root_dir=options.output,
    )
    last = folder / "last.ckpt"
    trainer.fit(
        module,
        datamodule=PlanDataModule(plan, data, workers=options.workers),
        ckpt_path=last if last.exists() else None,
    )
    trainer.save_checkpoint(last)
    if trainer.is_global_zero:
        recognizer.save(options.output / "model")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
