"""Figures of a budget: what was predicted against what was measured, and the largest batch for every length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from canter.planning.budget import Budget
from canter.reporting.figures import BATCH_COLORS, BLUE, HALF, INK, MUTED, VERMILLION, Values, styled

if TYPE_CHECKING:
    from canter.tuning.probe import Probe

SHOWN = 5_000  # utterances drawn as points
LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@styled
def budget_figure(
    budget: Budget,
    probes: Sequence[Probe],
    seconds: Values,
    tokens: Values,
    *,
    size: tuple[float, float] = (11.0, 3.4),
) -> Figure:
    """Memory and time of the steps measured, predicted against measured, and beside them the largest batch over
    duration and tokens, with the utterances (N,) on top."""
    figure = Figure(figsize=size, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.35))
    fitting = [p for p in probes if p.fits]
    scale, unit = _unit(max((p.bytes for p in fitting), default=1.0))
    _against(
        left,
        [budget.bytes(*p.shape) / scale for p in fitting],
        [p.bytes / scale for p in fitting],
        f"memory, {unit}",
    )
    timed = [p for p in fitting if np.isfinite(p.seconds)]
    _against(middle, [budget.step_seconds(*p.shape) for p in timed], [p.seconds for p in timed], "a step, seconds")
    _largest(figure, right, budget, np.asarray(seconds, float), np.asarray(tokens, float))
    return figure


@styled
def largest_batches(budget: Budget, seconds: Values, tokens: Values, *, size: tuple[float, float] = HALF) -> Figure:
    """The largest batch over duration and tokens, with the utterances (N,) on top."""
    figure = Figure(figsize=size, layout="constrained")
    _largest(figure, figure.subplots(), budget, np.asarray(seconds, float), np.asarray(tokens, float))
    return figure


def _unit(largest: float) -> tuple[float, str]:
    return (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")


def _against(axes: Axes, predicted: Values, measured: Values, what: str) -> None:
    """Points on logarithmic axes around the line where both are equal."""
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
    """The largest batch as colour and contours; utterances as points."""
    known = np.isfinite(seconds) & (seconds > 0)
    seconds, tokens = seconds[known], tokens[known]
    right = float(seconds.max()) * 1.03 if len(seconds) else 30.0
    top = float(tokens.max()) * 1.06 if len(tokens) else 200.0
    x, y = np.linspace(right / 200, right, 200), np.linspace(1, max(top, 2.0), 160)
    grid = np.maximum(1, budget.max_batch(*np.meshgrid(budget.frames(x), y.astype(np.int64))))
    low = int(grid.min())
    norm = LogNorm(low, max(low + 1, int(grid.max())))
    colors = axes.pcolormesh(x, y, grid, norm=norm, cmap=BATCH_COLORS, rasterized=True, alpha=0.85)
    levels = [level for level in LEVELS if grid.min() < level < grid.max()]
    if levels:
        lines = axes.contour(x, y, grid, levels=levels, colors="white", linewidths=0.8)
        axes.clabel(lines, fmt="%d", fontsize=8.5)
    stride = slice(None, None, max(1, len(seconds) // SHOWN))
    axes.scatter(seconds[stride], tokens[stride], s=3, color="white", alpha=0.5, linewidths=0, rasterized=True)
    alone = budget.max_batch(budget.frames(seconds[stride]), tokens[stride].astype(np.int64)) < 1
    axes.scatter(seconds[stride][alone], tokens[stride][alone], s=9, color=VERMILLION, linewidths=0)
    axes.set(xlabel="seconds", ylabel="tokens", xlim=(0, right), ylim=(0, top))
    axes.grid(visible=False)
    axes.tick_params(length=0)
    bar = figure.colorbar(colors, ax=axes, pad=0.02, aspect=30)
    bar.set_label("largest batch", color=MUTED)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if grid.max() < 300 * low else (1,)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(length=0)
