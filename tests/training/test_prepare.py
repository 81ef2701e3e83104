import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.corpus.index import LengthIndex
from canter.planning.budget import Budget, Polynomial
from canter.planning.plan import Plan
from canter.training.measure import synthetic_batch
from canter.training.prepare import choose_steps, limited, prepare

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
