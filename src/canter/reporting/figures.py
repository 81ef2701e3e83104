"""Draw the figures of reports and commands with matplotlib.

Colours are Okabe and Ito's, which colour-blind readers can distinguish. `canter.reporting.html` turns the colours of
text, muted text and grid into CSS variables, so that a figure fits light and dark pages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from canter.errors import ConfigError

if TYPE_CHECKING:
    from canter.corpus.index import LengthIndex
    from canter.corpus.statistics import Summary
    from canter.planning.budget import Budget
    from canter.planning.compare import Rung
    from canter.tuning.probe import Probe

INK, MUTED, GRID = "#1b2330", "#69727f", "#dfe3e8"
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
COLORS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)

STYLE = matplotlib.RcParams(
    {
        "font.family": "sans-serif",
        "font.size": 10.5,
        "svg.fonttype": "none",
        "svg.hashsalt": "canter",
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.labelsize": 10,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "figure.facecolor": "none",
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 9.5,
    }
)
# dark blue to orange: the ends of the map, too near to black and to white, are left out
BATCH_COLORS = ListedColormap(matplotlib.colormaps["plasma"](np.linspace(0.05, 0.82, 256)))
HALF, WIDE = (5.4, 3.1), (11.0, 3.4)  # inches; half and full width of a page
LEVEL_COLORS = (ORANGE, PURPLE)
MOST_POINTS = 600  # of a line; more cannot be distinguished at the width of a page
MOST_UTTERANCES = 5_000  # drawn as points
BATCH_LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

IMAGE_GREY, IMAGE_GREEN, IMAGE_RED = "#9aa5b1", "#1f7a5c", "#b3423a"  # of images for files, on white

P = ParamSpec("P")
Values = Sequence[float] | np.ndarray


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorate a function so that it draws with STYLE, without changing the process's matplotlib settings."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def smooth(values: Values, window: int) -> np.ndarray:
    """Return the centred running mean (N,), ignoring NaN; the window shrinks at both ends."""
    array = np.asarray(values, dtype=float)
    known = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    place = np.arange(len(array))
    low, high = np.maximum(place - window // 2, 0), np.minimum(place + window // 2 + 1, len(array))
    total = counts[high] - counts[low]
    return np.divide(sums[high] - sums[low], total, out=np.full(len(array), np.nan), where=total > 0)


def downsampled(values: Values, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (places, minima, maxima) of at most ``most`` groups of neighbouring values (N,).

    A place is the middle of its group. Minimum and maximum are NaN where a group has no value.
    """
    array = np.asarray(values, dtype=float)
    edges = np.linspace(0, len(array), min(most, len(array)) + 1).astype(int)
    known = np.isfinite(array)
    starts = edges[:-1]
    lows = np.minimum.reduceat(np.where(known, array, np.inf), starts)
    highs = np.maximum.reduceat(np.where(known, array, -np.inf), starts)
    some = np.isfinite(lows)
    return (starts + edges[1:] - 1) // 2, np.where(some, lows, np.nan), np.where(some, highs, np.nan)


@styled
def draw_curves(
    series: Mapping[str, tuple[Values, Values]],
    *,
    xlabel: str = "step",
    log: bool = False,
    percent: bool = False,
    smoothed: bool = False,
    markers: bool = False,
    zero: bool = True,
    levels: Mapping[str, float] | None = None,
    marks: Mapping[str, float] | None = None,
    size: tuple[float, float] = HALF,
) -> Figure:
    """Draw lines over steps, each with at most `MOST_POINTS` points.

    ``smoothed`` draws the values faintly under their running mean of N/50 points. ``levels`` maps names to values drawn
    as dashed lines, ``marks`` names to steps drawn as dotted lines.
    """
    figure, axes = _axes(size, xlabel)
    for color, (name, (x, y)) in zip(COLORS, series.items()):
        x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        places = downsampled(y)[0]
        if smoothed and len(y) > 20:
            places, low, high = downsampled(y)
            if len(y) > MOST_POINTS:
                axes.fill_between(x[places], low, high, color=color, alpha=0.18, linewidth=0)
            else:
                axes.plot(x, y, color=color, alpha=0.22, linewidth=1)
            y = smooth(y, max(3, len(y) // 50))
        if len(y) > MOST_POINTS:
            places = np.union1d(places, [0, len(y) - 1])
            x, y = x[places], y[places]
        axes.plot(x, y, color=color, label=name, marker="o" if markers else None, markersize=4)
    for color, (name, value) in zip(LEVEL_COLORS, (levels or {}).items()):
        axes.axhline(value, color=color, linewidth=1.3, linestyle=(0, (5, 3)), label=name)
    for name, step in (marks or {}).items():
        axes.axvline(step, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            name,
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            color=MUTED,
            fontsize=9,
        )
    if log:
        axes.set_yscale("log")
    elif zero:
        axes.set_ylim(bottom=0)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if len(series) + len(levels or {}) > 1:
        axes.legend()
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


@styled
def draw_batch_shapes(frames: Values, tokens: Values, batch: Values, *, size: tuple[float, float] = HALF) -> Figure:
    """Draw every batch as a point: its longest audio (frames) and its longest target (tokens)."""
    figure, axes = _axes(size, "encoder frames, longest of the batch")
    axes.set_ylabel("tokens, longest of the batch")
    low, high = (min(batch), max(batch)) if len(batch) else (1, 1)
    points = axes.scatter(
        frames,
        tokens,
        c=list(batch),
        s=16,
        cmap=BATCH_COLORS,
        norm=LogNorm(max(low, 1), max(high, low + 1, 2)),
        alpha=0.8,
        linewidths=0,
        rasterized=len(batch) > 2000,
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _batch_size_bar(figure, axes, points)
    return figure


@styled
def draw_histogram(values: Values, *, xlabel: str, bins: int = 40, size: tuple[float, float] = HALF) -> Figure:
    """Draw a histogram with the median marked; values above the 99.5th percentile are in the last bin."""
    figure, axes = _axes(size, xlabel)
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    if len(array):
        top = float(np.quantile(array, 0.995))
        axes.hist(np.minimum(array, top), bins=bins, color=BLUE, alpha=0.85, rwidth=0.92)
        median = float(np.median(array))
        axes.axvline(median, color=VERMILLION, linewidth=1.4)
        axes.annotate(
            f"median {median:.3g}",
            (median, 1),
            xycoords=("data", "axes fraction"),
            xytext=(5, -3),
            textcoords="offset points",
            va="top",
            color=VERMILLION,
            fontsize=9.5,
        )
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


@styled
def draw_rank_timeline(seconds: Sequence[Sequence[float]], *, size: tuple[float, float] | None = None) -> Figure:
    """Draw successive steps on every rank: ``seconds`` (steps, ranks) of computing; waiting in grey."""
    table = np.asarray(seconds, dtype=float)
    ranks = table.shape[1]
    figure, axes = _axes(size or (11.0, min(7.0, 1.1 + 0.28 * ranks)), "seconds")
    slowest = table.max(axis=1)
    starts = np.concatenate([[0.0], np.cumsum(slowest)[:-1]])
    for rank in range(ranks):
        axes.broken_barh(list(zip(starts, slowest)), (rank - 0.4, 0.8), facecolors=GRID, rasterized=table.size > 5000)
        colors = [(BLUE, SKY)[step % 2] for step in range(len(table))]
        axes.broken_barh(
            list(zip(starts, table[:, rank])), (rank - 0.4, 0.8), facecolors=colors, rasterized=table.size > 5000
        )
    axes.set_ylabel("rank")
    axes.set_xlim(0, float(slowest.sum()))
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(visible=False)
    return figure


@styled
def draw_lengths(seconds: Values, tokens: Values, *, size: tuple[float, float] = HALF) -> Figure:
    """Draw utterances as points, duration and target length, with the histogram of durations on top."""
    figure = Figure(figsize=size, layout="constrained")
    top, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3.2])
    top.hist(seconds, bins=50, color=BLUE, alpha=0.85, rwidth=0.92)
    top.grid(visible=False)
    top.set_yticks([])
    top.spines["left"].set_visible(False)
    top.tick_params(length=0, labelbottom=False)
    axes.scatter(seconds, tokens, s=7, alpha=0.35, color=BLUE, linewidths=0, rasterized=True)
    axes.set(xlabel="seconds", ylabel="tokens", xlim=(0, None), ylim=(0, None))
    axes.tick_params(length=0)
    return figure


@styled
def draw_padding(
    batches: Mapping[str, Values], *, packed: Collection[str] = (), size: tuple[float, float] = (11.0, 2.7)
) -> Figure:
    """Draw batches as they lie in memory: one row for each utterance, its audio coloured and its padding grey.

    ``batches`` maps a caption to the seconds of a batch's utterances; those of ``packed`` are drawn without padding.
    All panels share their scales.
    """
    figure = Figure(figsize=size, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(batches), sharex=True, sharey=True))
    for axes, color, (name, seconds) in zip(panels, (ORANGE, BLUE), batches.items()):
        longest, rows = max(seconds), range(len(seconds))
        if name not in packed:
            axes.barh(rows, [longest] * len(seconds), color=GRID, height=0.74)
        axes.barh(rows, seconds, color=color, height=0.74)
        padding = f"{1 - sum(seconds) / (longest * len(seconds)):.0%} padding"
        axes.set_title(f"{name}: {'packed' if name in packed else padding}")
        axes.set(yticks=[], xlabel="seconds", xlim=(0, None))
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
    panels[0].invert_yaxis()
    return figure


@styled
def draw_epochs(
    names: Sequence[str],
    epoch_hours: Values,
    padded: Values,
    *,
    best: str | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Draw a bar for each strategy, as long as its epoch, with the time spent on padding in grey.

    ``padded`` are fractions of the compute, 0 to 1. ``best`` is drawn in the accent colour.
    """
    figure, axes = _axes(size or (11.0, 0.85 + 0.5 * len(names)), "")
    hours = np.asarray(epoch_hours, dtype=float)
    longest = hours.max()
    scale, unit = (1, "hours") if longest >= 3 else (60, "minutes") if longest >= 0.05 else (3600, "seconds")
    hours, fraction = hours * scale, np.asarray(padded, dtype=float)
    rows = np.arange(len(names))
    axes.barh(rows, hours * (1 - fraction), height=0.62, color=[BLUE if name == best else SKY for name in names])
    axes.barh(rows, hours * fraction, left=hours * (1 - fraction), height=0.62, color=GRID)
    for row, total, part in zip(rows, hours, fraction):
        label = f"{total:.3g} {unit}  ·  {part:.1%} padding"
        axes.annotate(label, (total, row), xytext=(7, 0), textcoords="offset points", va="center", fontsize=10)
    axes.set_yticks(rows, names, fontsize=10.5, color=INK)
    axes.set_xlim(0, hours.max() * 1.24)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.set_xticks([])
    return figure


@styled
def draw_stacked_bars(
    names: Sequence[str], parts: Mapping[str, Values], *, xlabel: str, size: tuple[float, float] | None = None
) -> Figure:
    """Draw stacked horizontal bars, such as the seconds spent in encoder and decoder."""
    figure, axes = _axes(size or (11.0, 1.25 + 0.42 * len(names)), xlabel)
    left = np.zeros(len(names))
    for color, (part, values) in zip((BLUE, ORANGE, GREEN), parts.items()):
        axes.barh(range(len(names)), values, left=left, height=0.6, color=color, label=part)
        left = left + np.asarray(values, dtype=float)
    for row, total in enumerate(left):
        axes.annotate(f"{total:.3g}", (total, row), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), names, fontsize=10.5, color=INK)
    axes.set_xlim(0, left.max() * 1.1 if len(left) else 1)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.legend(loc="lower right")
    return figure


def _axes(size: tuple[float, float], xlabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.tick_params(length=0)
    return figure, axes


@styled
def budget_figure(
    budget: Budget, probes: Sequence[Probe], seconds: Values, tokens: Values, *, size: tuple[float, float] = (11.0, 3.4)
) -> Figure:
    """Draw memory and time of probes, predicted and measured, beside the largest batch by duration and tokens.

    Utterances (N,) are points.
    """
    figure = Figure(figsize=size, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.35))
    fitting = [p for p in probes if p.fits]
    scale, unit = (2**30, "GiB") if max((p.bytes for p in fitting), default=1.0) >= 2**30 else (2**20, "MiB")
    _against(
        left, [budget.bytes(*p.shape) / scale for p in fitting], [p.bytes / scale for p in fitting], f"memory, {unit}"
    )
    timed = [p for p in fitting if np.isfinite(p.seconds)]
    _against(middle, [budget.step_seconds(*p.shape) for p in timed], [p.seconds for p in timed], "a step, seconds")
    _largest(figure, right, budget, np.asarray(seconds, float), np.asarray(tokens, float))
    return figure


@styled
def draw_largest_batches(
    budget: Budget, seconds: Values, tokens: Values, *, size: tuple[float, float] = HALF
) -> Figure:
    """Draw the largest batch by duration and tokens, with the utterances (N,) as points."""
    figure = Figure(figsize=size, layout="constrained")
    _largest(figure, figure.subplots(), budget, np.asarray(seconds, float), np.asarray(tokens, float))
    return figure


def _against(axes: Axes, predicted: Values, measured: Values, what: str) -> None:
    """Draw points on logarithmic axes around the line of equality."""
    axes.set(xlabel=f"{what}, predicted", ylabel="measured")
    axes.tick_params(length=0)
    if not len(measured):
        return
    x, y = np.asarray(predicted, float), np.asarray(measured, float)
    low, high = 0.8 * min(x.min(), y.min()), 1.25 * max(x.max(), y.max())
    axes.plot([low, high], [low, high], color=MUTED, linewidth=1)
    axes.fill_between([low, high], [0.9 * low, 0.9 * high], [1.1 * low, 1.1 * high], color=MUTED, alpha=0.12)
    axes.scatter(x, y, s=22, color=BLUE, alpha=0.85, linewidths=0)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    error = float(np.median(np.abs(x / y - 1)))
    axes.set_title(f"median error {error:.1%} (grey: ±10%)", color=INK)


def _largest(figure: Figure, axes: Axes, budget: Budget, seconds: np.ndarray, tokens: np.ndarray) -> None:
    known = np.isfinite(seconds) & (seconds > 0)
    seconds, tokens = seconds[known], tokens[known]
    right = float(seconds.max()) * 1.03 if len(seconds) else 30.0
    top = float(tokens.max()) * 1.06 if len(tokens) else 200.0
    x, y = np.linspace(right / 200, right, 200), np.linspace(1, max(top, 2.0), 160)
    grid = np.maximum(1, budget.max_batch(*np.meshgrid(budget.frames(x), y.astype(np.int64))))
    low = int(grid.min())
    norm = LogNorm(low, max(low + 1, int(grid.max())))
    colors = axes.pcolormesh(x, y, grid, norm=norm, cmap=BATCH_COLORS, rasterized=True, alpha=0.85)
    levels = [level for level in BATCH_LEVELS if grid.min() < level < grid.max()]
    if levels:
        lines = axes.contour(x, y, grid, levels=levels, colors="white", linewidths=0.8)
        axes.clabel(lines, fmt="%d", fontsize=8.5)
    stride = slice(None, None, max(1, len(seconds) // MOST_UTTERANCES))
    axes.scatter(seconds[stride], tokens[stride], s=3, color="white", alpha=0.5, linewidths=0, rasterized=True)
    oversized = budget.max_batch(budget.frames(seconds[stride]), tokens[stride].astype(np.int64)) < 1
    axes.scatter(seconds[stride][oversized], tokens[stride][oversized], s=9, color=VERMILLION, linewidths=0)
    axes.set(xlabel="seconds", ylabel="tokens", xlim=(0, right), ylim=(0, top))
    axes.grid(visible=False)
    axes.tick_params(length=0)
    bar = _batch_size_bar(figure, axes, colors, "largest batch")
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if grid.max() < 300 * low else (1,)))


def _batch_size_bar(figure: Figure, axes: Axes, drawn: ScalarMappable, label: str = "batch size") -> Colorbar:
    bar = figure.colorbar(drawn, ax=axes, pad=0.02, aspect=30)
    bar.set_label(label, color=MUTED)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(length=0)
    return bar


def ladder_figure(rows: Sequence[Rung], path: str | Path) -> None:
    """Write an image of padded compute, memory filled and speed of each strategy, the best last."""
    names = [row.name for row in rows]
    panels = (
        ("padded compute (%)", [100 * row.figures.padded_compute for row in rows], "{:.1f}"),
        ("memory filled (%)", [100 * row.figures.memory_filled for row in rows], "{:.0f}"),
        (f"speed on {rows[0].ranks} GPUs (x)" if rows else "speed", [row.speed for row in rows], "{:.2f}"),
    )
    figure = Figure(figsize=(12, 0.45 * len(rows) + 1.2), layout="constrained")
    for axes, (title, values, form) in zip(figure.subplots(1, len(panels), sharey=True), panels):
        colours = [IMAGE_GREY] * (len(values) - 1) + [IMAGE_GREEN]
        bars = axes.barh(range(len(values)), values, color=colours)
        axes.bar_label(bars, labels=[form.format(v) for v in values], padding=3, fontsize=9)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, max([*values, 1e-9]) * 1.18)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(bottom=False, labelbottom=False, left=False)
    figure.gca().invert_yaxis()
    _save(figure, path)


def lengths_figure(index: LengthIndex, path: str | Path, summary: Summary, title: str) -> None:
    """Write an image of the joint histogram of seconds and tokens, with its margins.

    Shades are logarithmic; the line is the tokens per second above which rows are outliers, marks in the margins are
    medians. The last bins hold everything longer.
    """
    from canter.corpus.statistics import QUANTILES, joint_histogram

    counts, seconds, tokens = joint_histogram(index, 120, 90)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    top, corner, joint, right = figure.subplots(
        2, 2, sharex="col", sharey="row", gridspec_kw={"height_ratios": (1, 4), "width_ratios": (5, 1)}
    ).flat
    corner.remove()
    shown = np.ma.masked_equal(counts.T, 0)
    mesh = joint.pcolormesh(seconds, tokens, shown, norm=LogNorm(1, max(2, counts.max())), cmap="YlGnBu")
    end = min(seconds[-1], tokens[-1] / summary.rate_bound) if summary.rate_bound > 0 else seconds[-1]
    label = f"{summary.rate_bound:.1f} tokens a second (mean + {summary.z_bound:g} standard deviations)"
    joint.plot([0, end], [0, end * summary.rate_bound], color=IMAGE_RED, linewidth=1, label=label)
    joint.set(xlabel="seconds", ylabel="tokens, prompt and end included", xlim=(0, seconds[-1]), ylim=(0, tokens[-1]))
    joint.legend(loc="upper left", frameon=False, fontsize=8)
    median = QUANTILES.index(0.5)
    top.stairs(counts.sum(axis=1), seconds, fill=True, color=IMAGE_GREY)
    top.axvline(summary.quantiles["seconds"][median], color=IMAGE_GREEN, linewidth=1.5)
    right.stairs(counts.sum(axis=0), tokens, fill=True, color=IMAGE_GREY, orientation="horizontal")
    right.axhline(summary.quantiles["tokens"][median], color=IMAGE_GREEN, linewidth=1.5)
    for margin, side in ((top, "left"), (right, "bottom")):
        margin.spines[["top", "right", side]].set_visible(False)
    top.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
    right.tick_params(bottom=False, labelbottom=False, left=False, labelleft=False)
    joint.spines[["top", "right"]].set_visible(False)
    top.set_title(f"{title}: {summary.rows:,} utterances, {summary.hours:,.1f} hours", loc="left", fontsize=11)
    figure.colorbar(mesh, ax=right, label="utterances", shrink=0.8)
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the figure cannot be written to {path}: {error}") from None
