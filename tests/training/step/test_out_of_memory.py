"""Memory that runs out in any phase of a step, on any rank: the step is taken all the same."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from canter import ranks as ranks_module
from canter.errors import CanterError
from canter.ranks import process_group
from canter.runtime import retry_once
from canter.training.config import LossConfig, OptimizerConfig
from canter.training.loop import Trainer
from canter.training.recipe import run_training
from canter.training.step.gradient import Gradient
from canter.training.step.optimizers import Optimizers

from ..distributed.test_ranks import assert_same_steps, rows, steps

# Python 3.12 warns of forking where threads are
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class Failing:
    """Stands for a function of torch; its calls of these numbers find no memory."""

    def __init__(self, function, *numbers):
        self.function, self.numbers, self.calls = function, numbers, 0

    def __call__(self, *arguments, **settings):
        self.calls += 1
        if self.calls - 1 in self.numbers:
            full()
        return self.function(*arguments, **settings)


# -- the parts of a step --


class TwoLayers(nn.Module):
    """A model with matrices of two shapes for Muon, and other parameters for AdamW."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6)]
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*layers)})
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.encoder["layers"](x))


def three_steps(model, attempt):
    """The weights after three steps, and the optimisers."""
    torch.manual_seed(0)
    optimizers = Optimizers(model, OptimizerConfig(name="muon", learning_rate=0.01, clip=0.1), 10)
    for step in range(3):
        model(torch.randn(5, 6)).square().mean().backward()
        attempt(lambda step=step: optimizers.step(step))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizers


@pytest.mark.parametrize("name", ["zeros_like", "_foreach_lerp", "stack", "_foreach_norm", "_foreach_mul_", "baddbmm"])
def test_an_update_that_runs_out_of_memory_anywhere_is_finished_to_the_same_bits(monkeypatch, name):
    monkeypatch.setattr("canter.runtime.release_memory", lambda: None)  # takes longer than all else
    model = TwoLayers()
    straight, one = three_steps(copy.deepcopy(model), lambda step: step())
    counting = Failing(getattr(torch, name))
    with monkeypatch.context() as patch:
        patch.setattr(torch, name, counting)
        three_steps(copy.deepcopy(model), lambda step: step())
    assert counting.calls
    for number in range(counting.calls):
        if name == "_foreach_mul_" and number:
            continue  # changes in place and allocates nothing: the first call, of the clipping, stands for all
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, Failing(getattr(torch, name), number))
            again, other = three_steps(copy.deepcopy(model), retry_once)
        assert torch.equal(again, straight), number
        states = [
            {key: value for state in optimizers.state_dict() for key, value in state["state"].items()}
            for optimizers in (one, other)
        ]
        for weight, values in states[0].items():
            assert all(torch.equal(value, states[1][weight][key]) for key, value in values.items())


def sums(rank, short, device_full):
    """The gradients of three parameters, one of which one rank does not have, summed; ``short`` ranks lack memory."""
    ranks_module.BUCKET_BYTES = 64
    weights = [nn.Parameter(torch.zeros(n, 2)) for n in (3, 2, 50, 4)]
    for number, weight in enumerate(weights):
        if number != 1 or rank == 0:
            weight.grad = torch.full((weight.shape[0], 2), float(10 * rank + number))
    weights[3].grad = None
    if rank in short:
        torch.empty = Failing(torch.empty, 0, 1)  # also once what was cached is given back
    if rank in device_full:
        torch.zeros_like = Failing(torch.zeros_like, 0, 1)
    with process_group("cpu") as ranks:
        ranks.sum_gradients(weights)
        again = [None if w.grad is None else w.grad.clone() for w in weights]
    return [None if g is None else g.unique().tolist() for g in again]


@pytest.mark.parametrize("short", [(), (0,), (1,), (0, 1)])
def test_ranks_that_lack_memory_for_buckets_sum_gradients_without(on_ranks, short):
    expected = [[10.0], [1.0], [14.0], None]
    assert on_ranks(2, sums, short, ()) == [(expected, ""), (expected, "")]


def test_a_rank_without_memory_for_its_gradients_ends_all_with_that_reason(on_ranks):
    answers = on_ranks(2, sums, (), (1,))
    assert all("rank 1 of 2: memory ran out for the gradients themselves" in error for _, error in answers), answers


# -- whole runs --


def inject(model, where):
    """Have the micro-batches at ``where``, {(step, number): phase}, run out of memory when first computed."""
    armed = []
    compute = Gradient._micro_batch

    def micro_batch(self, one, objective, step, split, unfit):
        phase = where.get((step, one.address.number)) if split is None else None
        armed[:] = [phase] if phase else []
        return compute(self, one, objective, step, split, unfit)

    def forward(*_):
        if armed == ["forward"]:
            full()

    def backward(*_):
        if armed == ["backward"]:
            full()

    Gradient._micro_batch = micro_batch
    model.decoder.layers[0].register_forward_pre_hook(forward)
    model.encoder.layers[0].register_full_backward_hook(backward)
    return compute


def train_injected(rank, config, where, outside=False):
    """Train; ``outside``: on every rank the update and the reduction run out of memory too, at other steps each."""
    init, compute, reduce = Trainer.__init__, Gradient._micro_batch, ranks_module.Ranks.sum_gradients
    update, empty = Optimizers._update, torch.empty
    taken = itertools.count()

    def begin(self, *arguments, **settings):
        init(self, *arguments, **settings)
        inject(self.model, where)

    def summed(self, parameters):
        step = next(taken)
        if self.size > 1 and step == 2 + rank:
            torch.empty = Failing(empty, 0, 1)
        elif step == 4 + rank:
            full()  # once: it is called again
        reduce(self, parameters)
        torch.empty = empty

    updates = itertools.count()

    def updated(self, number, optimizer):
        update(self, number, optimizer)
        if outside and next(updates) in (0, 4):  # AdamW's and Muon's, each once
            full()

    Trainer.__init__, ranks_module.Ranks.sum_gradients, Optimizers._update = begin, summed, updated
    try:
        return run_training(config).progress.step
    finally:
        Trainer.__init__, Gradient._micro_batch, ranks_module.Ranks.sum_gradients = init, compute, reduce
        Optimizers._update, torch.empty = update, empty


def test_two_ranks_survive_what_one_survives_and_take_the_same_steps(config, tmp_path, on_ranks):
    config = dataclasses.replace(
        config,
        valid=(),
        track=(),
        steps=7,
        micro_batches_per_step=4,
        loss=LossConfig(ctc_warmup=0.0),
        optimizer=OptimizerConfig(schedule="constant", warmup=1),
    )
    where = {(1, 0): "forward", (2, 1): "backward", (3, 2): "forward", (3, 3): "backward"}
    assert train_injected(0, config, where) == 7
    two = dataclasses.replace(config, output=tmp_path / "two")
    assert on_ranks(2, train_injected, two, where, True) == [(7, ""), (7, "")]
    assert_same_steps(steps(two), steps(config))
    cuts = [
        [(row["step"], row["number"], row["parts"]) for row in rows(run, "metrics.jsonl") if row["kind"] == "event"]
        for run in (config, two)
    ]
    assert cuts[0] == cuts[1]
    assert [(step - 1, number) for step, number, _ in cuts[0]] == sorted(where)


def test_an_update_that_never_fits_ends_all_ranks_with_a_message(config, on_ranks):
    config = dataclasses.replace(config, valid=(), track=(), steps=3, micro_batches_per_step=2)
    first, second = on_ranks(2, never_fits, config)
    assert "memory ran out outside of a micro-batch" in second[1]
    assert first[1].startswith("CanterError: rank 1 of 2 ended: step 2: memory ran out")


def never_fits(rank, config):
    step = Optimizers.step
    if rank == 1:
        Optimizers.step = lambda self, number: full() if number else step(self, number)
    return run_training(config).progress.step


def test_only_memory_that_runs_out_is_tried_again():
    calls = []

    def wrong():
        calls.append(1)
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        retry_once(wrong)
    assert calls == [1]
    with pytest.raises(CanterError, match="out of memory"):
        retry_once(lambda: (_ for _ in ()).throw(CanterError("out of memory")))
