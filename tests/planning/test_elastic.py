import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from canter.planning.elastic import share_out, slowest_rank


@given(st.lists(st.floats(0.1, 1), min_size=1, max_size=40), st.integers(1, 12))
def test_every_micro_batch_goes_to_one_rank_and_none_waits_long(seconds, ranks):
    shares = share_out(np.array(seconds), ranks)
    assert sorted(b for share in shares for b in share) == list(range(len(seconds)))
    loads = [sum(seconds[b] for b in share) for share in shares]
    # Graham's bound for longest-first
    assert max(loads) <= max(max(seconds), sum(seconds) / ranks * (4 / 3)) + max(seconds) / 3 + 1e-9
    assert np.isclose(slowest_rank(np.array(seconds), np.array([0, len(seconds)]), ranks)[0], max(loads))
