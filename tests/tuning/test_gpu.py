"""A budget measured on a GPU: what its allocator takes and what does not fit."""

import numpy as np
import pytest
import torch

from canter.planning import Plan
from canter.tuning.fit import fit_budget
from canter.tuning.probe import Prober

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
    budget = fit_budget(prober, index, most_probes=20)
    table = Plan(index, budget).batch_table(0)
    largest = np.argsort(-budget.bytes(table.size, table.frames, table.tokens))[:5]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    for i in largest:
        step(int(table.size[i]), int(table.frames[i]), int(table.tokens[i]))
    assert torch.cuda.max_memory_reserved() <= 1.02 * LIMIT + torch.cuda.memory_reserved()
