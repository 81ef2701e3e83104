"""A model trained by PyTorch Lightning under a plan.

python examples/lightning_module.py --model MODEL --manifest train.jsonl --output FOLDER [--devices 4]

MODEL is whatever canter.load_model reads. Run it again with more --steps, and it goes on where it stopped, on any
number of devices. FOLDER/model is what it leaves.
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
from canter.corpus.build import build_index
from canter.corpus.index import LengthIndex
from canter.integrations.lightning import PlanDataModule, PlanModule
from canter.models.checkpoint import save_model
from canter.planning import Budget, Plan
from canter.training.data import MicroBatches


@dataclass(frozen=True)
class Options:
    model: Path
    """Model to start from."""
    manifest: Path
    """Training data."""
    output: Path
    """Checkpoints, the length index, the finished model."""
    steps: int = 1000
    """Updates in all."""
    save_every: int = 500
    """Updates between checkpoints."""
    learning_rate: float = 1e-5
    """Constant after 100 updates."""
    batch_seconds: float = 60.0
    """Audio in a micro-batch, padding included: what the memory holds."""
    micro_batches: int = 1
    """In an update, over all devices."""
    devices: int = 1
    """Processes, each with a device of its own."""
    workers: int = 0
    """Processes that decode audio ahead, of each device."""


def main(options: Options) -> None:
    model = canter.load_model(options.model).train()
    if getattr(model.config.features, "pad_seconds", 0):
        model.set_features(pad_seconds=0.0)  # Whisper at the utterances' lengths, not at 30 s each

    # the plan: how long every utterance and its text are, and how much fits in a micro-batch
    lengths = options.output / "lengths.arrow"
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # Lightning starts the others from `fit`
        options.output.mkdir(parents=True, exist_ok=True)
        build_index([options.manifest], lengths, model.tokenizer, prompt_tokens=10)
    index = LengthIndex.open(lengths)
    budget = Budget.from_batch_seconds(options.batch_seconds, frame_seconds=model.frame_seconds)
    plan = Plan(index, budget, micro_batches_per_step=options.micro_batches)
    # no alphabet: the attention decoder alone is trained; what is longer than the model takes is left out and named
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
    # of a state after the update, which is what resuming wants
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
        save_model(model, options.output / "model")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
