"""An epoch's batches: their figures, and on request every row's place as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from canter.cli.lengths import PlanOptions

if TYPE_CHECKING:
    from canter.planning import Limits
    from canter.planning.metrics import Figures


@dataclass(frozen=True)
class Options(PlanOptions):
    strategy: Literal["random", "duration", "bucket_1d", "bucket_2d", "balanced"] = "balanced"
    """How to batch."""
    epoch: int = 0
    """Which epoch."""
    emit: Path | None = None
    """Write a Parquet table with the columns step, micro_batch, rank, row."""
    bins: bool = False
    """For `bucket_2d`: print the bins and batch sizes as NeMo's configuration wants them."""
    json: bool = False
    """Figures as JSON on standard output."""


def run(options: Options) -> int | None:
    from canter.cli.lengths import (
        check_ranks,
        choose_budget,
        is_estimated,
        none_fits,
        open_lengths,
        plain,
        steps_folder,
        tell_skipped,
    )
    from canter.errors import PlanError
    from canter.planning import Plan, strategy
    from canter.planning.lengths import rate_limits
    from canter.planning.strategies import Balanced, Bucket2D

    dials = {"mixing": options.mixing, "mix_steps": options.mix_steps}
    if options.strategy != "balanced":
        for name, value in dials.items():
            if value != getattr(Balanced(), name):
                raise PlanError(f"--{name.replace('_', '-')} is a dial of 'balanced'; {options.strategy} has none")
        dials = {}
    if options.emit and not options.emit.parent.is_dir():
        raise PlanError(f"--emit {options.emit}: there is no folder {options.emit.parent}; make it first")
    index = open_lengths(options.index, options.prompt_tokens, options.tokenizer, options.columns)
    budget = choose_budget(options.budget, options.model, options.memory)
    check_ranks(options.ranks, len(index), "utterances")
    chosen = strategy(options.strategy, **dials)
    if options.bins:
        from canter.integrations.nemo import bucketing_config

        if not isinstance(chosen, Bucket2D):
            raise PlanError("--bins goes with --strategy bucket_2d")
        print(bucketing_config(chosen.bins(index, budget), budget))
        return
    plan = Plan(
        index,
        budget,
        chosen,
        seed=options.seed,
        epoch=options.epoch,
        window=options.window,
        micro_batches_per_step=(
            options.ranks if options.micro_batches_per_step is None else options.micro_batches_per_step
        ),
        min_steps=options.min_steps,
        max_tokens_per_second=rate_limits(options.max_tokens_per_second),
        cache=steps_folder(index),
    )
    figures = plan.figures(options.ranks)
    limits = plan.limits()
    if not figures.utterances:
        raise none_fits(index, budget)
    check_ranks(options.ranks, figures.micro_batches)
    left_out = plan.left_out()
    tell_skipped(index)
    reasons: dict[str, int] = {}
    for _, reason in left_out:
        reasons[reason] = reasons.get(reason, 0) + 1
    if options.emit:
        plan.write(options.emit, options.ranks)
    if options.json:
        value = {
            **asdict(figures),
            "limits": plain(asdict(limits)),
            "tokens_estimated": is_estimated(index),
            "left_out": reasons,
            "left_out_rows": [row for row, _ in left_out[:1000]],
        }
        print(json.dumps(plain(value), indent=2))
    else:
        show(figures, limits, left_out, reasons, options)


def show(
    figures: Figures,
    limits: Limits,
    left_out: list[tuple[int, str]],
    reasons: dict[str, int],
    options: Options,
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, text in (
        ("utterances", f"{figures.utterances:,}"),
        ("steps", f"{figures.steps:,}"),
        ("micro-batches", f"{figures.micro_batches:,}"),
        ("mean batch", f"{figures.mean_batch:.1f}"),
        ("padded audio", f"{figures.padded_audio:.2%}"),
        ("padded tokens", f"{figures.padded_tokens:.2%}"),
        ("padded compute", f"{figures.padded_compute:.2%}"),
        ("memory filled", f"{figures.memory_filled:.2%}"),
        ("batches over memory", f"{figures.over:,}"),
        ("waiting", f"{figures.waiting:.4f}"),
        ("epoch hours (modelled)", f"{figures.hours:.4f}"),
        *((f"left out: {reason}", f"{count:,}") for reason, count in reasons.items()),
    ):
        table.add_row(name, text)
    console = Console()
    console.print(f"{options.index.name}: {options.strategy}, {options.ranks} ranks", style="bold", highlight=False)
    console.print(table)
    console.print(limits.line("--min-steps"), highlight=False, soft_wrap=True)
    for row, reason in left_out[:5]:
        console.print(f"row {row}: {reason}", highlight=False)
    if len(left_out) > 5:
        console.print(f"... and {len(left_out) - 5:,} more (--json lists them)", highlight=False)
