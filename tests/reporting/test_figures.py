"""Figures hold the data they were given."""

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.planning.budget import Budget, Polynomial
from canter.reporting import figures
from canter.tuning.probe import Probe


@given(st.lists(st.one_of(st.floats(-100, 100), st.just(float("nan"))), min_size=1, max_size=40), st.integers(1, 9))
def test_smooth_is_the_mean_of_known_neighbours(values, window):
    smoothed = figures.smooth(values, window)
    for place, value in enumerate(smoothed):
        near = np.array(values[max(place - window // 2, 0) : place + window // 2 + 1])
        known = near[np.isfinite(near)]
        assert np.isnan(value) if not len(known) else value == pytest.approx(known.mean(), abs=1e-9)


def test_curves_draw_every_series():
    steps = list(range(100))
    figure = figures.draw_curves({"loss": (steps, steps), "CTC": (steps, steps[::-1])}, smoothed=True)
    lines = figure.axes[0].get_lines()
    assert len(lines) == 4  # each faint, and its running mean
    assert list(lines[0].get_ydata()) == steps
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["loss", "CTC"]


def test_long_curves_are_drawn_with_few_points_and_keep_their_extremes():
    steps = np.arange(100_000)
    values = np.sin(steps / 9000) + 2
    values[77_777], values[5] = 9.0, np.nan
    figure = figures.draw_curves({"loss": (steps, values)}, smoothed=True)
    (line,) = figure.axes[0].get_lines()
    assert len(line.get_xdata()) <= figures.MOST_POINTS + 2
    assert (line.get_xdata()[0], line.get_xdata()[-1]) == (0, 99_999)
    (band,) = figure.axes[0].collections  # from the least to the greatest of neighbouring steps
    assert band.get_paths()[0].get_extents().y1 == 9.0
    rate = figures.draw_curves({"learning rate": (steps, values)}).axes[0].get_lines()[0]
    assert len(rate.get_xdata()) <= figures.MOST_POINTS + 2


def test_levels_and_marks_are_named():
    figure = figures.draw_curves({"run": ([1, 2], [3, 4])}, levels={"random": 5.0}, marks={"here": 1.5})
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["run", "random"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["here"]


@given(st.lists(st.one_of(st.floats(-9, 9), st.just(float("nan"))), min_size=1, max_size=50), st.integers(1, 60))
def test_downsampling_keeps_least_and_greatest(values, most):
    places, lows, highs = figures.downsampled(values, most)
    assert len(places) == min(most, len(values))
    assert list(places) == sorted(set(places))
    known = [value for value in values if np.isfinite(value)]
    assert np.nanmin([*lows, np.inf]) == min([*known, np.inf])
    assert np.nanmax([*highs, -np.inf]) == max([*known, -np.inf])


def test_ladder_bars_are_time_split_into_work_and_padding():
    figure = figures.draw_epochs(["random", "balanced"], [2.0, 1.0], [0.5, 0.1], best="balanced")
    bars = figure.axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([60.0, 54.0, 60.0, 6.0])
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert labels == ["120 minutes  ·  50.0% padding", "60 minutes  ·  10.0% padding"]


def test_padding_picture_says_the_share():
    figure = figures.draw_padding({"by chance": [1.0, 2.0, 3.0, 2.0], "alike": [2.0, 2.0]})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["by chance: 33% padding", "alike: 0% padding"]


def test_histogram_keeps_outliers_in_the_last_bin():
    figure = figures.draw_histogram([1.0] * 500 + [2.0] * 500 + [1000.0, float("nan")], xlabel="seconds")
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 1001
    assert figure.axes[0].get_xlim()[1] < 10


@pytest.mark.parametrize("count", [0, 1, 3000])
def test_any_number_of_batches(count):
    shapes = np.arange(1, count + 1)
    figure = figures.draw_batch_shapes(shapes, shapes, shapes)
    figure.canvas.draw()
    assert len(figure.axes[0].collections[0].get_offsets()) == count


def test_settings_of_the_process_do_not_change():
    before = dict(matplotlib.rcParams)
    figures.draw_stacked_bars(["a", "b"], {"encoder": [1, 2], "decoder": [3, 4]}, xlabel="seconds")
    figures.draw_lengths([1.0, 2.0], [3.0, 4.0])
    assert dict(matplotlib.rcParams) == before


def test_points_contours_and_utterances_are_drawn(tmp_path):
    budget = Budget(1e9, Polynomial(T=1e5, U=1e4), Polynomial(T=1e-4), 1e7)
    shapes = [(1, 20, 5), (4, 50, 20), (16, 100, 40)]
    probes = [Probe(*s, 1.02 * budget.bytes(*s), budget.step_seconds(*s)) for s in shapes]
    probes += [Probe(2, 50, 20, 3e7, float("nan")), Probe(999, 100, 40, 2e9, float("nan"), False)]
    seconds, tokens = np.linspace(1, 9, 50), np.linspace(3, 50, 50)
    figure = figures.budget_figure(budget, probes, seconds, tokens)
    memory, time, largest = figure.axes[:3]
    assert len(memory.collections[-1].get_offsets()) == 4  # type: ignore[arg-type]
    assert len(time.collections[-1].get_offsets()) == 3  # type: ignore[arg-type]
    assert "2.0%" in memory.get_title(loc="left")
    assert "0.0%" in time.get_title(loc="left")
    assert any(len(c.get_offsets()) == 50 for c in largest.collections)  # type: ignore[arg-type]
    figure.savefig(tmp_path / "budget.png")
    assert (tmp_path / "budget.png").stat().st_size > 10_000
