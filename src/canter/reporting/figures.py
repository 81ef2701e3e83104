"""Figures of the reports: each function takes plain data and returns a matplotlib ``Figure``.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Text, muted text and grid use three
colours that `canter.reporting.html` turns into CSS variables, so that one figure reads well on light and dark
pages.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

INK, MUTED, GRID = "#1b2330", "#69727f", "#dfe3e8"
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
)
COLORS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)

STYLE: dict[Any, Any] = {
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
# dark blue to orange: the ends of the map, too near to black and to white, are left out
BATCH_COLORS = ListedColormap(matplotlib.colormaps["plasma"](np.linspace(0.05, 0.82, 256)))
HALF, WIDE = (5.4, 3.1), (11.0, 3.4)  # inches; half and full width of a page
LEVEL_COLORS = (ORANGE, PURPLE)
MOST_POINTS = 600  # of a line; more cannot be told apart at the width of a page

P = ParamSpec("P")
Values = Sequence[float] | np.ndarray


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draws with STYLE, and leaves the process's own matplotlib settings alone."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def smooth(values: Values, window: int) -> np.ndarray:
    """Centred running mean (N,) that ignores NaN; the window shrinks at both ends."""
    array = np.asarray(values, dtype=float)
    known = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    place = np.arange(len(array))
    low, high = np.maximum(place - window // 2, 0), np.minimum(place + window // 2 + 1, len(array))
    total = counts[high] - counts[low]
    return np.divide(sums[high] - sums[low], total, out=np.full(len(array), np.nan), where=total > 0)


def downsampled(values: Values, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (places, lows, highs) of at most ``most`` runs of neighbouring values (N,): the place of each run's
    middle, and its least and greatest value. NaN where a run has no value."""
    array = np.asarray(values, dtype=float)
    edges = np.linspace(0, len(array), min(most, len(array)) + 1).astype(int)
    known = np.isfinite(array)
    starts = edges[:-1]
    lows = np.minimum.reduceat(np.where(known, array, np.inf), starts)
    highs = np.maximum.reduceat(np.where(known, array, -np.inf), starts)
    some = np.isfinite(lows)
    return (starts + edges[1:] - 1) // 2, np.where(some, lows, np.nan), np.where(some, highs, np.nan)


@styled
def curves(
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
    """Draw lines over steps, each of at most `MOST_POINTS` points.

    ``smoothed`` draws the values faintly under their running mean of N/50 points; ``levels`` are values drawn as dashed
    lines, ``marks`` steps drawn as dotted ones, both with their names.
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
def batch_shapes(
    frames: Values,
    tokens: Values,
    batch: Values,
    *,
    size: tuple[float, float] = HALF,
) -> Figure:
    """Every batch as a point, its longest audio (frames) against its longest target (tokens)."""
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
    bar = figure.colorbar(points, ax=axes, pad=0.02, aspect=30)
    bar.set_label("batch size", color=MUTED)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(length=0)
    return figure


@styled
def histogram(values: Values, *, xlabel: str, bins: int = 40, size: tuple[float, float] = HALF) -> Figure:
    """How often which value; the median is marked, values over the 99.5th percentile join the last bin."""
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
def rank_timeline(seconds: Sequence[Sequence[float]], *, size: tuple[float, float] | None = None) -> Figure:
    """Steps as they follow one another on every rank: (steps, ranks) seconds of computing, then waiting in grey for
    the slowest."""
    table = np.asarray(seconds, dtype=float)
    ranks = table.shape[1]
    figure, axes = _axes(size or (11.0, min(7.0, 1.1 + 0.28 * ranks)), "seconds")
    slowest = table.max(axis=1)
    starts = np.concatenate([[0.0], np.cumsum(slowest)[:-1]])
    for rank in range(ranks):
        axes.broken_barh(list(zip(starts, slowest)), (rank - 0.4, 0.8), facecolors=GRID, rasterized=table.size > 5000)
        colors = [(BLUE, SKY)[step % 2] for step in range(len(table))]
        axes.broken_barh(
            list(zip(starts, table[:, rank])),
            (rank - 0.4, 0.8),
            facecolors=colors,
            rasterized=table.size > 5000,
        )
    axes.set_ylabel("rank")
    axes.set_xlim(0, float(slowest.sum()))
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(visible=False)
    return figure


@styled
def lengths(seconds: Values, tokens: Values, *, size: tuple[float, float] = HALF) -> Figure:
    """The corpus as points: duration against target length, with the histogram of durations on top."""
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
def padding_picture(batches: Mapping[str, Values], *, size: tuple[float, float] = (11.0, 2.7)) -> Figure:
    """Batches as they lie in memory: a row an utterance, its audio coloured and its padding grey.

    ``batches`` maps a caption to the seconds of one batch's utterances; all share both axes' scales.
    """
    figure = Figure(figsize=size, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(batches), sharex=True, sharey=True))
    for axes, color, (name, seconds) in zip(panels, (ORANGE, BLUE), batches.items()):
        longest, rows = max(seconds), range(len(seconds))
        axes.barh(rows, [longest] * len(seconds), color=GRID, height=0.74)
        axes.barh(rows, seconds, color=color, height=0.74)
        axes.set_title(f"{name}: {1 - sum(seconds) / (longest * len(seconds)):.0%} padding")
        axes.set(yticks=[], xlabel="seconds", xlim=(0, None))
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
    panels[0].invert_yaxis()
    return figure


@styled
def ladder(
    names: Sequence[str],
    epoch_hours: Values,
    padded: Values,
    *,
    best: str | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Strategies as bars as long as an epoch takes, the share of padding grey at their end.

    ``padded`` are shares of the compute, 0 to 1. ``best`` is drawn in the accent colour.
    """
    figure, axes = _axes(size or (11.0, 0.85 + 0.5 * len(names)), "")
    hours = np.asarray(epoch_hours, dtype=float)
    longest = hours.max()
    scale, unit = (1, "hours") if longest >= 3 else (60, "minutes") if longest >= 0.05 else (3600, "seconds")
    hours, share = hours * scale, np.asarray(padded, dtype=float)
    rows = np.arange(len(names))
    axes.barh(rows, hours * (1 - share), height=0.62, color=[BLUE if name == best else SKY for name in names])
    axes.barh(rows, hours * share, left=hours * (1 - share), height=0.62, color=GRID)
    for row, total, part in zip(rows, hours, share):
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
def split_bars(
    names: Sequence[str],
    parts: Mapping[str, Values],
    *,
    xlabel: str,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Stacked horizontal bars, such as the seconds spent in encoder and decoder."""
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
