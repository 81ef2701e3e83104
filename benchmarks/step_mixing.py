"""Measure whether training gains from optimiser steps that hold short and long utterances together.

    python benchmarks/step_mixing.py -o FOLDER [--updates 600] [--seeds 3] [--json FILE]

The budget is like a GPU's: memory grows with the square of an utterance's length, time does not, so that a full
micro-batch of short utterances takes longer than one of long utterances, and steps of equally long micro-batches hold
utterances of similar length. Arms differ in how micro-batches are grouped into steps: `full` fills every micro-batch,
`mixed steps` shrinks some of them (`--mix-steps`), and `free` groups full micro-batches without regard to their time,
as gradient accumulation on one rank may. Corpus, model, updates and audio are the same. WER is of test sentences,
decoded greedily by attention only and jointly with CTC; its difference from the first arm's has a 95 % interval from a
paired bootstrap over utterances, all seeds together, and the cross-entropy of a token is with teacher forcing. The same
command resumes.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from convergence import Setting, decoded_jointly, keep, shared
from convergence import run as trained
from decoder_depth import compared, rows_of, score_rows, transcripts
from rich.console import Console
from rich.table import Table

from canter.cli.progress import say
from canter.evaluation.wer import Score, score_texts
from canter.events import QUIET
from canter.planning.budget import Budget, Polynomial
from canter.training.config import TrainConfig
from canter.training.recipe import prepare_training

ARMS = ("full", "mixed steps", "free")
CTC_WEIGHT = 0.3  # of joint decoding


@dataclass(frozen=True)
class Options(Setting):
    first_seed: int = 0
    """First of the seeds, to share them out to several processes; finished runs are kept and read."""
    updates: int = 600
    micro_batches: int = 4
    """Micro-batches of a step."""
    batch_seconds: float = 48.0
    """Audio of a micro-batch of utterances of 3 s, padding included."""
    quadratic: float = 0.05
    """Memory of an utterance of d seconds is d + quadratic d² (0.05: a full micro-batch of utterances of 16 s has
    64 % of the audio of one of 3 s)."""
    layers: tuple[int, int] = (4, 2)
    """Layers of encoder and decoder."""


def budget_of(arm: str, options: Options, frame_seconds: float) -> Budget:
    """Return the budget of an arm: the same memory for all."""
    memory = Polynomial(T=1.0, TT=options.quadratic * frame_seconds)
    limit = options.batch_seconds / frame_seconds * (1 + options.quadratic * 3.0)
    time = memory if arm == "free" else Polynomial(T=1.0)  # equal times may be grouped freely
    scaled = Polynomial(T=1e-3 * time.T, TT=1e-3 * time.TT)
    return Budget(limit, memory, scaled, frame_seconds=frame_seconds)


def config_of(base: TrainConfig, arm: str, seed: int, options: Options) -> TrainConfig:
    """Return the configuration of a run."""
    name = arm.replace(" ", "-")
    return replace(
        base,
        output=options.output / f"{name}-{seed}",
        budget=options.output / f"{name}.json",
        batch_seconds=None,
        mix_steps=arm == "mixed steps",
        micro_batches_per_step=options.micro_batches,
        seed=seed,
        steps=options.updates,
    )


def accuracy(rows: Sequence[dict[str, Any]], test: Path, options: Options) -> list[dict[str, Any]]:
    """Return WER and cross-entropy a token of each arm, over all seeds that every arm has."""
    done = {arm: [row for row in rows if row["arm"] == arm] for arm in ARMS}
    seeds = min(len(some) for some in done.values())
    attention: dict[str, list[Score]] = {}
    joint: dict[str, list[Score]] = {}
    found = []
    for arm, some in done.items() if seeds else ():
        folders = [options.output / row["folder"] for row in some[:seeds]]
        both = [decoded_jointly(folder, rows_of(test), CTC_WEIGHT) for folder in folders]
        attention[arm] = [score_rows(transcripts(folder, options.updates)) for folder in folders]
        joint[arm] = [score_texts(one["text"], one["pred_text"]) for one in both]
        token_loss = [one["token_loss"] for one in both]
        found.append(
            {"arm": arm} | compared(attention, arm) | {"joint": compared(joint, arm), "token_loss": token_loss}
        )
    return found


def show(rows: Sequence[dict[str, Any]], accuracies: Sequence[dict[str, Any]]) -> None:
    """Print a table of the arms, by attention only and jointly with CTC."""
    table = Table("steps", "step mixing", "utterances a step", "audio, h", "decoding", "WER", "of each seed",
                  "difference (95 %)", "loss")  # fmt: skip
    for arm in accuracies:
        mine = [row for row in rows if row["arm"] == arm["arm"]]
        low, middle, high = mine[0]["utterances_a_step"]
        hours = statistics.mean(row["audio_hours"] for row in mine)
        about = (arm["arm"], f"{mine[0]['step_mixing']:.2f}", f"{low} to {high}, median {middle}", f"{hours:.1f}")
        for way, one in (("attention", arm), ("joint", arm["joint"])):
            gap = one.get("difference")
            gaps = f"{gap['wer']:+.2%} ({gap['low']:+.2%} to {gap['high']:+.2%})" if gap else "-"
            each = ", ".join(f"{wer:.1%}" for wer in one["wer_of_seeds"])
            table.add_row(*about, way, f"{one['wer']:.2%}", each, gaps, f"{statistics.mean(arm['token_loss']):.3f}")
    Console().print(table)


def main(options: Options) -> None:
    base = shared(options, options.layers)
    frame_seconds = Budget.load(base.budget or Path()).frame_seconds
    rows: list[dict[str, Any]] = []
    accuracies: list[dict[str, Any]] = []
    for arm in ARMS:
        budget_of(arm, options, frame_seconds).save(options.output / f"{arm.replace(' ', '-')}.json")
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm in ARMS:
            say(f"{arm}, seed {seed}")
            config = config_of(base, arm, seed, options)
            plan = prepare_training(config, QUIET).schedule.plan
            counts = np.add.reduceat(plan.table().size, plan.table().steps[:-1])
            figures = {
                "folder": config.output.name,
                "step_mixing": plan.figures().step_mixing,
                "steps_an_epoch": len(plan),
                "utterances_a_step": [int(value) for value in np.percentile(counts, (0, 50, 100))],
            }
            rows.append({"arm": arm, "seed": seed} | figures | trained(config))
            accuracies = accuracy(rows, base.valid[0], options)
            keep(options, runs=rows, accuracy=accuracies)  # after every run, so that a stop loses nothing
    show(rows, accuracies)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
