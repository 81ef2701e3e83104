"""Compare batching strategies on your lengths: padding, memory filled, waiting and time of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from canter.cli.lengths import PlanOptions
from canter.extras import require

if TYPE_CHECKING:
    from rich.table import Table

    from canter.planning.compare import Rung


@dataclass(frozen=True, kw_only=True)
class Options(PlanOptions):
    ranks: int = 8
    """Number of GPUs that share the micro-batches of a step."""
    figure: Path | None = None
    """Draw the comparison into this PNG."""


def run(options: Options) -> int | None:
    from rich.console import Console
    from rich.progress import track

    from canter.cli.lengths import check_ranks, is_estimated, none_fits, plain, print_skipped
    from canter.planning.compare import compare, ladder

    if options.figure:
        require("matplotlib", "--figure")
    index = options.open_index()
    check_ranks(options.ranks, len(index), "utterances")
    budget = options.choose_budget()
    strategies = ladder(options.batching_window, options.mixing, options.mix_steps, options.accumulation)
    found = compare(
        index,
        budget,
        strategies,
        ranks=options.ranks,
        micro_batches_per_step=options.micro_batches,
        seed=options.seed,
        min_steps=options.min_steps,
        max_tokens_per_second=options.max_tokens_per_second,
    )
    bar = track(found, "planning", total=len(strategies), console=Console(stderr=True), transient=True)
    rows = []
    for row in bar:
        if not row.figures.utterances:
            raise none_fits(index, budget)
        rows.append(row)
    print_skipped(index)
    if options.figure:
        from canter.reporting.figures import ladder_figure

        ladder_figure(rows, options.figure)
    if options.json:
        value = {
            "budget": budget.as_json(),
            "tokens_estimated": is_estimated(index),
            "rows": [plain(row.as_json()) for row in rows],
        }
        print(json.dumps(value, indent=2))
    else:
        made = budget.measured_on
        named = options.budget.name if options.budget else f"{made['model']} on {made['device']}"
        estimated = ", tokens estimated" if is_estimated(index) else ""
        title = f"{options.index.name}: {len(index):,} utterances{estimated}, {named}, {options.ranks} ranks"
        print_comparison(rows, title)


CAPTION = "speed at equal GPUs and GPUs at equal wall time are against the first row"
# columns that a narrow terminal drops, the first ones first, after columns of zeros
EXPENDABLE: tuple[str, ...] = (
    "steps", "epoch hours", "padded audio", "padded tokens", "left out", "over", "GPUs", "waiting", "step mixing",
    "mean batch", "mixing pool", "memory filled",
)  # fmt: skip


def print_comparison(rows: Sequence[Rung], title: str, caption: str | None = CAPTION) -> None:
    """Print a line for each row. A terminal too narrow for all columns gets fewer; a pipe gets all."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    wide = console.options.update(max_width=1000)
    values = [row.cells() for row in rows]
    idle = [name for name in ("over", "left out") if all(value[name] == "0" for value in values)]
    expendable = [*idle, *(name for name in EXPENDABLE if name not in idle)]
    shown = list(values[0])
    table = ladder_table(values, shown)
    while (needs := Measurement.get(console, wide, table).maximum) > console.width and expendable:
        if not console.is_terminal:
            console = Console(width=needs)
            break
        shown.remove(expendable.pop(0))
        table = ladder_table(values, shown)
    console.print(title, style="bold", highlight=False)
    console.print(table)
    missing = [name for name in values[0] if name not in shown]
    if missing:
        console.print(f"no room for {', '.join(missing)}: --json prints all", highlight=False)
    if caption:
        console.print(caption, style="dim", highlight=False)


def ladder_table(values: Sequence[Mapping[str, str]], columns: Sequence[str]) -> Table:
    """Return the table, the default strategy in bold, with one header word a line."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for name in columns:
        table.add_column(
            name.replace(" ", "\n"), justify="left" if name == "strategy" else "right", vertical="bottom", no_wrap=True
        )
    for value in values:
        table.add_row(
            *(value[name] for name in columns), style="bold" if value["strategy"].startswith("balanced") else ""
        )
    return table
