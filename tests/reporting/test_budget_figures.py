import numpy as np

from canter.planning.budget import Budget, Polynomial
from canter.reporting.budget_figures import budget_figure
from canter.tuning.probe import Probe


def test_points_contours_and_utterances_are_drawn(tmp_path):
    budget = Budget(1e9, Polynomial(T=1e5, U=1e4), Polynomial(T=1e-4), 1e7)
    shapes = [(1, 20, 5), (4, 50, 20), (16, 100, 40)]
    probes = [Probe(*s, 1.02 * budget.bytes(*s), budget.step_seconds(*s)) for s in shapes]
    probes += [Probe(2, 50, 20, 3e7, float("nan")), Probe(999, 100, 40, 2e9, float("nan"), False)]
    seconds, tokens = np.linspace(1, 9, 50), np.linspace(3, 50, 50)
    figure = budget_figure(budget, probes, seconds, tokens)
    memory, time, largest = figure.axes[:3]
    assert len(memory.collections[-1].get_offsets()) == 4  # type: ignore[arg-type]
    assert len(time.collections[-1].get_offsets()) == 3  # type: ignore[arg-type]
    assert "2.0%" in memory.get_title(loc="left")
    assert "0.0%" in time.get_title(loc="left")
    assert any(len(c.get_offsets()) == 50 for c in largest.collections)  # type: ignore[arg-type]
    figure.savefig(tmp_path / "budget.png")
    assert (tmp_path / "budget.png").stat().st_size > 10_000
