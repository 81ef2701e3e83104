"""Plan an epoch: print the figures of its batches, and write every row's place to a table on request."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from canter.cli.lengths import PlanOptions

if TYPE_CHECKING:
    from canter.planning import Limits
    from canter.planning.metrics import Figures


@dataclass(frozen=True, kw_only=True)
class Options(PlanOptions):
    strategy: Literal["random", "duration", "bucket_1d", "bucket_2d", "balanced", "packed"] = "balanced"
    """Batching strategy."""
    epoch: int = 0
    """Number of the epoch, from 0."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Parquet table to write, with the columns step, micro_batch, rank, row."""
    bins: bool = False
    """With `bucket_2d`: print the bins and batch sizes, and with --max-tokens-per-second its limit for each bin, in the
    form of NeMo's configuration."""


def run(options: Options) -> int | None:
    from canter.cli.lengths import check_ranks, is_estimated, none_fits, plain, print_skipped, steps_folder
    from canter.errors import PlanError
    from canter.planning import Plan, strategy
    from canter.planning.strategies import Balanced, Bucket2D

    settings = {"mixing": options.mixing, "mix_steps": options.mix_steps}
    if options.strategy != "balanced":
        for name, value in settings.items():
            if value != getattr(Balanced(), name):
                raise PlanError(f"--{name.replace('_', '-')} is an option of 'balanced'; {options.strategy} has none")
        settings = {}
    elif options.mix_steps:
        settings["accumulation"] = options.accumulation
    if options.output and not options.output.parent.is_dir():
        raise PlanError(f"--output {options.output}: there is no folder {options.output.parent}; make it first")
    index = options.open_index()
    budget = options.choose_budget()
    check_ranks(options.ranks, len(index), "utterances")
    chosen = strategy(options.strategy, **settings)
    if options.bins:
        from canter.integrations.nemo import bucketing_config
        from canter.planning.bins import resolve_limits

        if not isinstance(chosen, Bucket2D):
            raise PlanError("--bins goes with --strategy bucket_2d")
        limits = resolve_limits(options.max_tokens_per_second, index, budget)
        print(bucketing_config(chosen.bins(index, budget, limits=limits), budget, limits=limits))
        return
    plan = Plan(
        index,
        budget,
        chosen,
        seed=options.seed,
        epoch=options.epoch,
        window=options.batching_window,
        micro_batches_per_step=options.micro_batches,
        min_steps=options.min_steps,
        max_tokens_per_second=options.max_tokens_per_second,
        cache=steps_folder(index),
    )
    figures = plan.figures(options.ranks)
    limits = plan.limits()
    if not figures.utterances:
        raise none_fits(index, budget)
    check_ranks(options.ranks, figures.micro_batches)
    left_out = plan.left_out()
    reasons = Counter(reason for _, reason in left_out)
    print_skipped(index)
    if options.output:
        plan.write(options.output, options.ranks)
    if options.json:
        value = {
            **asdict(figures),
            "limits": asdict(limits),
            "tokens_estimated": is_estimated(index),
            "left_out": dict(reasons),
            "left_out_rows": [row for row, _ in left_out[:1000]],
        }
        print(json.dumps(plain(value), indent=2))
    else:
        title = f"{options.index.name}: {options.strategy}, {options.ranks} ranks"
        print_plan(title, figures, limits, left_out, reasons)


def print_plan(
    title: str, figures: Figures, limits: Limits, left_out: Sequence[tuple[int, str]], reasons: Mapping[str, int]
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
    console.print(title, style="bold", highlight=False)
    console.print(table)
    console.print(limits.line("--min-steps"), highlight=False, soft_wrap=True)
    for row, reason in left_out[:5]:
        console.print(f"row {row}: {reason}", highlight=False)
    if len(left_out) > 5:
        console.print(f"... and {len(left_out) - 5:,} more (--json lists them)", highlight=False)
