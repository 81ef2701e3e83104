"""Training speed of the strategies: audio hours per hour of each, with the same model and the same real lengths,
against the prediction of its plan.

    python benchmarks/training.py LENGTHS [--minutes 1.5] [--json FILE]

LENGTHS is an index or a table with 'duration' and 'tokens'. Audio is noise of those lengths, made beforehand, so that
only training is timed: features, forward, backward, update. The budget is measured once and shared. Strategies take
turns of a few steps, so that other load on the machine affects all of them, and are compared on audio hours per hour of
their own time. Fixed batch sizes are those at which the longest utterances fit.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from ladder import STRATEGIES, Arm, Rig, lengths_of
from rich.console import Console
from rich.table import Table

from canter.events import Printed
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.model import ModelConfig, SpeechModel
from canter.reporting.machine import describe_machine
from canter.training.config import LossConfig, OptimizerConfig, TrainConfig
from canter.training.measure import SyntheticStep
from canter.tuning.fit import fit_budget
from canter.tuning.probe import Prober


@dataclass(frozen=True)
class Options:
    lengths: tyro.conf.Positional[Path]
    minutes: float = 1.5
    """Minutes of training for each strategy."""
    memory: float = 0.6
    """GB that a step may use, weights included; more memory makes fewer and longer steps."""
    longest: float = 30.0
    """Maximum seconds of an utterance."""
    most: int = 20_000
    """Maximum number of utterances, evenly spread."""
    width: int = 144
    layers: tuple[int, int] = (6, 2)
    """Number of layers of encoder and decoder."""
    vocabulary: int = 1024
    threads: int = 2
    probes: int = 24
    """Number of probes of the budget."""
    turn: int = 2
    """Number of steps of a turn."""
    seed: int = 0
    json: Path | None = None
    """File for the figures."""


def model_of(options: Options) -> SpeechModel:
    encoder, decoder = options.layers
    width = options.width
    torch.manual_seed(options.seed)
    return SpeechModel(
        ModelConfig(
            features=FeatureConfig(),
            encoder=FastConformerConfig(
                layers=encoder, width=width, heads=4, feedforward=4 * width, subsampling_channels=64
            ),
            decoder=DecoderConfig(
                layers=decoder, width=width, heads=4, feedforward=4 * width, vocabulary=options.vocabulary
            ),
        )
    )


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    index = lengths_of(options.lengths, options.longest, 480, options.most)
    model = model_of(options)
    config = TrainConfig(optimizer=OptimizerConfig(name="adamw"), loss=LossConfig(ctc_weight=0.0, ctc_warmup=0.0))
    prober = Prober(SyntheticStep(config, model, "float32", prompt=4), options.memory * 1e9, events=Printed())
    budget = fit_budget(prober, index, most_probes=options.probes)
    rig = Rig(config, model, "float32")
    arms = [Arm(name, rig, index, budget, options.seed) for name in STRATEGIES]
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
        "machine": describe_machine() | {"threads": options.threads},
        "parameters": sum(p.numel() for p in model.parameters()),
        "budget": budget.as_json(),
        "strategies": {arm.name: arm.figures() for arm in arms},
    }
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show(result: dict) -> None:
    table = Table("strategy", "audio h/h", "predicted", "measured/predicted", "against random", "predicted",
                  "padded audio", "mean batch", "steps")  # fmt: skip
    base = result["strategies"]["random"]
    for name, row in result["strategies"].items():
        rate, predicted = row["audio_hours_per_hour"], row["predicted"]
        table.add_row(
            name,
            f"{rate:.0f}",
            f"{predicted:.0f}",
            f"{rate / predicted:.2f}",
            f"{rate / base['audio_hours_per_hour']:.2f}x",
            f"{predicted / base['predicted']:.2f}x",
            f"{row['padded_audio']:.1%}",
            f"{row['mean_batch']:.1f}",
            str(row["steps"]),
        )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
