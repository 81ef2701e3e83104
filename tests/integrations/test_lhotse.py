import re

import pytest

pytest.importorskip("lhotse", reason="lhotse is not installed")

from lhotse import CutSet, MonoCut
from lhotse.dataset.sampling.dynamic_bucketing import FixedBucketBatchSizeConstraint

from canter.errors import PlanError
from canter.integrations.lhotse import PlanCutSampler, index_of_cuts
from canter.integrations.nemo import bucketing_config
from canter.planning import Budget, Plan
from canter.planning.strategies import Bucket2D


def cuts_of(count: int) -> CutSet:
    return CutSet.from_cuts(
        MonoCut(
            f"cut{i}",
            start=0.0,
            duration=1.0 + (i * 7 % 50) / 5,
            channel=0,
            custom={"num_tokens": 5 + i % 30},
        )
        for i in range(count)
    )


def test_cuts_in_plan_order_on_every_rank():
    cuts = cuts_of(200)
    index = index_of_cuts(cuts)
    assert index.tokens[31] == 6
    plan = Plan(index, Budget.from_batch_seconds(40), micro_batches_per_step=2)
    ids = []
    for rank in range(2):
        sampler = PlanCutSampler(cuts, plan, world_size=2, rank=rank)
        batches = list(sampler)
        assert all(isinstance(batch, CutSet) for batch in batches)
        ids += [cut.id for batch in batches for cut in batch]
    assert sorted(ids) == sorted(cut.id for cut in cuts)
    with pytest.raises(PlanError, match="do not divide"):
        PlanCutSampler(cuts, plan, world_size=3, rank=0)
    with pytest.raises(PlanError, match="they must be the same"):
        PlanCutSampler(cuts_of(7), plan, world_size=1, rank=0)


def test_state_continues_where_it_was():
    cuts = cuts_of(120)
    plan = Plan(index_of_cuts(cuts), Budget.from_batch_seconds(40))
    whole = [[c.id for c in batch] for batch in PlanCutSampler(cuts, plan, world_size=1, rank=0)]
    sampler = PlanCutSampler(cuts, plan, world_size=1, rank=0)
    batches = iter(sampler)
    head = [[c.id for c in next(batches)] for _ in range(5)]
    state = sampler.state_dict()
    resumed = PlanCutSampler(cuts, plan, world_size=1, rank=0)
    resumed.load_state_dict(state)
    assert head + [[c.id for c in batch] for batch in resumed] == whole
    resumed.set_epoch(1)
    assert [[c.id for c in batch] for batch in resumed] != whole


def test_nemo_bins_assign_as_lhotse_assigns():
    cuts = cuts_of(400)
    index, budget = index_of_cuts(cuts), Budget.from_batch_seconds(60)
    text = bucketing_config(Bucket2D(4, 1).bins(index, budget), budget)
    bins = [float(x) for x in re.search(r"bucket_duration_bins: \[(.*)\]", text)[1].split(",")]
    sizes = [int(x) for x in re.search(r"bucket_batch_size: \[(.*)\]", text)[1].split(",")]
    assert len(bins) == len(sizes) == 4
    assert sizes == sorted(sizes, reverse=True)
    constraint = FixedBucketBatchSizeConstraint(bins, sizes)
    for cut in cuts:  # the batch size Lhotse then uses holds that many of the cut
        constraint.reset()
        constraint.add(cut)
        bucket = next(i for i, edge in enumerate(bins) if cut.duration <= edge)
        assert sizes[bucket] <= budget.max_batch(budget.frames(cut.duration), 0)
