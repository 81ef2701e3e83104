import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.corpus.index import LengthIndex
from canter.planning.budget import Budget, Polynomial
from canter.planning.elastic import share_out
from canter.planning.plan import Plan
from canter.training.batches import limited
from canter.training.config import TrainConfig
from canter.training.measure import synthetic_batch
from canter.training.pace import Pace
from canter.training.prepare import choose_steps, predicted, prepare
from canter.training.speed import AtSpeed

BYTES = Budget(limit_bytes=1e8, fixed_bytes=1e6, memory=Polynomial(T=5e4, TT=100.0, U=1e4, TU=50.0))


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0.1, 60.0), st.integers(3, 200)), min_size=1, max_size=60),
    st.floats(1.0, 100.0),
    st.floats(2e7, 1e9),
)
def test_micro_batches_hold_to_seconds_and_memory(rows, batch_seconds, memory):
    index = LengthIndex(np.array([s for s, _ in rows], np.float32), np.array([u for _, u in rows]))
    budget = dataclasses.replace(BYTES, limit_bytes=memory)
    plan = Plan(index, limited(budget, batch_seconds, index))
    frames = budget.frames(index.seconds)
    for step in plan:
        for batch in step:
            longest = frames[batch].max()
            if len(batch) > 1:
                assert longest * 0.08 * len(batch) <= max(batch_seconds, frames.max() * 0.08) + 1e-6


def test_the_longest_utterance_goes_alone_at_any_speed():
    index = LengthIndex(np.full(50, 30.0, np.float32), np.full(50, 40))
    speeds = (0.9, 1.0, 1.1)
    for epoch in range(4):
        budget = limited(Budget.from_batch_seconds(60.0), 24.0, index, slowest=min(speeds))
        plan = Plan(AtSpeed(index, 0, epoch, speeds), budget, epoch=epoch)
        assert plan.left_out() == []
        assert sum(len(batch) for step in plan for batch in step) == 50


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_minutes_are_those_of_the_ranks_there_are(ranks):
    """Of a run that goes as the budget has it, settled anew or not."""
    random = np.random.default_rng(0)
    index = LengthIndex(random.uniform(1, 12, 4000).astype(np.float32), random.integers(5, 60, 4000))
    budget = dataclasses.replace(BYTES, time=Polynomial(T=1e-3, U=1e-4), fixed_seconds=0.02)
    plan = Plan(index, limited(budget, 24.0, index), micro_batches_per_step=4)
    true = []
    for before, _, _ in plan.walk():
        seconds = plan.step_seconds(before.window, before.step)
        true.append(max(float(seconds[one].sum()) for one in share_out(seconds, ranks)))
    _, mean, _ = predicted(plan, ranks)
    assert mean == pytest.approx(np.mean(true))
    config = TrainConfig(minutes=10.0)
    steps = choose_steps(config, mean, len(plan))
    pace = Pace(config, mean)
    pace.plan(0, steps)
    for one in true[:60]:
        pace.took(one, one)
    settled = pace.steps(60, steps, sum(true[:60]))
    assert steps * mean == pytest.approx(600, rel=0.01)
    assert settled * mean == pytest.approx(600, rel=0.05)


def test_steps_come_from_the_first_that_is_given(config):
    assert choose_steps(config, 0.5, 10) == 8
    assert choose_steps(dataclasses.replace(config, steps=None, minutes=1.0), 0.5, 10) == 120
    assert choose_steps(dataclasses.replace(config, steps=None, epochs=2.5), 0.5, 10) == 25


def test_measured_where_no_budget_is_given(config):
    said = []
    prepared = prepare(dataclasses.replace(config, budget=None, precision="auto", threads=None), said.append)
    assert (config.output / "budget.json").exists()
    assert prepared.precision in ("float32", "bf16")
    assert any("a step takes" in line for line in said)
    assert prepared.budget.step_seconds(4, 50, 20) > prepared.budget.step_seconds(1, 50, 20) > 0
    assert prepared.budget.bytes(4, 50, 20) > prepared.budget.bytes(4, 25, 20)
    again = prepare(dataclasses.replace(config, budget=None, precision="auto", threads=None))
    assert again.budget == prepared.budget
    assert again.precision == prepared.precision


def test_synthetic_batches_have_the_shape_asked_for(config):
    model = prepare(config).model
    batch = synthetic_batch(model, 3, 40, 12, prompt=5)
    encoded, lengths = model.encode(*model.features(batch.audio, batch.audio_lengths))
    assert encoded.shape[:2] == (3, 40)
    assert lengths.tolist() == [40] * 3
    assert batch.tokens.shape == (3, 12)
