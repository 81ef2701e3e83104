"""The ladder of batching strategies as one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from canter.planning.compare import Rung


def ladder_figure(rows: Sequence[Rung], path: str | Path) -> None:
    """Draws padded compute, memory filled and speed of each strategy (best last) into an image at `path`."""
    from matplotlib.figure import Figure

    names = [row.name for row in rows]
    panels = (
        ("padded compute (%)", [100 * row.figures.padded_compute for row in rows], "{:.1f}"),
        ("memory filled (%)", [100 * row.figures.memory_filled for row in rows], "{:.0f}"),
        (f"speed on {rows[0].ranks} GPUs (x)" if rows else "speed", [row.speed for row in rows], "{:.2f}"),
    )
    figure = Figure(figsize=(12, 0.45 * len(rows) + 1.2), layout="constrained")
    for axes, (title, values, form) in zip(figure.subplots(1, len(panels), sharey=True), panels):
        colours = ["#9aa5b1"] * (len(values) - 1) + ["#1f7a5c"]
        bars = axes.barh(range(len(values)), values, color=colours)
        axes.bar_label(bars, labels=[form.format(v) for v in values], padding=3, fontsize=9)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, max([*values, 1e-9]) * 1.18)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(bottom=False, labelbottom=False, left=False)
    figure.gca().invert_yaxis()
    figure.savefig(path, dpi=150)
