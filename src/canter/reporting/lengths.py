"""The joint histogram of seconds and tokens, with its margins, as one figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from canter.errors import ConfigError

if TYPE_CHECKING:
    from canter.corpus.index import LengthIndex
    from canter.corpus.statistics import Summary

GREY, GREEN, RED = "#9aa5b1", "#1f7a5c", "#b3423a"


def lengths_figure(index: LengthIndex, path: str | Path, summary: Summary, title: str) -> None:
    """Draws the lengths of an index into an image at ``path``.

    Shades are logarithmic; the line is the bound on tokens per second beyond which rows are outliers, the
    ticks of the margins are medians. The last bins hold all that is longer.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

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
    joint.plot([0, end], [0, end * summary.rate_bound], color=RED, linewidth=1, label=label)
    joint.set(
        xlabel="seconds",
        ylabel="tokens, prompt and end included",
        xlim=(0, seconds[-1]),
        ylim=(0, tokens[-1]),
    )
    joint.legend(loc="upper left", frameon=False, fontsize=8)
    median = QUANTILES.index(0.5)
    top.stairs(counts.sum(axis=1), seconds, fill=True, color=GREY)
    top.axvline(summary.quantiles["seconds"][median], color=GREEN, linewidth=1.5)
    right.stairs(counts.sum(axis=0), tokens, fill=True, color=GREY, orientation="horizontal")
    right.axhline(summary.quantiles["tokens"][median], color=GREEN, linewidth=1.5)
    for margin, side in ((top, "left"), (right, "bottom")):
        margin.spines[["top", "right", side]].set_visible(False)
    top.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
    right.tick_params(bottom=False, labelbottom=False, left=False, labelleft=False)
    joint.spines[["top", "right"]].set_visible(False)
    top.set_title(f"{title}: {summary.rows:,} utterances, {summary.hours:,.1f} hours", loc="left", fontsize=11)
    figure.colorbar(mesh, ax=right, label="utterances", shrink=0.8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the figure cannot be written to {path}: {error}") from None
