"""Compare `balanced` with 2-D bucketing on sets of real lengths, at an equal mixing pool and at its least padding.

Usage:

    python benchmarks/planning_real.py BUDGET.json SET.parquet ... [--share 0.5]

A set has the columns `duration` (seconds) and `tokens` (of the text). Figures are exact and repeatable.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from canter.corpus.index import LengthIndex
from canter.planning import Budget
from canter.planning.compare import compare
from canter.planning.strategies import Balanced, Bucket2D

PROMPT_AND_END = 9
TOKENS_PER_SECOND = 3.2  # of a set that has only durations
MIXING = (0.0, *np.arange(1.0, 8.1, 0.5).tolist())


def row_of(path: Path, budget: Budget) -> str:
    """Return a table row: `balanced` and 2-D buckets on a set of real lengths, one micro-batch a step."""
    table = pq.read_table(path)
    seconds = table["duration"].to_numpy()
    if "tokens" in table.column_names:
        tokens = table["tokens"].to_numpy() + PROMPT_AND_END
    else:
        tokens = np.round(TOKENS_PER_SECOND * seconds).astype(np.int64) + PROMPT_AND_END
    index = LengthIndex(seconds, tokens)
    strategies = [("2-D", Bucket2D(), None), *((str(mixing), Balanced(mixing), len(index)) for mixing in MIXING)]
    two, *ours = compare(index, budget, strategies, ranks=1)
    least = ours[0]
    equal = next((row for row in ours if row.mixing_pool >= two.mixing_pool), ours[-1])
    before, at_equal, at_best = (row.figures.padded_compute for row in (two, equal, least))
    return (
        f"| {path.stem} | {len(index):,} | {two.figures.micro_batches:,} | {before:.2%}, {two.mixing_pool:,.0f} "
        f"| {float(equal.name):g}, {at_equal:.2%}, {equal.mixing_pool:,.0f} | {1 - at_equal / before:.0%} "
        f"| {at_best:.2%} | {1 - at_best / before:.0%} | {least.figures.memory_filled:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budget", type=Path)
    parser.add_argument("sets", type=Path, nargs="+")
    parser.add_argument("--share", type=float, default=0.5, help="fraction of the budget's memory to use")
    options = parser.parse_args()
    budget = Budget.load(options.budget)
    limited = dataclasses.replace(budget, limit_bytes=options.share * budget.limit_bytes)
    header = [
        f"{options.share:.0%} of the budget's memory, M = 1; {PROMPT_AND_END} tokens for prompt and end.\n",
        "| set | rows | batches | 2-D 30x2: padded compute, pool | balanced: mixing, padded compute, pool | less "
        "| mixing 0 | less | memory filled |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|",
    ]
    print("\n".join(header))
    for path in options.sets:
        print(row_of(path, limited), flush=True)


if __name__ == "__main__":
    main()
