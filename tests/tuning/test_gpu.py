"""A budget measured on a GPU: what its allocator takes, what does not fit, and what a simulation says of it."""

import numpy as np
import pytest
import torch

from canter.planning import Plan
from canter.tuning.fit import measure_budget
from canter.tuning.probe import Prober
from canter.tuning.simulate import Simulator

from .conftest import small_model, small_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

LIMIT = 2e9


@pytest.fixture
def step():
    return small_step(small_model().cuda())


def test_a_step_over_the_limit_is_an_event_after_which_smaller_ones_still_run(step):
    prober = Prober(step, LIMIT)
    prober.warm_up(1, 20, 10)
    before = torch.cuda.memory_allocated()
    assert not prober(20000, 100, 30).fits
    assert prober.out_of_memory == 1
    assert torch.cuda.memory_allocated() <= before
    small, large = prober(10, 100, 30), prober(200, 100, 30)
    assert small.fits
    assert large.fits
    assert small.bytes < large.bytes < LIMIT
    assert 0 < small.seconds < 1


def test_a_plan_made_with_the_budget_fits(step, index):
    prober = Prober(step, LIMIT)
    budget = measure_budget(prober, index, 0.08, most_probes=20)
    table = Plan(index, budget).batch_table(0)
    largest = np.argsort(-budget.bytes(table.size, table.frames, table.tokens))[:5]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    for i in largest:
        step(int(table.size[i]), int(table.frames[i]), int(table.tokens[i]))
    assert torch.cuda.max_memory_reserved() <= 1.02 * LIMIT + torch.cuda.memory_reserved()


@pytest.mark.parametrize("shape", [(64, 100, 30), (200, 60, 20)])
def test_what_was_simulated_is_what_tensors_take(step, shape):
    simulated = Simulator(small_model(), lambda m: small_step(m, copied=False), 80e9)(*shape)
    step(*shape)
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - step.state_bytes
    torch.cuda.reset_peak_memory_stats()
    step(*shape)
    taken = torch.cuda.max_memory_allocated() - others
    assert simulated.bytes == pytest.approx(taken, rel=0.15)
