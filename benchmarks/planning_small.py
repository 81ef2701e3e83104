"""Compare `balanced` with 2-D bucketing on small sets, at the same number of optimiser steps. Usage:

    python benchmarks/planning_small.py BUDGET.json SET.parquet ... [--samples 1] [--out FILE.md]

A set has the columns `duration` (seconds) and `tokens` (of the text). Each is planned completely and, where it is
longer, in random samples of three hours. `bucket_2d` 30x2 (ranks in step) makes as many steps as its buckets need, or
at least 50; `balanced` is then asked for the same number. Figures are exact and repeatable.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from canter.corpus.index import LengthIndex
from canter.planning import Budget, Plan
from canter.planning.strategies import Balanced, Bucket2D

PROMPT_AND_END = 9
HOURS = 3.0
SETTINGS = ((1, 1), (8, 8), (8, 16), (1, 8), (1, 16))  # ranks, micro-batches per step
LEAST = (1, 50)  # minimum steps of `bucket_2d`


def indexes(path: Path, samples: int) -> Iterator[tuple[str, LengthIndex]]:
    """Yield the set and random samples of three hours of it, with their names."""
    table = pq.read_table(path)
    seconds = table["duration"].to_numpy()
    tokens = table["tokens"].to_numpy().astype(np.int64) + PROMPT_AND_END
    yield path.stem, LengthIndex(seconds, tokens)
    for seed in range(samples if seconds.sum() > HOURS * 3600 else 0):
        order = np.random.default_rng(seed).permutation(len(seconds))
        some = order[: int(np.searchsorted(np.cumsum(seconds[order]), HOURS * 3600))]
        yield f"{path.stem}, 3 h ({seed})", LengthIndex(seconds[some], tokens[some])


def row_of(name: str, index: LengthIndex, budget: Budget, ranks: int, per_step: int, least: int) -> tuple[str, bool]:
    """Return a table row, and whether `balanced` pads less and takes no longer."""
    two = Plan(index, budget, Bucket2D(), micro_batches_per_step=per_step, min_steps=least).figures(ranks)
    plan = Plan(index, budget, Balanced(), micro_batches_per_step=per_step, min_steps=two.steps)
    ours = plan.figures(ranks)
    time = ours.hours / two.hours
    good = ours.padded_compute < two.padded_compute and time <= 1.0
    return (
        f"| {name} | {len(index):,} | {ranks}, {per_step} | {two.steps}, {two.micro_batches} "
        f"| {ours.steps}, {ours.micro_batches} | {two.padded_compute:.2%} | {ours.padded_compute:.2%} | {time:.4f} "
        f"| {two.waiting:.3f} | {ours.waiting:.3f} | {ours.memory_filled:.1%} | {'' if good else 'no'} |",
        good,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budget", type=Path)
    parser.add_argument("sets", type=Path, nargs="+")
    parser.add_argument("--samples", type=int, default=1, help="number of random samples of each set")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    budget = Budget.load(options.budget)
    lines = [
        f"# `balanced` against `bucket_2d` 30x2 on small sets, {options.budget.name}",
        "",
        "Time is the predicted epoch of `balanced` over that of `bucket_2d`. The last column marks rows in which "
        "`balanced` pads more or takes longer.",
        "",
        "| set | utterances | ranks, M | 2-D: steps, micro-batches | balanced: steps, micro-batches "
        "| 2-D: padded compute | balanced: padded compute | time | 2-D: waiting | balanced: waiting "
        "| balanced: memory filled | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    print("\n".join(lines), flush=True)
    good = []
    for path in options.sets:
        for name, index in indexes(path, options.samples):
            for ranks, per_step in SETTINGS:
                for least in LEAST:
                    row, fine = row_of(name, index, budget, ranks, per_step, least)
                    print(row, flush=True)
                    lines.append(row)
                    good.append(fine)
    lines += ["", f"{sum(good)} of {len(good)} rows: `balanced` pads less and takes no longer."]
    print(lines[-1])
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
