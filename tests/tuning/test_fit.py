import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.tuning.fit import fit, least_squares, measure_budget, probe_shapes
from canter.tuning.probe import Probe, probe

numbers = st.floats(0.0, 10.0)


@settings(max_examples=50, deadline=None)
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
    budget = fit(probes, 1e12, 0.08, {"model": "x"})
    for p in probes:
        assert abs(budget.bytes(p.batch, p.frames, p.tokens) / p.bytes - 1) < 0.01
        assert abs(budget.step_seconds(p.batch, p.frames, p.tokens) / p.seconds - 1) < 0.01
    assert budget.measured_on["memory_error"] < 0.01


def test_probes_that_show_no_growth_still_give_a_budget():
    probes = [Probe(b, t, u, 1000, 0.01 / b) for b, t, u in ((1, 10, 5), (2, 20, 5), (4, 40, 9), (8, 50, 9))]
    budget = fit(probes, 1e9, 0.08, {})
    assert budget.fixed_seconds == budget.fixed_bytes == 0
    assert budget.step_seconds(8, 50, 9) > budget.step_seconds(1, 10, 5) > 0


def test_saved_bytes_grow_with_the_batch_and_leave_parameters_out():
    linear = torch.nn.Linear(64, 64)

    def step(batch, frames, tokens):
        linear(torch.relu(torch.randn(batch * frames, 64))).relu().sum().backward()

    one, four = probe(step, 1, 10, 1), probe(step, 4, 10, 1)
    assert 0 < one.bytes < 64 * 64 * 4 + 4 * 10 * 64 * 4
    assert abs(four.bytes / one.bytes - 4) < 0.2
    assert one.seconds > 0


def test_measuring_covers_the_lengths():
    frames, tokens = np.arange(10, 200), np.arange(10, 200) // 3 + 5
    shapes = probe_shapes(frames, tokens, 300)
    assert max(t for _, t, _ in shapes) == 199
    assert min(t for _, t, _ in shapes) < 25
    assert all(b * t <= 300 or b == 1 for b, t, _ in shapes)
    seen = []
    x = torch.randn(8, 8, requires_grad=True)

    def step(b, t, u):
        seen.append((b, t, u))
        (torch.randn(b * t, 8) @ x).square().sum().backward()

    budget = measure_budget(
        step, frames, tokens, limit_bytes=1e9, batch_frames=300, frame_seconds=0.08, measured_on={}
    )
    assert set(shapes) <= set(seen)
    assert budget.frame_seconds == 0.08
