"""Emulate synchronous data-parallel training on 8 to 256 ranks: epoch time, waiting, and GPUs for the same time.

    python benchmarks/ranks.py -o RESULT.json [--lengths FILE] [--budget FILE] [--figure FILE.svg] [--smoke]

Real: the utterance lengths, the plans (every strategy, by the real planner), and which rank gets which micro-batch.
Emulated: the seconds of a micro-batch (B, T, U), which come from a budget that was fitted to measured steps, or from a
table of measured steps; each rank's noise (log-normal); one slow rank; and the exchange of gradients, of which only a
model is used (a ring: bytes over a bandwidth, and a latency for each of its hops). Loading of data is not emulated.
Every finished part is written at once, and a later call with the same settings resumes after it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from canter.corpus.index import LengthIndex
from canter.files import write_text
from canter.planning import Budget, Plan, analytic_budget
from canter.planning.elastic import share_out
from canter.planning.metrics import BatchTable
from canter.planning.strategies import Balanced, Bucket1D, Bucket2D, Random, Strategy

WINDOW = 200_000
STRATEGIES: dict[str, tuple[Strategy, int | None]] = {
    "random": (Random(), None),
    "bucket_1d": (Bucket1D(), None),
    "bucket_2d": (Bucket2D(synchronised=False), None),
    "bucket_2d in step": (Bucket2D(), None),
    "balanced": (Balanced(), WINDOW),
    "balanced, mixed steps": (Balanced(mix_steps=True), WINDOW),
}
BASELINES = ("random", "bucket_1d")
COMPARED = ("bucket_2d in step", "balanced", "balanced, mixed steps")
TABLES = ("librispeech_devtest_en", "css10_es", "commonvoice51_ru", "commonvoice61_sample_58lang", "ljspeech_en")
PROMPT = 8  # tokens, with the end token
NEIGHBOURS = 4  # measured shapes that correct the fitted time of a shape


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a micro-batch: a fitted budget's, each corrected by the measured shapes next to it if there are any.

    shapes: (N, 3) logarithms of measured B, T and U. ratios: (N,) logarithms of measured / fitted seconds.
    """

    budget: Budget
    shapes: np.ndarray | None = None
    ratios: np.ndarray | None = None

    @classmethod
    def from_table(cls, budget: Budget, rows: Sequence[Sequence[float]]) -> StepTimes:
        """Return the times of a table of measured (B, T, U, seconds); `budget` gives the shape of the curve between."""
        table = np.array(rows, np.float64)
        fitted = budget.step_seconds(*table[:, :3].T)
        return cls(budget, np.log(table[:, :3]), np.log(table[:, 3] / fitted))

    def __call__(self, size: np.ndarray, frames: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the seconds of micro-batches (N,)."""
        seconds = self.budget.step_seconds(size, frames, tokens)
        if self.shapes is None or self.ratios is None:
            return seconds
        places = np.log(np.stack([size, frames, tokens], 1).astype(np.float64))
        distance = np.square(places[:, None] - self.shapes).sum(2)
        near = np.argsort(distance, axis=1)[:, :NEIGHBOURS]
        weight = 1 / (np.take_along_axis(distance, near, 1) + 1e-6)
        return seconds * np.exp((weight * self.ratios[near]).sum(1) / weight.sum(1))


@dataclass(frozen=True)
class Cluster:
    """The emulated part of a group of ranks.

    jitter: standard deviation of the logarithm of a rank's seconds of a step, whose median is the table's. straggler:
    factor of the seconds of one rank. gradient_bytes: exchanged in every step. bandwidth: bytes per second of a rank.
    latency: seconds of a hop of the ring.
    """

    jitter: float = 0.0
    straggler: float = 1.0
    gradient_bytes: float = 0.0
    bandwidth: float = 50e9
    latency: float = 0.0

    def exchange_seconds(self, ranks: int) -> float:
        """Return the seconds of an all_reduce over a ring: 2 (R - 1) hops of 1/R of the bytes."""
        return 2 * (ranks - 1) * (self.gradient_bytes / ranks / self.bandwidth + self.latency)


@dataclass(frozen=True)
class Emulated:
    """An emulated epoch.

    waiting: fraction of the ranks' computing time in which they wait for the slowest. exchange: fraction of the epoch.
    """

    seconds: float
    waiting: float
    exchange: float
    steps: int
    utterances: int


def rank_seconds(planned: np.ndarray, actual: np.ndarray, steps: np.ndarray, ranks: int) -> np.ndarray:
    """Return the seconds of each rank in each step, (S, ranks), its micro-batches shared out as in training.

    planned, actual: (micro-batches,) seconds by the planner's budget, by which they are shared out, and as they are.
    steps: offsets of steps (S + 1,).
    """
    sizes = np.diff(steps)
    loads = np.zeros((len(sizes), ranks))
    if np.all(sizes <= ranks):  # the longest to rank 0, the next to rank 1
        step = np.repeat(np.arange(len(sizes)), sizes)
        order = np.lexsort((-planned, step))
        loads[step, np.arange(len(step)) - np.repeat(steps[:-1], sizes)] = actual[order]
        return loads
    for number, (begin, size) in enumerate(zip(steps, sizes)):
        for rank, share in enumerate(share_out(planned[begin : begin + size], ranks)):
            loads[number, rank] = actual[begin + np.array(share, np.int64)].sum()
    return loads


def emulate(
    table: BatchTable, budget: Budget, times: StepTimes, ranks: int, cluster: Cluster, draws: int = 1
) -> Emulated:
    """Return the epoch of a plan's table, made with `budget`, on ranks that take `times`: the mean over `draws` of the
    noise and of the slow rank."""
    shape = (table.size, table.frames, table.tokens)
    steady = rank_seconds(budget.step_seconds(*shape), times(*shape), table.steps, ranks)
    slowest, waiting = np.zeros(draws), np.zeros(draws)
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        loads = steady * np.exp(cluster.jitter * rng.standard_normal(steady.shape))
        loads[:, rng.integers(ranks)] *= cluster.straggler
        slowest[draw] = loads.max(1).sum()
        waiting[draw] = 1 - loads.sum() / (ranks * slowest[draw])
    exchange = len(steady) * cluster.exchange_seconds(ranks)
    seconds = float(slowest.mean()) + exchange
    return Emulated(seconds, float(waiting.mean()), exchange / seconds, len(steady), int(table.size.sum()))


@dataclass
class Emulator:
    """Epochs of every strategy on any number of ranks, with one micro-batch a rank. Plans are made once."""

    index: LengthIndex
    budget: Budget
    times: StepTimes
    cluster: Cluster
    draws: int = 3
    tables: dict[tuple[str, int], BatchTable] = field(default_factory=dict)

    def table(self, strategy: str, ranks: int) -> BatchTable:
        """Return the micro-batches of a strategy's epoch, filled to the budget."""
        if (strategy, ranks) not in self.tables:
            chosen, window = STRATEGIES[strategy]
            plan = Plan(self.index, self.budget, chosen, window=window, micro_batches_per_step=ranks, min_steps=1)
            self.tables[strategy, ranks] = plan.table()
        return self.tables[strategy, ranks]

    def epoch(self, strategy: str, ranks: int, cluster: Cluster | None = None) -> Emulated:
        """Return an emulated epoch, on `cluster` instead of the emulator's own if given."""
        table = self.table(strategy, ranks)
        return emulate(table, self.budget, self.times, ranks, cluster or self.cluster, self.draws)

    def pace(self, strategy: str, ranks: int) -> float:
        """Return the seconds per utterance, which a strategy does not improve by leaving utterances out."""
        epoch = self.epoch(strategy, ranks)
        return epoch.seconds / epoch.utterances

    def ranks_needed(self, strategy: str, baseline: str, ranks: int) -> int | None:
        """Return the least number of ranks on which a strategy takes no longer than `baseline` takes on `ranks`.

        By bisection: more ranks take less time, but for rounding to complete steps. None if twice as many ranks are
        too slow.
        """
        target, low, high = self.pace(baseline, ranks), 0, 2 * ranks
        if self.pace(strategy, ranks) <= target:
            high = ranks
        elif self.pace(strategy, high) > target:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.pace(strategy, middle) <= target else (middle, high)
        return high


# -- lengths, budgets and times --


def draw_lengths(source: str, count: int) -> LengthIndex:
    """Return `count` lengths: "real", drawn from the tables below CANTER_SHARED, "synthetic", or those of a file."""
    rng = np.random.default_rng(0)
    if source == "synthetic":
        seconds = np.clip(rng.gamma(2.0, 3.7, count), 1.0, 29.0).astype(np.float32)
        return LengthIndex(seconds, np.maximum(2, seconds * rng.uniform(2.4, 3.6, count)).astype(np.int64) + PROMPT)
    if source != "real":
        from canter.cli.lengths import open_lengths

        every = open_lengths(Path(source))
    else:
        shared = os.environ.get("CANTER_SHARED")
        if not shared:
            raise SystemExit(
                "'real' lengths come from the folder that CANTER_SHARED names: set it, or take 'synthetic'"
            )
        tables = [pq.read_table(Path(shared) / f"data/lengths/{name}.parquet") for name in TABLES]
        every = LengthIndex(
            np.concatenate([table["duration"].to_numpy() for table in tables]).astype(np.float32),
            np.concatenate([table["tokens"].to_numpy() for table in tables]).astype(np.int64) + PROMPT,
        )
        rows = rng.integers(len(every), size=count)
        return LengthIndex(every.seconds[rows], every.tokens[rows])
    return LengthIndex(every.seconds[:count], every.tokens[:count])


def read_budget(path: Path | None) -> Budget:
    """Return the budget of a file, or that in a result of `gpu_training.py`; without a file, an analytic one."""
    if path is None:
        return analytic_budget("canary-1b", 80.0)
    value = json.loads(path.read_text(encoding="utf-8"))
    return Budget.from_json(value.get("budget", value))


def read_table(path: Path) -> list[list[float]]:
    """Return measured (B, T, U, seconds): those in a result of `gpu_budget.py` or of `ranks_check.py`."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if "rounds" in value:
        return [row for one in value["rounds"] for row in one["table"]]
    return [[*row["shape"], row["seconds"]] for row in value["rows"]]


# -- the command --


@dataclass(frozen=True)
class Options:
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """JSON file of the result; a later call with the same settings resumes it."""
    lengths: str = "synthetic"
    """A file of lengths, "real" (drawn from the tables below CANTER_SHARED) or "synthetic"."""
    utterances: int = 1_000_000
    """Number of utterances of an epoch."""
    budget: Path | None = None
    """Budget of the plans and of the time of a step: a budget file, or a result of gpu_training.py (default: the
    analytic budget of canary-1b on 80 GB)."""
    table: Path | None = None
    """Measured steps that correct the budget's times: a result of gpu_budget.py or ranks_check.py."""
    ranks: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    """Numbers of ranks."""
    detail: int = 64
    """Number of ranks at which jitter, exchange and a slow rank are shown separately."""
    jitter: float = 0.03
    """Standard deviation of the logarithm of a rank's seconds of a step."""
    straggler: float = 1.2
    """Factor of the slow rank's seconds, in the row with a straggler."""
    gradient_bytes: float = 2e9
    """Bytes that are exchanged in a step: 1 B parameters in bf16."""
    bandwidth: float = 50e9
    """Bytes per second of a rank in the exchange."""
    latency: float = 10e-6
    """Seconds of a hop of the exchange."""
    draws: int = 3
    """Draws of the noise, whose mean is reported."""
    figure: Path | None = None
    """Image file to draw."""
    smoke: bool = False
    """Run at a small size: 3,000 utterances, 2 and 4 ranks."""


class Kept:
    """The finished parts of a result, in a JSON file that is written after each of them."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings, self.parts = path, settings, {}
        if path.exists():
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.get("settings") == settings:
                self.parts = value["parts"]

    def add(self, name: str, value: object) -> None:
        """Keep a part."""
        self.parts[name] = value
        lines = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(one)}" for key, one in self.parts.items())
        head = json.dumps({"date": date.today().isoformat(), "settings": self.settings}, indent=1)[:-2]
        write_text(self.path, f'{head},\n "parts": {{\n  {lines}\n }}\n}}\n')


def run(options: Options, emulator: Emulator, kept: Kept) -> None:
    """Emulate every part that is not kept yet."""
    for strategy in STRATEGIES:
        for ranks in sorted({*options.ranks, options.detail}):
            if (name := f"{strategy}, {ranks} ranks") not in kept.parts:
                kept.add(name, rounded(emulator.epoch(strategy, ranks)))
        for label, conditions in stages(options).items():
            if (name := f"{strategy}, {options.detail} ranks, {label}") not in kept.parts:
                kept.add(name, rounded(emulator.epoch(strategy, options.detail, conditions)))
    for baseline in BASELINES:
        for ranks in milestones(options):
            for strategy in COMPARED:
                if (name := f"{strategy} as fast as {baseline} on {ranks} ranks") not in kept.parts:
                    kept.add(name, emulator.ranks_needed(strategy, baseline, ranks))


def cluster(options: Options) -> Cluster:
    """Return the cluster with jitter and exchange."""
    return Cluster(
        options.jitter, 1.0, gradient_bytes=options.gradient_bytes, bandwidth=options.bandwidth, latency=options.latency
    )


def stages(options: Options) -> dict[str, Cluster]:
    """Return what is emulated, from the computing only to everything."""
    return {
        "computing only": Cluster(),
        "jitter": Cluster(options.jitter),
        "a slow rank": dataclasses.replace(cluster(options), straggler=options.straggler),
        "three times the jitter": dataclasses.replace(cluster(options), jitter=3 * options.jitter),
    }


def milestones(options: Options) -> list[int]:
    """Return the numbers of ranks for which as fast ones are looked for."""
    return sorted({options.ranks[0], options.detail, options.ranks[-1]})


def rounded(epoch: Emulated) -> dict[str, float]:
    return {name: round(value, 5) for name, value in dataclasses.asdict(epoch).items()}


def show(options: Options, parts: dict[str, Any]) -> str:
    """Return the result as Markdown tables."""

    def table(head: Sequence[object], rows: dict[str, list[str]]) -> str:
        lines = [" | ".join(map(str, head)), "---|" + "---:|" * (len(head) - 1)]
        lines += [" | ".join([name, *cells]) for name, cells in rows.items()]
        return "\n".join(f"| {line} |" if not line.startswith("-") else f"|{line}" for line in lines)

    epochs = {name: [parts[f"{name}, {ranks} ranks"] for ranks in options.ranks] for name in STRATEGIES}
    texts = [
        table(
            ["epoch, hours", *options.ranks], {n: [f"{e['seconds'] / 3600:.3f}" for e in r] for n, r in epochs.items()}
        ),
        table(["waiting", *options.ranks], {n: [f"{e['waiting']:.1%}" for e in r] for n, r in epochs.items()}),
        table(["updates an epoch", *options.ranks], {n: [f"{e['steps']:,}" for e in r] for n, r in epochs.items()}),
    ]
    first, second, *more = stages(options)
    rows = {}
    for name in STRATEGIES:
        prefix = f"{name}, {options.detail} ranks"
        found = [parts[f"{prefix}, {label}"] for label in (first, second)] + [parts[prefix]]
        found += [parts[f"{prefix}, {label}"] for label in more]
        rows[name] = [f"{e['seconds'] / 3600:.3f}, {e['waiting']:.1%}" for e in found]
    head = [
        f"{options.detail} ranks: hours, waiting",
        first,
        second,
        "jitter, exchange",
        *(f"and {one}" for one in more),
    ]
    texts.append(table(head, rows))
    rows = {}
    for baseline in BASELINES:
        for ranks in milestones(options):
            needed = [parts[f"{name} as fast as {baseline} on {ranks} ranks"] for name in COMPARED]
            rows[f"{baseline} on {ranks}"] = [f"{n} ({ranks / n:.1f}x)" if n else f"> {2 * ranks}" for n in needed]
    texts.append(table(["GPUs for the epoch time of", *COMPARED], rows))
    return "\n\n".join(texts)


def draw(options: Options, parts: dict[str, Any]) -> None:
    """Draw epoch time and waiting by the number of ranks."""
    from canter.reporting.figures import COLORS, styled

    @styled
    def figure() -> Figure:
        drawn = Figure(figsize=(11.0, 3.6), layout="constrained")
        left, right = drawn.subplots(1, 2)
        for color, name in zip(COLORS, STRATEGIES):
            row = [parts[f"{name}, {ranks} ranks"] for ranks in options.ranks]
            look: dict[str, Any] = {"color": color, "marker": "o", "markersize": 4}
            look["linestyle"] = "--" if "mixed" in name else "-"  # it lies on that of `balanced`
            left.plot(options.ranks, [e["seconds"] / 3600 for e in row], **look)
            right.plot(options.ranks, [e["waiting"] for e in row], label=name, **look)
        left.set(yscale="log", title="epoch, hours (emulated)")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.yaxis.set_minor_formatter(NullFormatter())
        right.set(title="waiting, fraction of computing (emulated)", ylim=(0, None))
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set(xlabel="ranks", xticks=options.ranks, xticklabels=options.ranks)
            axes.tick_params(length=0, which="both")
        drawn.legend(loc="outside right center")
        return drawn

    assert options.figure is not None
    figure().savefig(options.figure, dpi=110, facecolor="white")


def main(options: Options) -> None:
    if options.smoke:
        options = dataclasses.replace(options, utterances=3000, ranks=(2, 4), detail=4)
    budget, index = read_budget(options.budget), draw_lengths(options.lengths, options.utterances)
    times = StepTimes.from_table(budget, read_table(options.table)) if options.table else StepTimes(budget)
    settings = {
        name: Path(value).name if isinstance(value, str | Path) else list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(options).items()
        if name not in ("output", "figure")
    }
    began = time.perf_counter()
    kept = Kept(options.output, settings | {"fingerprints": [index.fingerprint, budget.fingerprint]})
    run(options, Emulator(index, budget, times, cluster(options), options.draws), kept)
    print(show(options, kept.parts))
    print(f"\n{time.perf_counter() - began:.0f} s; {options.output} written")
    if options.figure:
        draw(options, kept.parts)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
