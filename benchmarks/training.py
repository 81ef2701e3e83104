"""The ladder of strategies as training speed: the same model on the same real lengths, audio hours per wall hour of
each strategy, against what the plan predicted.

    python benchmarks/training.py LENGTHS [--minutes 1.5] [--json FILE]

LENGTHS is anything that 'canter index' reads lengths from (Parquet with 'duration' and 'tokens', a manifest). Audio is
noise of those lengths, made in place, so that nothing but training is timed: features, forward, backward, update. The
budget is measured once and shared; strategies take turns of some steps, so that whatever else the machine does meets
all of them, and are compared on audio hours per hour of their own time. Fixed batch sizes are what the longest
utterances leave room for.
"""

import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from canter.corpus.build import build_index
from canter.corpus.index import LengthIndex
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.model import Batch, ModelConfig, SpeechModel
from canter.models.norm import merge_pending
from canter.planning.budget import Budget
from canter.planning.plan import Plan
from canter.training.config import LossConfig, OptimizerConfig, TrainConfig
from canter.training.measure import training_step
from canter.training.optimizers import Optimizers
from canter.tuning.fit import measure_budget

STRATEGIES = ("random", "duration", "bucket_1d", "bucket_2d", "balanced")


@dataclass(frozen=True)
class Options:
    lengths: tyro.conf.Positional[Path]
    minutes: float = 1.5
    """Of training for each strategy."""
    memory: float = 4.0
    """GB that a micro-batch may use, as the budget's limit."""
    longest: float = 30.0
    """Utterances of more seconds are left out."""
    most: int = 20_000
    """Utterances taken, evenly spread."""
    width: int = 144
    layers: tuple[int, int] = (6, 2)
    """Of encoder and decoder."""
    vocabulary: int = 1024
    threads: int = 2
    turn: int = 4
    """Steps of a turn."""
    seed: int = 0
    json: Path | None = None
    """File for the figures."""


def model_of(options: Options) -> SpeechModel:
    encoder, decoder = options.layers
    wide = options.width
    torch.manual_seed(options.seed)
    return SpeechModel(
        ModelConfig(
            features=FeatureConfig(),
            encoder=FastConformerConfig(
                layers=encoder, width=wide, heads=4, feedforward=4 * wide, subsampling_channels=64
            ),
            decoder=DecoderConfig(
                layers=decoder, width=wide, heads=4, feedforward=4 * wide, vocabulary=options.vocabulary
            ),
        )
    )


def lengths_of(options: Options) -> LengthIndex:
    whole = build_index([options.lengths], None)
    seconds, tokens = np.asarray(whole.seconds), np.asarray(whole.tokens)
    rows = np.flatnonzero((seconds <= options.longest) & (tokens >= 2) & (tokens <= 480))
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), options.most)).astype(int)]
    return LengthIndex(seconds[rows], tokens[rows])


def batch_of(index: LengthIndex, rows: np.ndarray, model: SpeechModel, noise: torch.Tensor) -> Batch:
    rate = model.config.features.sample_rate
    samples = torch.tensor(np.round(index.seconds[rows] * rate).astype(np.int64))
    tokens = torch.tensor(index.tokens[rows].astype(np.int64))
    size = len(rows)
    audio = noise[: int(samples.max())].repeat(size, 1)
    audio = audio * (torch.arange(audio.shape[1]) < samples[:, None])
    one = torch.ones(size, dtype=torch.long)
    return Batch(
        audio,
        samples,
        torch.randint(3, model.config.decoder.vocabulary, (size, int(tokens.max()))),
        tokens,
        one,
        one[:, None],
        one,
        torch.from_numpy(rows),
    )


class Arm:
    """A strategy's own model and optimiser, going through its plan."""

    def __init__(self, name: str, options: Options, index: LengthIndex, budget: Budget, noise: torch.Tensor):
        self.name, self.index, self.noise = name, index, noise
        self.model = model_of(options).train()
        self.optimizers = Optimizers(self.model, OptimizerConfig(name="adamw", learning_rate=1e-4), 100_000)
        self.plan = Plan(index, budget, name, seed=options.seed)
        self.steps = self.walk()
        self.seconds, self.predicted, self.audio, self.padded, self.taken, self.utterances = (
            0.0,
            0.0,
            0.0,
            0.0,
            0,
            0,
        )

    def walk(self) -> Iterator[tuple[Plan, Any, list[np.ndarray]]]:
        for epoch in count():
            plan = self.plan.at_epoch(epoch)
            for before, _, rows in plan.walk():
                yield plan, before, rows

    def step(self, timed: bool = True) -> None:
        plan, before, micro_batches = next(self.steps)
        batches = [batch_of(self.index, rows, self.model, self.noise) for rows in micro_batches]
        start = time.perf_counter()
        for batch in batches:
            loss = self.model.loss(batch)
            (loss.attention / loss.attention_count).backward()
        merge_pending(self.model)
        self.optimizers.step(self.taken)
        taken = time.perf_counter() - start
        if timed:
            self.seconds += taken
            self.predicted += float(plan.step_seconds(before.window, before.step).sum())
            for rows in micro_batches:
                self.audio += float(self.index.seconds[rows].sum())
                self.padded += float(self.index.seconds[rows].max()) * len(rows)
                self.utterances += len(rows)
            self.taken += 1

    def figures(self) -> dict[str, Any]:
        return {
            "audio_hours_per_hour": self.audio / self.seconds,
            "predicted": self.audio / self.predicted,
            "padding": 1 - self.audio / self.padded,
            "mean_batch": self.utterances / self.taken,
            "steps": self.taken,
            "seconds": self.seconds,
            "left_out": len(self.plan.left_out()),
        }


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    index = lengths_of(options)
    model = model_of(options)
    config = TrainConfig(
        optimizer=OptimizerConfig(name="adamw"),
        loss=LossConfig(ctc_weight=0.0, ctc_alone=0.0),
        threads=options.threads,
    )
    frames = np.maximum(1, np.ceil(index.seconds / model.frame_seconds)).astype(np.int64)
    budget = measure_budget(
        training_step(config, model, "float32", prompt=1),
        frames,
        np.asarray(index.tokens),
        limit_bytes=options.memory * 1e9,
        batch_frames=int(120 / model.frame_seconds),
        frame_seconds=model.frame_seconds,
        measured_on={"model": "benchmark", "device": "cpu", "threads": options.threads},
    )
    noise = 0.1 * torch.randn(round(options.longest * 16000) + 1)
    arms = [Arm(name, options, index, budget, noise) for name in STRATEGIES]
    for arm in arms:
        arm.step(timed=False)
    while any(arm.seconds < options.minutes * 60 for arm in arms):
        for arm in arms:
            for _ in range(options.turn):
                if arm.seconds < options.minutes * 60:
                    arm.step()
    result = {
        "lengths": options.lengths.name,
        "utterances": len(index),
        "hours": float(index.seconds.sum()) / 3600,
        "machine": {
            "processor": platform.processor(),
            "threads": options.threads,
            "torch": torch.__version__,
        },
        "strategies": {arm.name: arm.figures() for arm in arms},
    }
    table = Table("strategy", "audio h/h", "predicted", "padding", "mean batch", "steps", "against random")
    base = result["strategies"]["random"]["audio_hours_per_hour"]
    for name, row in result["strategies"].items():
        rate = row["audio_hours_per_hour"]
        table.add_row(
            name,
            f"{rate:.0f}",
            f"{row['predicted']:.0f}",
            f"{row['padding']:.1%}",
            f"{row['mean_batch']:.1f}",
            str(row["steps"]),
            f"{rate / base:.2f}x",
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
