"""Compare every strategy on the same lengths and budget, as rows of figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from canter.planning.budget import Budget
from canter.planning.lengths import GivenLimits, Index
from canter.planning.metrics import Figures, mixing_pool
from canter.planning.plan import Plan
from canter.planning.strategies import Balanced, Bucket1D, Bucket2D, Duration, Packed, Random, Strategy

Rows = Sequence[tuple[str, Strategy, int | None]]
"""(label, strategy, window) of the rows to compare."""


@dataclass(frozen=True, slots=True)
class Rung:
    """A row of the comparison. speed and gpus are relative to the first row (1.0 and `ranks` there)."""

    name: str
    figures: Figures
    ranks: int
    mixing_pool: float
    left_out: int
    speed: float = 1.0  # utterances an hour on the same number of GPUs
    gpus: int = 1  # number of GPUs on which an utterance takes no longer than on the first row's ranks

    def as_json(self) -> dict[str, object]:
        value = asdict(self)
        return {"name": value.pop("name"), **value.pop("figures"), **value}

    def cells(self) -> dict[str, str]:
        """Return the figures as text, by their column."""
        f = self.figures
        return {
            "strategy": self.name,
            "padded audio": f"{f.padded_audio:.1%}",
            "padded tokens": f"{f.padded_tokens:.1%}",
            "padded compute": f"{f.padded_compute:.1%}",
            "mean batch": f"{f.mean_batch:.1f}",
            "memory filled": f"{f.memory_filled:.1%}",
            "over": f"{f.over:,}",
            "steps": f"{f.steps:,}",
            "epoch hours": f"{f.hours:.3f}" if f.hours >= 0.001 else f"{f.hours:.0e}",
            "waiting": f"{f.waiting:.3f}",
            "step mixing": f"{f.step_mixing:.2f}",
            "mixing pool": f"{self.mixing_pool:,.0f}" if math.isfinite(self.mixing_pool) else "all",
            "left out": f"{self.left_out:,}",
            "speed": f"{self.speed:.2f}x",
            "GPUs": f"{self.gpus}",
        }


def ladder(window: int | None = None, mixing: float = 1.0, mix_steps: bool = False, accumulation: int = 1) -> Rows:
    """Return the rows that `canter compare` shows; the options are those of `Balanced`."""
    balanced = Balanced(mixing, mix_steps, accumulation)
    window = balanced.default_window if window is None else window
    thousands = f"{window // 1000}k" if window and window % 1000 == 0 else f"{window}"
    return [
        ("random", Random(), None),
        ("duration 360 s", Duration(), None),
        ("bucket_1d 30", Bucket1D(), None),
        ("bucket_2d 30x2", Bucket2D(synchronised=False), None),
        ("bucket_2d 30x2 in step", Bucket2D(), None),
        ("bucket_2d 30x5 in step", Bucket2D(30, 5), None),
        ("bucket_2d 60 optimal", Bucket2D(20, 3, optimal=True), None),
        (f"balanced W={thousands}{' mixed' if mix_steps else ''}", balanced, window),
        ("packed", Packed(), None),
    ]


def compare(
    index: Index,
    budget: Budget,
    strategies: Rows | None = None,
    *,
    ranks: int = 8,
    micro_batches_per_step: int | None = None,
    seed: int = 0,
    min_steps: int | None = None,
    max_tokens_per_second: GivenLimits = None,
) -> Iterator[Rung]:
    """Yield the rows in order, each as soon as it is computed. M is the number of ranks unless given.

    Speed is by hours an utterance, so that a strategy gains nothing by leaving utterances out. The mixing pool is that
    of the first two epochs.
    """
    base = Plan(
        index,
        budget,
        seed=seed,
        micro_batches_per_step=ranks if micro_batches_per_step is None else micro_batches_per_step,
        min_steps=min_steps,
        max_tokens_per_second=max_tokens_per_second,
    )
    first: Figures | None = None
    for name, strategy, window in strategies if strategies is not None else ladder():
        plan = replace(base, strategy=strategy, window=window)
        figures = plan.figures(ranks)
        first = first or figures
        pool = mixing_pool(plan.batch_of_rows(), plan.at_epoch(1).batch_of_rows())
        ratio = 1.0
        if figures.utterances and first.utterances:
            ratio = (figures.hours / figures.utterances) / (first.hours / first.utterances)
        gpus = max(1, math.ceil(ranks * ratio - 1e-9))
        yield Rung(name, figures, ranks, pool, len(index) - figures.utterances, 1 / ratio, gpus)


def markdown(rows: Iterable[Rung]) -> str:
    """Return the rows as a Markdown table."""
    cells = [row.cells() for row in rows]
    lines = [list(cells[0]), *(list(one.values()) for one in cells)]
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    texts.insert(1, "|---|" + "---:|" * (len(lines[0]) - 1))
    return "\n".join(texts) + "\n"
