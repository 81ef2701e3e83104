"""The ladder of batching strategies on your lengths: what each pads, fills, waits and costs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Options:
    index: tyro.conf.Positional[Path]
    """A length index, or a Parquet or Arrow table with `duration` and `num_tokens` (or `tokens`)."""
    budget: Path | None = None
    """A budget file, made by `canter tune`. Without one, an analytic budget of --model and --memory serves."""
    model: str = "canary-1b"
    """Shape of the analytic budget."""
    memory: float = 80.0
    """Gigabytes of the analytic budget's device."""
    ranks: int = 8
    """GPUs that share the micro-batches of a step."""
    micro_batches_per_step: int | None = None
    """Micro-batches of an optimiser step; the ranks unless given."""
    window: int | None = None
    """Utterances that `balanced` sorts together (50,000 unless given)."""
    mixing: float = 1.0
    """Dial of `balanced`: 1 pads least, more mixes more."""
    seed: int = 0
    """Another seed, another shuffle."""
    prompt_tokens: int = 0
    """Added, with one for the end, to the column `tokens` of a table of lengths."""
    json: bool = False
    """Rows as JSON on standard output."""
    markdown: bool = False
    """Rows as a Markdown table on standard output."""
    figure: Path | None = None
    """Also draw the ladder into this PNG."""


def run(options: Options) -> int | None:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from canter.cli.lengths import choose_budget, open_lengths, progress_console
    from canter.errors import PlanError
    from canter.planning.compare import compare, ladder, markdown

    if options.ranks < 1:
        raise PlanError(f"--ranks is {options.ranks}; it must be at least 1")
    index = open_lengths(options.index, options.prompt_tokens)
    budget = choose_budget(options.budget, options.model, options.memory)
    strategies = ladder(options.window, options.mixing)
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
        )
        for row, following in zip(found, [*(name for name, _, _ in strategies[1:]), "done"]):
            rows.append(row)
            progress.update(task, advance=1, description=following)
    if options.figure:
        from canter.reporting.ladder import ladder_figure

        ladder_figure(rows, options.figure)
    if options.json:
        from canter.cli.lengths import plain

        print(
            json.dumps({"budget": budget.as_json(), "rows": [plain(row.as_json()) for row in rows]}, indent=2)
        )
    elif options.markdown:
        sys.stdout.write(markdown(rows))
    else:
        show(rows, len(index), options)


def show(rows: list, utterances: int, options: Options) -> None:
    from rich.console import Console
    from rich.table import Table

    from canter.planning.compare import COLUMNS, cells

    budget = options.budget.name if options.budget else f"{options.model} on {options.memory:g} GB (analytic)"
    table = Table(
        title=f"{options.index.name}: {utterances:,} utterances, {budget}, {options.ranks} ranks",
        caption="speed at equal GPUs and GPUs at equal wall time are against the first row",
        title_justify="left",
        caption_justify="left",
    )
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for row in rows:
        table.add_row(*cells(row), style="bold" if row is rows[-1] else "")
    console = Console()
    # a table cut off at the edge of a pipe or a narrow terminal helps nobody
    Console(width=max(console.width, 150) if not console.is_terminal else None).print(table)
