import json
import re

import pytest

pytest.importorskip("lhotse", reason="lhotse is not installed")

from lhotse import CutSet, MonoCut
from lhotse.dataset.sampling.dynamic_bucketing import FixedBucketBatchSizeConstraint
from torch.utils.data import DataLoader, Dataset

from canter.errors import PlanError
from canter.integrations.lhotse import PlanCutSampler, index_of_cuts
from canter.integrations.nemo import bucketing_config
from canter.planning import Budget, Plan
from canter.planning.strategies import Bucket2D


def cuts_of(count: int) -> CutSet:
    return CutSet.from_cuts(
        MonoCut(f"cut{i}", start=0.0, duration=1.0 + (i * 7 % 50) / 5, channel=0, custom={"num_tokens": 5 + i % 30})
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
    with pytest.raises(PlanError, match="Lhotse pads its batches"):
        PlanCutSampler(cuts, Plan(index, Budget.from_batch_seconds(40), "packed"), world_size=1, rank=0)


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


class Ids(Dataset):
    """Dataset with the interface of Lhotse's: a batch of cuts in, a batch out."""

    def __getitem__(self, cuts):
        return [cut.id for cut in cuts]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loader_that_reads_ahead_skips_nothing_on_resuming(workers, ranks):
    # 31 micro-batches or so in steps of 2: the second rank gets nothing of each window's last step
    cuts = cuts_of(150)
    make = lambda: Plan(index_of_cuts(cuts), Budget.from_batch_seconds(40), "duration", window=70,  # noqa: E731
                        micro_batches_per_step=2)  # fmt: skip
    options = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}

    def loader_of(rank):
        sampler = PlanCutSampler(cuts, make(), world_size=ranks, rank=rank)
        return sampler, DataLoader(Ids(), sampler=sampler, batch_size=None, num_workers=workers, **options)

    every = []
    for rank in range(ranks):
        sampler, loader = loader_of(rank)
        whole, states = [], []
        for batch in sampler.follow(loader):
            states.append(json.dumps(sampler.state_dict()))
            whole.append(batch)
        every += [name for batch in whole for name in batch]
        assert sampler.state_dict()["epoch"] == 1
        for number in (0, len(whole) // 2, len(whole) - 1):
            resumed, loader = loader_of(rank)
            resumed.load_state_dict(json.loads(states[number]))
            again = list(resumed.follow(loader))
            # from the step that was not done with: with one rank it may begin a batch earlier
            assert again[-len(whole[number:]) :] == whole[number:]
            assert len(again) - len(whole[number:]) <= (ranks == 1)
    assert sorted(every) == sorted(cut.id for cut in cuts)


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
