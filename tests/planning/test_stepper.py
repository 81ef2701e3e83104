"""The stepper that training and the samplers share: what it draws, takes, saves and restores."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from canter.errors import PlanError
from canter.planning import Budget, Plan, Polynomial
from canter.planning.sampler import Stepper

from .conftest import lengths
from .resuming import assert_same


def some_plan(**options):
    return Plan(lengths(200), Budget.from_batch_seconds(60), window=60, micro_batches_per_step=3, **options)


def rows_of(steps):
    return [step.rows for step in steps]


def test_epochs_follow_each_other_and_steps_are_numbered():
    stepper = Stepper(some_plan())
    epochs = [list(some_plan(epoch=epoch)) for epoch in range(3)]
    drawn = list(islice(stepper.draw(), sum(map(len, epochs))))
    assert_same([step for epoch in epochs for step in epoch], rows_of(drawn))
    assert [step.number for step in drawn] == list(range(len(drawn)))
    assert [step.epoch for step in drawn] == [epoch for epoch in range(3) for _ in epochs[epoch]]
    step = drawn[4]
    assert_same(step.seconds, step.plan.step_seconds(step.window, step.position.step))
    shares = [step.micro_batches(rank, 2) for rank in range(2)]
    assert sorted(batch.number for share in shares for batch in share) == list(range(len(step.rows)))


@pytest.mark.parametrize("taken", [0, 3, 7, 11, 15])
def test_steps_that_were_only_drawn_come_again(taken):
    stepper = Stepper(some_plan())
    drawn = rows_of(islice(stepper.draw(), 20))
    for _ in range(taken):
        stepper.take()
    state = json.loads(json.dumps(stepper.state_dict()))
    assert_same(drawn[taken:], rows_of(islice(stepper.draw(), 20 - taken)))
    resumed = Stepper(some_plan(), 2, 5)  # another rank of another number of ranks
    resumed.load_state_dict(state)
    assert_same(drawn[taken:], rows_of(islice(resumed.draw(), 20 - taken)))
    with pytest.raises(PlanError, match="another plan"):
        Stepper(some_plan(seed=1)).load_state_dict(state)


def test_a_tightened_budget_starts_at_the_next_window_and_is_part_of_the_state(budget):
    plan = Plan(lengths(900), budget, window=300, micro_batches_per_step=2, min_steps=1)
    stepper = Stepper(plan)
    first = next(stepper.draw())
    limit = stepper.tighten(first, 0)
    used = max(budget.bytes(len(rows), int(budget.frames(plan.index.seconds[rows]).max()),
                            int(plan.index.tokens[rows].max())) for rows in first.rows)  # fmt: skip
    assert budget.fixed_bytes < limit < used
    assert stepper.tightenings == [[0, 1, limit]]
    smaller = replace(budget, limit_bytes=limit)
    assert_same(plan.cut(0).step(0), stepper.plan_of(0).cut(0).step(0))
    assert_same(replace(plan, budget=smaller).cut(1).step(0), stepper.plan_of(0).cut(1).step(0))
    assert_same(list(replace(plan, budget=smaller, epoch=1)), list(stepper.plan_of(1)))
    stepper.take()
    resumed = Stepper(plan)
    resumed.load_state_dict(json.loads(json.dumps(stepper.state_dict())))
    assert_same(rows_of(islice(stepper.draw(), 30)), rows_of(islice(resumed.draw(), 30)))
    with pytest.raises(PlanError, match="tightenings is 3"):
        resumed.load_state_dict(stepper.state_dict() | {"tightenings": 3})


def test_no_utterance_that_fitted_is_lost_to_a_tightened_budget(budget):
    stepper = Stepper(Plan(lengths(300), budget))
    stepper.tightenings = [[0, 0, budget.fixed_bytes + 1.0]]
    assert not stepper.plan_of(0).left_out()
    assert stepper.plan_of(0).figures().utterances == 300


def test_lengths_of_an_epoch_are_asked_of_the_index():
    class Faster:
        """An index whose utterances are shorter in each epoch."""

        def __init__(self, epoch):
            self.index, self.epoch = lengths(100), epoch
            self.tokens, self.source_of, self.sources = self.index.tokens, self.index.source_of, self.index.sources
            self.seconds = self.index.seconds / np.float32(1 + epoch)
            self.fingerprint = "faster"

        def __len__(self):
            return len(self.index)

        def at_epoch(self, epoch):
            return Faster(epoch)

    plan = Plan(Faster(0), Budget.from_batch_seconds(60), min_steps=1)
    stepper = Stepper(plan)
    assert_same(list(Plan(Faster(2), plan.budget, epoch=2, min_steps=1)), list(stepper.plan_of(2)))
    assert len(stepper.plan_of(2)) < len(plan)


def test_misuse():
    with pytest.raises(PlanError, match="ranks count from 0"):
        Stepper(some_plan(), 2, 2)
    with pytest.raises(PlanError, match="not drawn"):
        Stepper(some_plan()).take()
    with pytest.raises(PlanError, match="no step"):
        next(Stepper(Plan(lengths(5), Budget(1.0, Polynomial(T=1.0)))).draw())
