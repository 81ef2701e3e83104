"""Measure whether training gains from batches of utterances of all lengths, before building what could afford them.

    python benchmarks/full_mixing.py -o FOLDER [--updates 1757] [--seeds 3] [--json FILE]

Training without padding could take utterances in plain shuffled order. Its loss is that of the same utterances in a
padded batch, so the runs here pad: `shuffled` has as many random utterances in a batch as `balanced` has on average,
and takes several times as long. Both have the same updates, audio, learning rate and model, so that only the mixing of
lengths differs. WER is of test sentences, decoded by attention only. The same command resumes.
"""

import statistics
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tyro
from convergence import Setting, keep, shared
from convergence import run as trained
from rich.console import Console
from rich.table import Table

from canter.cli.progress import say
from canter.events import QUIET
from canter.training.config import TrainConfig
from canter.training.recipe import prepare_training

ARMS = ("balanced", "shuffled")


@dataclass(frozen=True)
class Options(Setting):
    updates: int = 1757
    layers: tuple[int, int] = (4, 2)
    """Layers of encoder and decoder."""


def config_of(base: TrainConfig, arm: str, seed: int, utterances: int, options: Options) -> TrainConfig:
    """Return the configuration of a run; ``utterances`` in a batch of `shuffled`."""
    config = replace(base, output=options.output / f"{arm}-{seed}", seed=seed, steps=options.updates)
    if arm == "shuffled":  # `random` has the batch size that fits the longest utterances
        config = replace(config, strategy="random", batch_seconds=utterances * options.longest)
    return config


def main(options: Options) -> None:
    base = shared(options, options.layers)
    first = config_of(base, ARMS[0], 0, 0, options)
    plan = prepare_training(first, QUIET).schedule.plan
    utterances = round(float(np.mean(plan.table().size)))
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for arm in ARMS:
            say(f"{arm}, seed {seed}")
            rows.append({"arm": arm, "seed": seed} | trained(config_of(base, arm, seed, utterances, options)))
            keep(options, runs=rows)  # after every run, so that a stop loses nothing
    table = Table("batches", "audio a step, s", "WER of each seed", "mean")
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        wers = [row["wer"] for row in mine]
        table.add_row(
            arm,
            f"{statistics.mean(row['audio_a_step'] for row in mine):.0f}",
            ", ".join(f"{wer:.1%}" for wer in wers),
            f"{statistics.mean(wers):.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
