"""Show the defaults of `canter train` for sets of several sizes: memory filled, batch size, updates an epoch,
and the line that a run prints.

    python benchmarks/training_defaults.py LENGTHS LIBRISPEECH AN4 [--json FILE]

LENGTHS is a large table of lengths (the reference million), LIBRISPEECH and AN4 are tables of those sets. Budgets are
analytic, so nothing is measured and the result is the same on every machine; limits and plan are made by the functions
that a run calls.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from canter.cli.lengths import open_lengths
from canter.corpus.index import LengthIndex
from canter.planning import Budget, analytic_budget
from canter.planning.budget import Polynomial
from canter.planning.plan import Plan
from canter.planning.strategies import Balanced
from canter.training.config import TrainConfig
from canter.training.schedule import choose_limits, plan_batches

PADDED = 30.0


@dataclass(frozen=True)
class Options:
    lengths: tyro.conf.Positional[Path]
    librispeech: tyro.conf.Positional[Path]
    an4: tyro.conf.Positional[Path]
    prompt_tokens: int = 8
    """Tokens of the prompt, added with one for the end to the tokens of the tables."""
    json: Path | None = None
    """File for the figures."""


def sample(index: LengthIndex, hours: float) -> LengthIndex:
    """Return a random part of an index, with about ``hours`` of audio."""
    seconds, tokens = np.asarray(index.seconds), np.asarray(index.tokens)
    rows = np.random.default_rng(0).permutation(len(seconds))
    rows = rows[: int(np.searchsorted(np.cumsum(seconds[rows]), hours * 3600))]
    return LengthIndex(seconds[rows], tokens[rows])


def padded(budget: Budget) -> Budget:
    """Return the budget of a model that pads every utterance to 30 s: one frame of 30 s each."""
    frames = PADDED / budget.frame_seconds
    memory, time = (
        Polynomial(T=cost.T * frames + cost.TT * frames**2, U=cost.U, TU=cost.TU * frames, UU=cost.UU)
        for cost in (budget.memory, budget.time)
    )
    return dataclasses.replace(budget, frame_seconds=PADDED, memory=memory, time=time)


def cases(options: Options) -> list[tuple[str, LengthIndex, Budget, int, TrainConfig]]:
    """Return (name, lengths, budget, ranks, configuration) of each case."""
    large = open_lengths(options.lengths)
    libri, an4 = (open_lengths(path, options.prompt_tokens) for path in (options.librispeech, options.an4))
    three = sample(libri, 3.0)
    canary, whisper = analytic_budget("canary-1b", 80.0), analytic_budget("whisper-tiny", 24.0)
    scratch, tuned = TrainConfig(), TrainConfig(init=Path("checkpoint"))
    return [
        ("reference million, canary-1b, 8 x 80 GB", large, canary, 8, scratch),
        ("LibriSpeech dev and test, canary-1b, 80 GB", libri, canary, 1, scratch),
        ("3 h of it, canary-1b, 80 GB", three, canary, 1, scratch),
        ("3 h of it, canary-1b, 8 x 80 GB", three, canary, 8, scratch),
        ("3 h of it, --init canary-1b --epochs 2, 80 GB", three, canary, 1, dataclasses.replace(tuned, epochs=2.0)),
        ("AN4, --init whisper-tiny --pad-seconds 0, 24 GB", an4, whisper, 1, tuned),
        ("AN4, --init whisper-tiny, padded to 30 s, 24 GB", an4, padded(whisper), 1, tuned),
        ("LibriSpeech, --init whisper-tiny, padded to 30 s, 24 GB", libri, padded(whisper), 1, tuned),
    ]


def measure(index: LengthIndex, budget: Budget, ranks: int, config: TrainConfig) -> dict[str, Any]:
    """Return the batches of a run, by the functions that it calls."""
    limits = choose_limits(config, index, budget, ranks, ranks, on_cpu=False)
    window = min(config.batching_window, len(index))
    plan = Plan(index, budget, Balanced(), window=window, micro_batches_per_step=ranks)
    _, sizes, _ = plan_batches(plan, limits, index, ranks)
    return dataclasses.asdict(sizes) | {"hours": float(np.sum(index.seconds)) / 3600, "line": str(sizes)}


def main(options: Options) -> None:
    rows = {name: measure(*case) for name, *case in cases(options)}
    print("| | hours | memory filled | mean batch | longest batch, s | updates an epoch |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['hours']:,.1f} | {row['memory_filled']:.1%} | {row['utterances']:.1f} | "
            f"{row['seconds']:.0f} | {row['steps']:,} |"
        )
    for name, row in rows.items():
        print(f"\n{name}\n    {row['line']}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
