"""Inspect a manifest or a length index: counts, quantiles, sources, the joint histogram and outliers; or list the rows
whose text does not fit their audio."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from canter.cli.lengths import LengthOptions, print_skipped
from canter.cli.suspects import SuspectOptions, list_suspects
from canter.extras import require
from canter.redaction import redacted

if TYPE_CHECKING:
    from rich.console import Console

    from canter.corpus.index import LengthIndex
    from canter.corpus.statistics import Summary

SHADES = " ·░▒▓█"
BARS = " ▁▂▃▄▅▆▇█"
WIDTH, HEIGHT = 64, 18  # of the histogram in the terminal, in cells
STANDARD_DEVIATIONS = 4.0  # of tokens per second from the mean, from which a row is an outlier


@dataclass(frozen=True, kw_only=True)
class Options(LengthOptions, SuspectOptions):
    worst: int = 10
    """Number of outliers to list, the farthest first: rows whose tokens per second are 4 standard deviations or more
    from the mean."""
    figure: Path | None = None
    """Draw the joint histogram into this PNG (or SVG, PDF)."""


def run(options: Options) -> int | None:
    from canter.cli.lengths import is_estimated
    from canter.corpus.statistics import QUANTILES, summarise
    from canter.errors import ConfigError

    if options.worst < 0:
        raise ConfigError(f"--worst is {options.worst}; it must be 0 or more")
    if options.figure:
        require("matplotlib", "--figure")
    if options.suspects is None and (options.output or options.language):
        raise ConfigError("--output and --language are for --suspects; leave them out, or name a model")
    if options.suspects is not None:
        if options.figure:
            raise ConfigError("--figure draws lengths, and --suspects lists rows: use one of them")
        index = options.open_index()
        print_skipped(index)
        list_suspects(options, index, options.worst, options.json)
        return
    index = options.open_index()
    summary = summarise(index, z_bound=STANDARD_DEVIATIONS, most_outliers=options.worst)
    if options.json:
        made = {"fingerprint": index.fingerprint, "tokens_estimated": is_estimated(index), "at": QUANTILES}
        print(json.dumps({**made, **asdict(summary)}, indent=2))
    else:
        print_summary(index, summary, options.index.name)
    if options.figure:
        from canter.reporting.figures import lengths_figure

        lengths_figure(index, options.figure, summary, options.index.stem)


def print_summary(index: LengthIndex, summary: Summary, name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from canter.cli.lengths import is_estimated
    from canter.corpus.statistics import QUANTILES

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:  # a pipe has no width at which to cut a table off
        console = Console(highlight=False, soft_wrap=True, width=160)
    console.print(
        f"[bold]{name}[/bold]: {summary.rows:,} utterances, {summary.hours:,.2f} hours, "
        f"{summary.tokens:,} tokens{' (estimated)' if is_estimated(index) else ''}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for quantile in QUANTILES:
        heading = {0.0: "least", 0.5: "median", 1.0: "most"}.get(quantile, f"{100 * quantile:g} %")
        table.add_column(heading, justify="right")
    for column, values in summary.quantiles.items():
        cells = [f"{value:.0f}" if column == "tokens" else f"{value:.2f}" for value in values]
        table.add_row(column.replace("_", " "), *cells)
    console.print(table)
    if len(summary.sources) > 1:
        print_sources(console, summary)
    print_histogram(console, index)
    print_outliers(console, index, summary)
    for kind, count in summary.skipped.items():
        console.print(f"left out of the index, {count:,}: {kind}", markup=False)


def print_sources(console: Console, summary: Summary) -> None:
    from rich.table import Table

    headings = ("utterances", "hours", "% of draws", "mean seconds", "mean tokens", "tokens/s")
    table = Table("source", *headings, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for one in summary.sources:
        means = (f"{value:.2f}" for value in (one.mean_seconds, one.mean_tokens, one.tokens_per_second))
        table.add_row(one.name, f"{one.rows:,}", f"{one.hours:,.2f}", f"{100 * one.weight:.2f}", *means)
    console.print(table)


def print_histogram(console: Console, index: LengthIndex) -> None:
    """Print seconds to the right and tokens upwards, with their distributions at the edges; shades are logarithmic."""
    import numpy as np

    from canter.corpus.statistics import joint_histogram

    counts, seconds, tokens = joint_histogram(index, WIDTH, HEIGHT)
    shade = np.ceil(np.log1p(counts) / np.log1p(counts.max()) * (len(SHADES) - 1)).astype(int)
    top = counts.sum(axis=1)
    bars = np.ceil(top / top.max() * (len(BARS) - 1)).astype(int)
    right = counts.sum(axis=0)
    console.print("\n" + " " * 9 + "".join(BARS[bar] for bar in bars), markup=False)
    height = len(right)
    for row in reversed(range(height)):
        label = f"{tokens[row]:7d} │" if row in (height - 1, height // 2) else " " * 7 + " │"
        bar = "█" * round(14 * right[row] / right.max())
        console.print(label + "".join(SHADES[level] for level in shade[:, row]) + "│" + bar, markup=False)
    console.print("      0 └" + "─" * WIDTH + "┘", markup=False)
    middle = f"{seconds[WIDTH // 2]:.1f}"
    last = f"{seconds[-1]:.1f} s and more"
    axis = "0".ljust(WIDTH // 2 - len(middle) // 2) + middle
    console.print("tokens   " + axis.ljust(WIDTH - len(last)) + last + "\n", markup=False)


def print_outliers(console: Console, index: LengthIndex, summary: Summary) -> None:
    from rich.markup import escape
    from rich.table import Table

    console.print(
        f"{summary.beyond_bound:,} utterances above {summary.rate_bound:.1f} tokens a second "
        f"(mean {summary.mean_rate:.1f} + {summary.z_bound:g} standard deviations)"
    )
    if not summary.outliers:
        return
    table = Table("row", "seconds", "tokens", "tokens/s", "z", "utterance", box=None, pad_edge=False)
    for column in table.columns[:-1]:
        column.justify = "right"
    for one in summary.outliers:
        figures = f"{one.seconds:.2f}", str(one.tokens), f"{one.tokens_per_second:.1f}", f"{one.z:+.1f}"
        table.add_row(str(one.row), *figures, escape(text_and_file(index, one.row)))
    console.print(table)


def text_and_file(index: LengthIndex, row: int) -> str:
    """Return an outlier's text and file, or nothing where they cannot be read."""
    from canter.errors import ManifestError

    try:
        found = index.utterance(row)
    except ManifestError:
        return ""
    text = found.text if len(found.text) <= 40 else found.text[:39] + "…"
    return f"{Path(redacted(found.audio_filepath)).name}: {text}"
