import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.errors import PlanError
from canter.planning import Plan
from canter.planning.elastic import share_out, slowest_rank
from canter.planning.sampler import PlanSampler

from .conftest import lengths


@given(st.lists(st.floats(0.1, 1), min_size=1, max_size=40), st.integers(1, 12))
def test_every_micro_batch_goes_to_one_rank_and_none_waits_long(seconds, ranks):
    shares = share_out(np.array(seconds), ranks)
    assert sorted(b for share in shares for b in share) == list(range(len(seconds)))
    loads = [sum(seconds[b] for b in share) for share in shares]
    # Graham's bound for longest-first
    assert max(loads) <= max(max(seconds), sum(seconds) / ranks * (4 / 3)) + max(seconds) / 3 + 1e-9
    assert np.isclose(slowest_rank(np.array(seconds), np.array([0, len(seconds)]), ranks)[0], max(loads))


@pytest.mark.parametrize("per_step", [8, 3])
def test_eight_ranks_become_six_then_five_in_mid_epoch(budget, per_step):
    """20,000 utterances, each taken exactly once, whether or not the ranks divide M."""
    index = lengths(20_000)
    make = lambda: Plan(index, budget, "balanced", seed=2, window=7000, micro_batches_per_step=per_step)  # noqa: E731
    plan = make()
    last = len(plan)
    changes = [(8, last // 3), (6, last // 3 + 2), (5, last)]  # and in the middle of a window
    seen, state, begin = [], None, 0
    for ranks, end in changes:
        states = []
        for rank in range(ranks):
            sampler = PlanSampler(make(), rank, ranks)
            if state is not None:
                sampler.load_state_dict(json.loads(state))
            batches = iter(sampler)
            for number in range(begin, end):
                for _ in range(max(1, len(plan.micro_batches_for(rank, ranks, number)))):
                    seen += next(batches)
                    sampler.took()
            states.append(json.dumps(sampler.state_dict()))
        assert len(set(states)) == 1  # any rank's state serves all
        state, begin = states[0], end
    assert np.array_equal(np.sort(seen), np.arange(len(index)))


@given(st.lists(st.floats(0.1, 1), min_size=1, max_size=40), st.integers(1, 12))
def test_a_rank_gets_no_more_than_it_may(seconds, ranks):
    most = -(-len(seconds) // ranks)
    shares = share_out(np.array(seconds), ranks, most)
    assert sorted(b for share in shares for b in share) == list(range(len(seconds)))
    assert max(map(len, shares)) <= most
    with pytest.raises(PlanError, match="cannot take"):
        share_out(np.ones(most * ranks + 1), ranks, most)
