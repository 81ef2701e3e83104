import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.errors import BudgetError
from canter.planning import Plan
from canter.tuning.fit import anchors, corners, fit, fit_budget, least_squares, within
from canter.tuning.probe import Probe, Prober

from .conftest import Messages, small_step

numbers = st.floats(0.0, 10.0)


@settings(max_examples=50)
@given(st.lists(numbers, min_size=6, max_size=6).filter(lambda v: max(v) > 0.1), st.integers(0, 100))
def test_non_negative_coefficients_are_found_again(true, seed):
    columns = np.random.default_rng(seed).uniform(0.1, 1.0, (30, 6))
    values = columns @ np.array(true)
    found = least_squares(columns, values)
    assert (found >= 0).all()
    np.testing.assert_allclose(columns @ found, values, rtol=1e-6)


def test_a_budget_explains_its_probes():
    rng = np.random.default_rng(0)
    probes = []
    for b, t, u in zip(rng.integers(1, 20, 30), rng.integers(5, 200, 30), rng.integers(5, 80, 30)):
        size = 1e6 + b * (1000 * t + 3 * t * t + 500 * u)
        probes.append(Probe(int(b), int(t), int(u), int(size), 0.01 + b * (1e-4 * t + 1e-6 * t * u)))
    held_up = Probe(5, 50, 20, probes[0].bytes, 9.0)  # by something else on the machine
    budget = fit([*probes, Probe(*held_up.shape, 1e6 + 5 * (50e3 + 7500 + 1e4), 9.0)], 1e12, 0.08, {"model": "x"})
    for p in probes:
        assert abs(budget.bytes(p.batch, p.frames, p.tokens) / p.bytes - 1) < 0.01
        assert abs(budget.step_seconds(p.batch, p.frames, p.tokens) / p.seconds - 1) < 0.01
    assert budget.measured_on["memory_error"] < 0.01


def test_probes_that_show_no_growth_still_give_a_budget():
    probes = [Probe(b, t, u, 1000, 0.01 / b) for b, t, u in ((1, 10, 5), (2, 20, 5), (4, 40, 9), (8, 50, 9))]
    budget = fit(probes, 1e9, 0.08, {})
    assert budget.fixed_seconds == budget.fixed_bytes == 0
    assert budget.step_seconds(8, 50, 9) > budget.step_seconds(1, 10, 5) > 0


def test_anchors_are_lengths_of_utterances_however_few():
    frames, tokens = np.array([10, 100, 1000]), np.array([3, 30, 300])
    assert set(anchors(frames, tokens, (0.1, 0.3, 0.7, 1.0))) <= {(10, 3), (100, 30), (1000, 300)}


def test_anchors_cover_the_lengths():
    frames, tokens = np.arange(10, 200), np.arange(10, 200) // 3 + 5
    points = anchors(frames, tokens, (0.05, 0.5, 1.0))
    assert max(t for t, _ in points) == 199
    assert min(t for t, _ in points) < 25
    assert max(u for _, u in points) == tokens.max()
    assert points == sorted(points)


@pytest.mark.parametrize("most", [12, 40])
def test_few_steps_find_the_costs_and_nothing_breaks(known_costs, formula, index, most):
    limit = formula.bytes(30, 100, 40)
    prober = Prober(known_costs, limit)
    budget = fit_budget(prober, index, most_probes=most)
    assert len(prober.known) <= most
    assert prober.steps <= most
    assert prober.out_of_memory <= 5
    for shape in ((3, 20, 10), (10, 60, 30), (30, 100, 40)):
        real = formula.bytes(*shape) + prober.step.state_bytes
        assert abs(budget.bytes(*shape) / real - 1) < 0.02
        assert abs(budget.step_seconds(*shape) / formula.seconds(*shape) - 1) < 0.05
    assert 0.97 * limit < budget.limit_bytes <= limit
    for step in Plan(index, budget):
        for rows in step:
            shape = len(rows), int(budget.frames(index.seconds[rows]).max()), int(index.tokens[rows].max())
            assert formula.bytes(*shape) <= limit


def test_the_extremes_of_the_plan_are_among_the_probes(known_costs, formula, index):
    prober = Prober(known_costs, formula.bytes(30, 100, 40))
    budget = fit_budget(prober, index)
    wanted = corners(index, budget)
    assert len(wanted) >= 3
    size = [budget.bytes(*shape) for shape in wanted]
    assert max(size) > 0.9 * budget.limit_bytes
    assert max(p.bytes for p in prober.probes) > 0.9 * budget.limit_bytes
    assert max(p.batch for p in prober.probes) >= max(shape.batch for shape in wanted) / 1.1


def test_where_the_formula_is_wrong_the_margin_grows(known_costs, formula, index):
    honest = Prober(known_costs, formula.bytes(30, 100, 40))
    fit_budget(honest, index)
    plain = formula.bytes
    formula.bytes = lambda b, t, u: int(plain(b, t, u) * (1.15 if b * t > 1500 else 1.0))
    prober = Prober(known_costs, plain(30, 100, 40))
    budget = fit_budget(prober, index)
    assert budget.measured_on["margin"] > 0.03
    for p in prober.fitting:
        if p.bytes > 0.5 * prober.limit_bytes:
            assert p.bytes <= budget.bytes(*p.shape) * (1 + budget.measured_on["margin"]) * 1.0001


def test_an_utterance_that_does_not_fit_by_itself_is_reported(known_costs, formula, index):
    said = Messages()
    prober = Prober(known_costs, formula.bytes(1, 80, 20), events=said)
    budget = fit_budget(prober, index)
    assert any("one utterance of" in line and "left out of plans" in line for line in said.lines)
    assert budget.max_batch(100, 40) == 0
    assert budget.max_batch(30, 10) >= 1


def test_a_second_run_makes_no_step_again(known_costs, formula, index, tmp_path):
    limit, path = formula.bytes(30, 100, 40), tmp_path / "b.probes.jsonl"
    first = fit_budget(Prober(known_costs, limit, {}, path), index)
    ran = len(formula.ran)
    lines = path.read_text().splitlines()
    assert fit_budget(Prober(known_costs, limit, {}, path), index) == first
    assert len(formula.ran) <= ran + 1  # the warm-up
    path.write_text("\n".join(lines[:9]) + "\n")  # interrupted after nine
    formula.ran.clear()
    assert fit_budget(Prober(known_costs, limit, {}, path), index) == first
    assert len(formula.ran) <= len(lines) - 9 + 1


def test_a_small_model_measured_for_real(model, index):
    prober = Prober(small_step(model), 1e9)
    budget = fit_budget(prober, index, most_probes=12, most_frames=200)
    assert max(p.batch * p.frames for p in prober.probes) <= 220
    assert budget.bytes(4, 50, 20) > budget.bytes(1, 50, 20) > prober.step.state_bytes
    assert budget.step_seconds(4, 50, 20) > 0


def test_rows_a_model_cannot_take(index):
    assert within(index, 100.0, 1000) is index
    some = within(index, 5.0, 1000)
    assert some.seconds.max() <= 5.0
    assert 0 < len(some) < len(index)
    with pytest.raises(BudgetError, match="not one of 200 utterances is within"):
        within(index, 0.1, 10)
