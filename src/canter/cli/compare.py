"""The ladder of batching strategies on your lengths: what each pads, fills, waits and costs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from canter.cli.lengths import PlanOptions
from canter.extras import require

if TYPE_CHECKING:
    from rich.table import Table

    from canter.planning.compare import Rung


@dataclass(frozen=True)
class Options(PlanOptions):
    ranks: int = 8
    """GPUs that share the micro-batches of a step."""
    json: bool = False
    """Rows as JSON on standard output."""
    markdown: bool = False
    """Rows as a Markdown table on standard output."""
    figure: Path | None = None
    """Also draw the ladder into this PNG."""


def run(options: Options) -> int | None:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from canter.cli.lengths import (
        check_ranks,
        choose_budget,
        is_estimated,
        none_fits,
        open_lengths,
        progress_console,
        tell_skipped,
    )
    from canter.planning.compare import compare, ladder, markdown
    from canter.planning.lengths import rate_limits

    if options.figure:
        require("matplotlib", "--figure")
    index = open_lengths(options.index, options.prompt_tokens, options.tokenizer, options.columns)
    check_ranks(options.ranks, len(index), "utterances")
    budget = choose_budget(options.budget, options.model, options.memory)
    strategies = ladder(options.window, options.mixing, options.mix_steps)
    rows = []
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=progress_console(),
        transient=True,
    ) as progress:
        task = progress.add_task(strategies[0][0], total=len(strategies))
        found = compare(
            index,
            budget,
            strategies,
            ranks=options.ranks,
            micro_batches_per_step=options.micro_batches_per_step,
            seed=options.seed,
            min_steps=options.min_steps,
            max_tokens_per_second=rate_limits(options.max_tokens_per_second),
        )
        for row, following in zip(found, [*(name for name, _, _ in strategies[1:]), "done"]):
            if not row.figures.utterances:
                raise none_fits(index, budget)
            rows.append(row)
            progress.update(task, advance=1, description=following)
    tell_skipped(index)
    if options.figure:
        from canter.reporting.figures import ladder_figure

        ladder_figure(rows, options.figure)
    if options.json:
        from canter.cli.lengths import plain

        value = {
            "budget": budget.as_json(),
            "tokens_estimated": is_estimated(index),
            "rows": [plain(row.as_json()) for row in rows],
        }
        print(json.dumps(value, indent=2))
    elif options.markdown:
        sys.stdout.write(markdown(rows))
    else:
        made = budget.measured_on
        named = options.budget.name if options.budget else f"{made['model']} on {made['device']}"
        estimated = ", tokens estimated" if is_estimated(index) else ""
        show(
            rows,
            f"{options.index.name}: {len(index):,} utterances{estimated}, {named}, {options.ranks} ranks",
        )


CAPTION = "speed at equal GPUs and GPUs at equal wall time are against the first row"
# what a narrow terminal loses first; a column of zeros before all
EXPENDABLE: tuple[str, ...] = (
    "steps", "epoch hours", "padded audio", "padded tokens", "left out", "over", "GPUs", "waiting", "step mixing",
    "mean batch", "mixing pool", "memory filled",
)  # fmt: skip


def show(rows: Sequence[Rung], title: str, caption: str | None = CAPTION) -> None:
    """Prints the ladder. A row is a line: a terminal too narrow for all columns gets fewer; a pipe gets all."""
    from rich.console import Console
    from rich.measure import Measurement

    from canter.planning.compare import COLUMNS, cells

    console = Console()
    wide = console.options.update(max_width=1000)
    values = [dict(zip(COLUMNS, cells(row))) for row in rows]
    idle = [name for name in ("over", "left out") if all(value[name] == "0" for value in values)]
    expendable = [*idle, *(name for name in EXPENDABLE if name not in idle)]
    shown = list(COLUMNS)
    table = ladder_table(values, shown)
    while (needs := Measurement.get(console, wide, table).maximum) > console.width and expendable:
        if not console.is_terminal:
            console = Console(width=needs)
            break
        shown.remove(expendable.pop(0))
        table = ladder_table(values, shown)
    console.print(title, style="bold", highlight=False)
    console.print(table)
    missing = [name for name in COLUMNS if name not in shown]
    if missing:
        console.print(f"no room for {', '.join(missing)}: --markdown and --json have all", highlight=False)
    if caption:
        console.print(caption, style="dim", highlight=False)


def ladder_table(values: Sequence[Mapping[str, str]], columns: Sequence[str]) -> Table:
    """The last row stands out; header words one below the other."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for name in columns:
        table.add_column(
            name.replace(" ", "\n"),
            justify="left" if name == "strategy" else "right",
            vertical="bottom",
            no_wrap=True,
        )
    for value in values:
        table.add_row(*(value[name] for name in columns), style="bold" if value is values[-1] else "")
    return table
