"""Compare planning with Lhotse in one run: padding, memory, waiting, speed, resuming. Usage:

    python benchmarks/planning.py LENGTHS.parquet BUDGET.json [--lhotse 200000] [--millions 100] [--out FILE.md]

LENGTHS has the columns `duration` and `num_tokens`. Speeds are utterances per second of process time on one core;
Lhotse gets its cuts from memory, so that reading of manifests is not counted. Its batches are judged by the same
figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
import warnings
from bisect import bisect_left
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from canter.corpus.index import LengthIndex
from canter.planning import Budget, Plan, Position
from canter.planning.compare import compare, markdown
from canter.planning.metrics import BatchTable, figures
from canter.planning.plan import MicroBatch
from canter.planning.strategies import Balanced, Bucket1D, Bucket2D, Random
from canter.planning.strategies.bucket_2d import batch_sizes


def ladder(index: LengthIndex, budget: Budget) -> str:
    out = []
    for ranks in (8, 64):
        rows = [
            ("random, fixed size", Random(), None),
            ("1-D buckets, 30, quadratic", Bucket1D(), None),
            ("2-D buckets 30x2, ranks in step", Bucket2D(), None),
            ("2-D buckets 30x5, ranks in step", Bucket2D(30, 5), None),
            ("balanced, window 50,000", Balanced(), 50_000),
            ("balanced, window 50,000, mixing 4.5", Balanced(4.5), 50_000),
            ("balanced, window 200,000", Balanced(), 200_000),
        ]
        out.append(f"{ranks} ranks, one micro-batch each:\n\n{markdown(compare(index, budget, rows, ranks=ranks))}")
    return "\n".join(out)


def table_of(batches: list[np.ndarray], index: LengthIndex, budget: Budget, ranks: int) -> BatchTable:
    """Return the table of Lhotse's batches, in order, `ranks` to a step."""
    rows, size = np.concatenate(batches), np.array([len(b) for b in batches])
    at = np.concatenate([[0], np.cumsum(size)])[:-1]
    frames, tokens = budget.frames(index.seconds[rows]), index.tokens[rows].astype(np.int64)
    return BatchTable(
        size,
        np.maximum.reduceat(frames, at),
        np.maximum.reduceat(tokens, at),
        np.add.reduceat(frames, at),
        np.add.reduceat(tokens, at),
        np.add.reduceat(budget.utterance_seconds(frames, tokens), at),
        np.add.reduceat(index.seconds[rows].astype(np.float64), at),
        np.append(np.arange(0, len(size), ranks), len(size)),
    )


def against_lhotse(index: LengthIndex, budget: Budget, count: int, ranks: int = 8) -> str:
    from lhotse import CutSet, MonoCut, SupervisionSegment
    from lhotse.dataset import DynamicBucketingSampler
    from lhotse.dataset.sampling.dynamic_bucketing import FixedBucketBatchSizeConstraint

    some = LengthIndex(index.seconds[:count], index.tokens[:count])
    cuts = [
        MonoCut(str(i), 0.0, float(d), 0, supervisions=[SupervisionSegment(str(i), "r", 0.0, float(d))],
                custom={"num_tokens": int(u)})
        for i, (d, u) in enumerate(zip(some.seconds, some.tokens))
    ]  # fmt: skip

    lazy = CutSet(_Lazy(cuts))

    bins = Bucket2D().bins(some, budget)
    edges, token_edges = bins.seconds.tolist(), [t.tolist() for t in bins.tokens]
    first = np.concatenate([[0], np.cumsum([len(t) for t in token_edges])]).astype(int).tolist()
    sizes = [int(s) for s in batch_sizes(bins, budget)]

    class NeMoLike(FixedBucketBatchSizeConstraint):
        """A batch size for each (seconds, tokens) bucket, as in NeMo's 2-D constraint."""

        def select_bucket(self, buckets, example=None, example_len=None):
            row = min(bisect_left(edges, example.duration), len(edges) - 1)
            inside = token_edges[row]
            return first[row] + min(bisect_left(inside, example.custom["num_tokens"]), len(inside) - 1)

        def add(self, example):
            self.num_cuts += 1
            self.bucket = self.select_bucket(None, example)

        def exceeded(self):
            return self.num_cuts > sizes[self.bucket]

        def close_to_exceeding(self):
            return self.num_cuts >= sizes[self.bucket]

        def reset(self):
            self.num_cuts = 0

        def copy(self):
            return NeMoLike(self.max_seq_len_buckets, self.batch_sizes)

    common = {"shuffle": True, "drop_last": False, "world_size": 1, "rank": 0}
    samplers = {
        "Lhotse DynamicBucketingSampler, 30 buckets, 360 s, quadratic 30": lambda: DynamicBucketingSampler(
            lazy, max_duration=360.0, num_buckets=30, quadratic_duration=30.0, buffer_size=20_000, **common
        ),
        "Lhotse, 2-D fixed batches 30x2": lambda: DynamicBucketingSampler(
            lazy,
            constraint=NeMoLike([float(i + 1) for i in range(len(sizes))], sizes),
            duration_bins=[float(i + 1) for i in range(len(sizes) - 1)],
            buffer_size=20_000,
            **common,
        ),
    }
    lines = [
        "| sampler | padded compute | mean batch | memory filled | over | waiting | utterances/s | against the first |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base, resumed = None, ""
    for name, make in samplers.items():
        sampler = make()
        start = time.process_time()
        batches = [np.array([int(c.id) for c in batch]) for batch in sampler]
        spent = time.process_time() - start
        speed = sum(map(len, batches)) / spent
        base = base or speed
        f = figures(table_of(batches, some, budget, ranks), budget, ranks)
        lines.append(_row(name, f, speed, base))
        if "Dynamic" in name:
            halfway = make()
            for _, _batch in zip(range(len(batches) // 2), halfway):
                pass
            state, again = halfway.state_dict(), make()
            start = time.process_time()
            again.load_state_dict(state)
            resumed = f"Lhotse resumes at half of {count:,} cuts in {time.process_time() - start:.2f} s"
    cuts.clear()
    gc.collect()
    for window in (50_000, 200_000):
        plan, spent = timed_epoch(index, budget, window, ranks)
        lines.append(_row(f"Canter balanced, window {window:,}", plan.figures(ranks), len(index) / spent, base or 1.0))
    return "\n".join([*lines, "", resumed])


class _Lazy:
    """Cuts from memory behind the interface of a lazily read manifest."""

    is_lazy = True

    def __init__(self, cuts):
        self.cuts = cuts

    def __iter__(self):
        return iter(self.cuts)

    def __len__(self):
        return len(self.cuts)


def _row(name: str, f, speed: float, base: float) -> str:
    return (
        f"| {name} | {f.padded_compute:.2%} | {f.mean_batch:.1f} | {f.memory_filled:.2%} | {f.over} | {f.waiting:.4f} "
        f"| {speed:,.0f} | {speed / base:.1f}x |"
    )


def timed_epoch(index: LengthIndex, budget: Budget, window: int, ranks: int) -> tuple[Plan, float]:
    """Return a plan and the process time to make all its steps (best of three)."""
    best = float("inf")
    for _ in range(3):
        plan = Plan(index, budget, Balanced(), window=window, micro_batches_per_step=ranks)
        start = time.process_time()
        rows = sum(len(batch) for step in plan.steps() for batch in step[1])
        best = min(best, time.process_time() - start)
        assert rows == len(index)
    return plan, best


def latency(path: Path, index: LengthIndex, budget: Budget) -> str:
    """Measure the first batch after opening, and the time of a rank to get its micro-batches of a window."""
    lines = []
    index.save(path)
    start = time.perf_counter()
    opened = LengthIndex.open(path)
    Plan(opened, budget, micro_batches_per_step=8).cut(0).step(0)
    lines.append(f"- first batch after opening {len(index):,} rows: {1e3 * (time.perf_counter() - start):.0f} ms")
    for ranks in (1, 8, 64, 512):
        plan = Plan(index, budget, micro_batches_per_step=ranks, window=200_000)
        steps = len(plan.cut(0))
        start = time.process_time()
        plan._recent.clear()
        taken: list[MicroBatch] = []
        for number in range(steps):
            taken += plan.micro_batches_for(0, ranks, Position(0, 0, number, plan.fingerprint))
        spent = time.process_time() - start
        lines.append(f"- one window of 200,000 for one of {ranks} ranks: {1e3 * spent:.0f} ms")
    return "\n".join(lines)


def large(index: LengthIndex, budget: Budget, millions: int, path: Path) -> str:
    """Measure opening a large index and resuming in its middle."""
    copies = -(-millions * 1_000_000 // len(index))
    big = LengthIndex(np.tile(index.seconds, copies), np.tile(index.tokens, copies))
    big.save(path)
    del big
    opened = LengthIndex.open(path)
    opened.seconds.sum(), opened.tokens.sum()  # the page cache is warm
    plan = Plan(opened, budget, micro_batches_per_step=8)
    at = Position(0, (plan.windows.count or 1) * 2 // 3, 20, plan.fingerprint)
    expected = [rows for step in list(_take(plan.steps(at), 100)) for rows in step[1]]
    del plan, opened
    gc.collect()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        opened = LengthIndex.open(path)
        plan = Plan(opened, budget, micro_batches_per_step=8)
        found = list(_take(plan.steps(Position.from_json(json.loads(json.dumps(at.as_json())))), 1))
        times.append(time.perf_counter() - start)
    found += list(_take(plan.steps(found[0][0]), 99))
    same = all(np.array_equal(a, b) for a, b in zip(expected, (rows for step in found for rows in step[1])))
    path.unlink()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"- open {len(opened):,} rows and resume in window {at.window}: {1e3 * min(times):.0f} ms (of {len(times)}: "
        f"{', '.join(f'{1e3 * t:.0f}' for t in times)}), the next 100 steps identical: {same}; state "
        f"{len(json.dumps(at.as_json()))} bytes; peak of this process, building included, {memory:,.0f} MB"
    )


def _take(items, count):
    return (item for _, item in zip(range(count), items))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", type=Path)
    parser.add_argument("budget", type=Path)
    parser.add_argument("--lhotse", type=int, default=200_000, help="cuts Lhotse is timed on")
    parser.add_argument("--millions", type=int, default=100, help="rows of the large index")
    parser.add_argument("--scratch", type=Path, default=Path("."), help="folder for the large index")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    table = pq.read_table(options.lengths)
    index = LengthIndex(table["duration"].to_numpy(), table["num_tokens"].to_numpy())
    budget = Budget.load(options.budget)
    parts = [
        f"# Planning, {len(index):,} utterances of {options.lengths.name}, {options.budget.name}",
        "## Side by side with Lhotse",
        against_lhotse(index, budget, options.lhotse),
        "## The ladder",
        ladder(index, budget),
        "## Latency",
        latency(options.scratch / "planning-benchmark.arrow", index, budget),
        large(index, budget, options.millions, options.scratch / "planning-benchmark.arrow"),
    ]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
