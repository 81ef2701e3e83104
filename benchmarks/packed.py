"""Speed, FLOPs and memory of training without padding, against strategies that pad, on real lengths.

    python benchmarks/packed.py LENGTHS ... [--steps 36] [--json FILE]

LENGTHS are indexes or tables with 'duration' and 'tokens'; audio is noise of those lengths. All strategies have the
same model, budget and memory. Of each one's epoch, ``--steps`` steps are taken, spread evenly over its steps sorted by
mean duration, so that they stand for the epoch; strategies take turns step by step, and a ratio of speeds has a
bootstrap interval over steps. Useful FLOPs are those that utterances add to batches of equally long ones, as a fraction
of all. The peak memory of steps is a fraction of what the budget predicts.
"""

import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from ladder import Rig, batch_of, lengths_of
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from canter.corpus.index import LengthIndex
from canter.events import Printed
from canter.models.batch import Batch
from canter.models.model import SpeechModel
from canter.models.norm import frozen_statistics
from canter.planning import Budget, Plan
from canter.reporting.machine import describe_machine
from canter.runtime import keep_freed_memory, peak_of, tensor_bytes
from canter.training.config import LossConfig, OptimizerConfig, TrainConfig
from canter.training.feed.data import Address, Loaded
from canter.training.measure import SyntheticStep
from canter.tuning.fit import fit_budget
from canter.tuning.probe import Prober
from training import Options as Shape
from training import model_of

STRATEGIES = ("random", "bucket_2d", "balanced", "packed")


@dataclass(frozen=True)
class Options:
    lengths: tyro.conf.Positional[tuple[Path, ...]]
    steps: int = 36
    """Steps of each strategy."""
    memory: float = 0.6
    """GB that a step may use, weights included."""
    longest: float = 30.0
    """Maximum seconds of an utterance."""
    width: int = 144
    layers: tuple[int, int] = (6, 2)
    """Number of layers of encoder and decoder."""
    threads: int = 1
    probes: int = 14
    """Number of probes of the budget."""
    json: Path | None = None
    """File for the figures."""


class Arm:
    """A strategy's steps of one micro-batch each, and what they took."""

    def __init__(self, name: str, rig: Rig, index: LengthIndex, budget: Budget, steps: int):
        self.rig, self.index, self.budget = rig, index, budget
        plan = Plan(index, budget, name)
        batches = sorted((step[0] for step in plan), key=lambda rows: float(index.seconds[rows].mean()))
        places = ((np.arange(steps) + 0.5) * len(batches) / steps).astype(int)
        self.batches = [batches[place] for place in places]
        self.predicted = [float(plan.predicted_bytes([rows], budget)[0]) for rows in self.batches]
        self.figures = plan.figures()
        self.noise = 0.1 * torch.randn(round(float(index.seconds.max()) * 16000) + 1)
        self.audio = np.array([float(index.seconds[rows].sum()) for rows in self.batches])
        self.taken = np.zeros(steps)

    def batch(self, number: int) -> Batch:
        vocabulary = self.rig.model.config.decoder.vocabulary
        return batch_of(self.index, self.batches[number], vocabulary, self.noise)

    def step(self, number: int) -> None:
        loaded = [Loaded(Address(0, 0, True, self.batches[number], 0), self.batch(number), [])]
        start = time.perf_counter()
        self.rig.step(loaded, number)
        self.taken[number] = time.perf_counter() - start

    def take(self, loaded: list[Loaded]) -> None:
        self.rig.step(loaded, 0)

    def useful_flops(self, every: int = 6) -> float:
        """Return the fraction of a forward pass's FLOPs that is not padding, of every so many steps."""
        useful = total = 0
        for number in range(0, len(self.batches), every):
            batch = self.batch(number)
            for row in range(len(batch.rows)):
                one, two = batch.take(torch.tensor([row])), batch.take(torch.tensor([row, row]))
                useful += flops_of(self.rig.model, two) - flops_of(self.rig.model, one)
            total += flops_of(self.rig.model, batch, self.rig.training_step.gradient.packed)
        return useful / total

    def peak_memory(self, every: int = 6) -> float:
        """Return the largest peak memory of every so many steps over its prediction."""
        found, state = [], tensor_bytes(self.rig.training_step.tensors())
        for number in range(0, len(self.batches), every):
            loaded = [Loaded(Address(0, 0, True, self.batches[number], 0), self.batch(number), [])]
            peak = peak_of(partial(self.take, loaded), self.rig.device)
            found.append((state + peak) / self.predicted[number])
        return max(found)


def flops_of(model: SpeechModel, batch: Batch, packed: bool = False) -> int:
    """Return the FLOPs of matrix products, convolutions and attention in a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), frozen_statistics():
        model.packed_loss(batch.by_length()) if packed else model.loss(batch)
    return counter.get_total_flops()


def compare(path: Path, options: Options) -> dict[str, Any]:
    """Return the figures of all strategies on the lengths of a file."""
    index = lengths_of(path, options.longest, 480)
    model = model_of(Shape(path, width=options.width, layers=options.layers))
    config = TrainConfig(optimizer=OptimizerConfig(name="adamw"), loss=LossConfig(ctc_weight=0.0, ctc_warmup=0.0))
    prober = Prober(SyntheticStep(config, model, "float32", prompt=4), options.memory * 1e9, events=Printed())
    budget = fit_budget(prober, index, most_probes=options.probes)
    rigs = {name: Rig(replace(config, strategy=name), model, "float32") for name in ("balanced", "packed")}
    arms = {
        name: Arm(name, rigs["packed" if name == "packed" else "balanced"], index, budget, options.steps)
        for name in STRATEGIES
    }
    order = np.random.default_rng(0).permutation(options.steps)
    for number in track([order[0], *order], path.name):  # the first one warms up, and is taken again
        for arm in arms.values():
            arm.step(int(number))
    return {
        "lengths": path.name,
        "utterances": len(index),
        "hours": float(index.seconds.sum()) / 3600,
        "parameters": sum(p.numel() for p in model.parameters()),
        "budget": budget.as_json(),
        "strategies": {name: figures_of(arm, arms["balanced"]) for name, arm in arms.items()},
    }


def figures_of(arm: Arm, against: Arm) -> dict[str, float]:
    """Return an arm's figures; its speed is relative to another arm's, with a 95 % bootstrap interval over steps."""
    draws = np.random.default_rng(0).integers(0, len(arm.taken), (1000, len(arm.taken)))
    rates = [one.audio[draws].sum(1) / one.taken[draws].sum(1) for one in (arm, against)]
    low, high = np.percentile(rates[0] / rates[1], [2.5, 97.5])
    rate = arm.audio.sum() / arm.taken.sum()
    return {
        "audio_hours_per_hour": float(rate),
        "speed": float(rate / (against.audio.sum() / against.taken.sum())),
        "low": float(low),
        "high": float(high),
        "padded_audio": arm.figures.padded_audio,
        "padded_compute": arm.figures.padded_compute,
        "useful_flops": arm.useful_flops(),
        "mean_batch": arm.figures.mean_batch,
        "memory_filled": arm.figures.memory_filled,
        "peak_over_predicted": arm.peak_memory(),
    }


def show(result: dict[str, Any]) -> None:
    table = Table("strategy", "audio h/h", "speed (95 %)", "padded audio", "useful FLOPs", "memory filled", "peak",
                  title=result["lengths"])  # fmt: skip
    for name, row in result["strategies"].items():
        table.add_row(
            name,
            f"{row['audio_hours_per_hour']:.0f}",
            f"{row['speed']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
            f"{row['padded_audio']:.1%}",
            f"{row['useful_flops']:.1%}",
            f"{row['memory_filled']:.1%}",
            f"{row['peak_over_predicted']:.2f}",
        )
    Console().print(table)


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    results = []
    for path in options.lengths:
        results.append(compare(path, options))
        show(results[-1])
        if options.json:
            machine = describe_machine() | {"threads": options.threads}
            text = json.dumps({"machine": machine, "sets": results}, indent=1)
            options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
