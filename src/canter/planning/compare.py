"""The ladder: every strategy on the same lengths and budget, as rows of figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from canter.planning.budget import Budget
from canter.planning.lengths import Index, RateLimits
from canter.planning.metrics import Figures, mixing_pool
from canter.planning.plan import Plan
from canter.planning.strategies import Balanced, Bucket1D, Bucket2D, Duration, Random, Strategy


@dataclass(frozen=True, slots=True)
class Rung:
    """One row of the ladder. speed and gpus are against the first row (1.0 and `ranks` there)."""

    name: str
    figures: Figures
    ranks: int
    mixing_pool: float
    left_out: int
    speed: float = 1.0  # times as many utterances an hour on as many GPUs
    gpus: int = 1  # that take no longer over an utterance than the first row's ranks

    def as_json(self) -> dict[str, Any]:
        value = asdict(self)
        return {"name": value.pop("name"), **value.pop("figures"), **value}


def ladder(
    window: int | None = None, mixing: float = 1.0, mix_steps: bool = False
) -> list[tuple[str, Strategy, int | None]]:
    """(label, strategy, window) of the rows that `canter compare` shows."""
    balanced = Balanced(mixing, mix_steps)
    window = balanced.default_window if window is None else window
    return [
        ("random", Random(), None),
        ("duration 360 s", Duration(), None),
        ("bucket_1d 30", Bucket1D(), None),
        ("bucket_2d 30x2", Bucket2D(synchronised=False), None),
        ("bucket_2d 30x2 in step", Bucket2D(), None),
        ("bucket_2d 30x5 in step", Bucket2D(30, 5), None),
        ("bucket_2d 60 optimal", Bucket2D(20, 3, optimal=True), None),
        (f"balanced W={short(window)}{' mixed' if mix_steps else ''}", balanced, window),
    ]


def short(count: int | None) -> str:
    """50000 as 50k."""
    if count is None:
        return "all"
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else f"{count}"


def rung(name: str, plan: Plan, ranks: int) -> Rung:
    """A row, from this epoch and the next."""
    figures = plan.figures(ranks)
    pool = mixing_pool(plan.batch_of_rows(), plan.at_epoch(plan.epoch + 1).batch_of_rows())
    return Rung(name, figures, ranks, pool, len(plan.index) - figures.utterances)


def compare(
    index: Index,
    budget: Budget,
    strategies: Sequence[tuple[str, Strategy, int | None]] | None = None,
    *,
    ranks: int = 8,
    micro_batches_per_step: int | None = None,
    seed: int = 0,
    min_steps: int | None = None,
    max_tokens_per_second: RateLimits = None,
) -> Iterator[Rung]:
    """Yield the rows in order, each as soon as it is known. M is the ranks unless given."""
    first: Rung | None = None
    for name, strategy, window in strategies if strategies is not None else ladder():
        plan = Plan(
            index,
            budget,
            strategy,
            seed=seed,
            window=window,
            micro_batches_per_step=ranks if micro_batches_per_step is None else micro_batches_per_step,
            min_steps=min_steps,
            max_tokens_per_second=max_tokens_per_second,
        )
        row = rung(name, plan, ranks)
        first = first or row
        yield against(row, first)


def against(row: Rung, first: Rung) -> Rung:
    """The row with its speed and GPUs measured against the first: hours per utterance, so that one who leaves
    utterances out gains nothing by it."""
    if not row.figures.utterances or not first.figures.utterances:
        return row
    ratio = (row.figures.hours / row.figures.utterances) / (first.figures.hours / first.figures.utterances)
    return replace(row, speed=1 / ratio, gpus=max(1, math.ceil(first.ranks * ratio - 1e-9)))


COLUMNS: tuple[str, ...] = (
    "strategy", "padded audio", "padded tokens", "padded compute", "mean batch", "memory filled", "over", "steps",
    "epoch hours", "waiting", "step mixing", "mixing pool", "left out", "speed", "GPUs",
)  # fmt: skip


def cells(row: Rung) -> tuple[str, ...]:
    """A row's figures as text, in the order of COLUMNS."""
    f = row.figures
    pool = f"{row.mixing_pool:,.0f}" if math.isfinite(row.mixing_pool) else "all"
    return (
        row.name,
        f"{f.padded_audio:.1%}",
        f"{f.padded_tokens:.1%}",
        f"{f.padded_compute:.1%}",
        f"{f.mean_batch:.1f}",
        f"{f.memory_filled:.1%}",
        f"{f.over:,}",
        f"{f.steps:,}",
        f"{f.hours:.3f}" if f.hours >= 0.001 else f"{f.hours:.0e}",
        f"{f.waiting:.3f}",
        f"{f.step_mixing:.2f}",
        pool,
        f"{row.left_out:,}",
        f"{row.speed:.2f}x",
        f"{row.gpus}",
    )


def markdown(rows: Iterable[Rung]) -> str:
    """The ladder as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    return "\n".join(lines + ["| " + " | ".join(cells(row)) + " |" for row in rows]) + "\n"
