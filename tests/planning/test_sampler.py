import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra 'models' is not installed")

import torch
from torch.utils.data import DataLoader, Dataset

from canter.errors import PlanError
from canter.planning import Budget, Plan
from canter.planning.sampler import PlanSampler, StepSampler

from .conftest import lengths
from .resuming import assert_resumes_everywhere

# more workers than this machine has cores is what is tested
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


class Rows(Dataset):
    def __getitem__(self, row):
        return row


def collate(rows):
    return torch.tensor(rows, dtype=torch.int64)


def loader_of(plan, rank=0, ranks=1, workers=0):
    sampler = PlanSampler(plan, rank, ranks)
    options = {"prefetch_factor": 3, "multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(Rows(), batch_sampler=sampler, num_workers=workers, collate_fn=collate, **options)
    return sampler, loader


def small_plan(**options):
    return Plan(lengths(150), Budget.from_batch_seconds(60), window=60, **options)


@pytest.mark.parametrize("per_step", [1, 3])
def test_resumes_everywhere_without_workers(per_step):
    def make():
        sampler, loader = loader_of(small_plan(micro_batches_per_step=per_step))
        if per_step > 1:  # between steps: a state is a whole step
            return sampler, (list(step) for step in _steps(sampler, loader, per_step))
        return sampler, (batch for batch in _taken(sampler, loader))

    assert_resumes_everywhere(make)


def _taken(sampler, loader):
    for batch in loader:
        sampler.took()
        yield batch


def _steps(sampler, loader, count):
    batches = iter(_taken(sampler, loader))
    while step := [batch for _, batch in zip(range(count), batches)]:
        yield step


@pytest.mark.parametrize("workers", [0, 1, 4, 8])
def test_prefetched_batches_are_not_lost(workers):
    """Whatever the number of workers before and after, what the loop has not finished comes again."""
    expected = [rows.tolist() for step in small_plan() for rows in step]
    sampler, loader = loader_of(small_plan(), workers=workers)
    batches, got = sampler.follow(loader), []
    for _ in range(6):
        got.append(next(batches).tolist())
    # the sixth is still in the loop's hands: a state taken now gives it again
    state = json.loads(json.dumps(sampler.state_dict()))
    batches.close()
    resumed, loader = loader_of(small_plan(), workers=8 - workers)
    resumed.load_state_dict(state)
    assert got[:5] + [batch.tolist() for batch in resumed.follow(loader)] == expected


@pytest.mark.parametrize("workers", [0, 4])
def test_resumes_at_the_last_step_of_an_epoch_and_after_it(workers):
    per_step = 2
    plan = small_plan(micro_batches_per_step=per_step)
    epoch, following = ([[rows.tolist() for rows in step] for step in p] for p in (plan, plan.at_epoch(1)))
    sampler, loader = loader_of(plan, workers=workers)
    batches = _taken(sampler, loader)
    states = [sampler.state_dict()]
    for step in epoch:
        for expected in step:
            assert next(batches).tolist() == expected
        states.append(json.loads(json.dumps(sampler.state_dict())))
    assert next(batches, None) is None
    for state, wanted in ((states[-2], epoch[-1:]), (states[-1], following)):
        resumed, loader = loader_of(small_plan(micro_batches_per_step=per_step), workers=workers)
        resumed.load_state_dict(state)
        assert [batch.tolist() for batch in resumed.follow(loader)] == [rows for step in wanted for rows in step]
    assert resumed.state_dict()["epoch"] == 2


def test_ranks_divide_an_epoch_and_may_change_in_the_middle():
    seen = []
    state = None
    for ranks, steps in ((3, 1), (2, 1), (5, 10**6)):
        states = []
        for rank in range(ranks):
            sampler, loader = loader_of(small_plan(micro_batches_per_step=6), rank, ranks)
            if state:
                sampler.load_state_dict(state)
            plan, batches, taken = sampler.plan, iter(loader), 0
            first = plan.number(sampler.start) if sampler.start else 0
            for number in range(first, min(len(plan), first + steps)):
                for _ in range(max(1, len(plan.micro_batches_for(rank, ranks, number)))):
                    seen += next(batches).tolist()
                    sampler.took()
                    taken += 1
            states.append(sampler.state_dict())
            assert steps < 100 or taken == len(loader_from(state, rank, ranks))
        assert all(one == states[0] for one in states)
        state = states[0]
    assert sorted(seen) == list(range(150))
    assert state["epoch"] == 1  # after the last batch, the start of the next epoch
    assert state["window"] == state["step"] == 0


def loader_from(state, rank, ranks):
    sampler, loader = loader_of(small_plan(micro_batches_per_step=6), rank, ranks)
    sampler.load_state_dict(state)
    return loader


def test_each_pass_over_the_loader_is_the_next_epoch():
    sampler, loader = loader_of(small_plan())
    first, second = ([b.tolist() for b in sampler.follow(loader)] for _ in range(2))
    assert first == [rows.tolist() for step in small_plan() for rows in step]
    assert second == [rows.tolist() for step in small_plan(epoch=1) for rows in step]
    sampler.set_epoch(0)
    assert np.array_equal(next(iter(loader)), first[0])


def test_misuse():
    with pytest.raises(PlanError, match="ranks count from 0"):
        PlanSampler(small_plan(), 2, 2)
    with pytest.raises(PlanError, match="more often"):
        PlanSampler(small_plan()).took()
    with pytest.raises(PlanError, match="another plan"):
        PlanSampler(small_plan()).load_state_dict(PlanSampler(small_plan(seed=9)).state_dict())
    with pytest.raises(PlanError, match="this trainer pads its batches"):
        StepSampler(small_plan(strategy="packed"))


@pytest.mark.parametrize("strategy", ["balanced", "duration"])  # duration's epochs differ in length
def test_steps_for_trainers_that_accumulate_a_fixed_number(strategy):
    plan = Plan(lengths(150), Budget.from_batch_seconds(60), strategy, window=60, micro_batches_per_step=4)
    epochs = [plan.at_epoch(epoch) for epoch in range(3)]
    seen: dict[int, list[list[int]]] = {}
    for ranks, per_step in ((1, 4), (3, 2), (4, 1), (6, 1)):
        steps: dict[int, list[list[int]]] = {}
        for rank in range(ranks):
            for number in range(3):
                sampler = StepSampler(plan, rank, ranks, first=lambda: number * len(plan))  # noqa: B023
                batches = list(sampler)
                assert (sampler.accumulation, len(sampler)) == (per_step, len(plan) * per_step)
                assert len(batches) == len(sampler)
                for place, rows in enumerate(batches):
                    if rows:
                        steps.setdefault(number * len(plan) + place // per_step, []).append(rows)
        for step in steps.values():
            step.sort()
        seen = seen or steps
        assert steps == seen
    wanted = [sorted(rows.tolist() for rows in step) for epoch in epochs for step in epoch]
    assert [seen[step] for step in sorted(seen)] == wanted[: 3 * len(plan)]
