"""The largest micro-batch, computed before the first step: what it tells, and that it changes nothing."""

import dataclasses

import numpy as np
import torch

from canter.corpus.index import LengthIndex
from canter.planning.budget import Budget, Polynomial
from canter.planning.plan import Plan
from canter.training.measure import largest_shape
from canter.training.recipe import run_training

from ..conftest import Messages, memory_cap
from ..test_loop import losses, weights


def test_the_largest_by_the_memory_budget_is_found():
    rng = np.random.default_rng(0)
    index = LengthIndex(rng.uniform(1, 20, 500).astype(np.float32), rng.integers(5, 60, 500))
    budget = Budget(limit_bytes=1e9, memory=Polynomial(T=1e5, TT=2e3, TU=100.0), fixed_bytes=1e6)
    plan = Plan(index, budget, window=500)
    shape = largest_shape(plan, 0, budget)
    assert shape is not None
    sizes = []
    for step in plan:
        for rows in step:
            t, u = int(budget.frames(index.seconds[rows]).max()), int(index.tokens[rows].max())
            sizes.append(float(budget.bytes(len(rows), t, u)))
    assert float(budget.bytes(*shape)) == max(sizes)


def test_a_run_is_the_same_with_and_without(config, tmp_path):
    config = dataclasses.replace(config, valid=(), model=dataclasses.replace(config.model, dropout=0.1))
    run_training(config)
    without = dataclasses.replace(config, check_memory=False, output=tmp_path / "without")
    run_training(without)
    assert losses(config) == losses(without)
    ours, theirs = weights(config), weights(without)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_batches_that_do_not_fit_are_reported_before_the_first_step(config):
    said = []
    config = dataclasses.replace(config, valid=(), steps=1)
    with memory_cap(1_000_000):
        run_training(dataclasses.replace(config, max_skipped=1.0), Messages(said))
    told = [line for line in said if line.startswith("the largest micro-batch, ")]
    assert len(told) == 1
    assert "does not fit in memory" in told[0]
    assert said.index(told[0]) < min(i for i, line in enumerate(said) if line.startswith("step 1: micro-batch"))


def test_what_fits_needs_no_word(config):
    said = []
    run_training(dataclasses.replace(config, valid=(), steps=1), Messages(said))
    assert not any("largest" in line for line in said)


def test_state_still_to_be_made_is_counted(config):
    finished = run_training(dataclasses.replace(config, valid=(), steps=1))
    from canter.training.step.optimizers import Optimizers

    model = finished.prepared.subject.model
    optimizers = Optimizers(model, finished.prepared.config.optimizer, 1)
    wanted = optimizers.missing_bytes()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(0)
    made = [
        value.nbytes for part, _ in optimizers.parts for state in part.state.values() for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]  # fmt: skip
    assert wanted == sum(made)
    assert optimizers.missing_bytes() == 0
