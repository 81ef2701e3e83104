"""Schedules, frozen weights, averages, speeds, trackers: what a recipe may ask for."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from canter.corpus.index import LengthIndex
from canter.errors import ConfigError
from canter.models.norm import MaskedBatchNorm
from canter.planning.budget import Budget
from canter.planning.plan import Plan
from canter.training.config import AugmentConfig, OptimizerConfig
from canter.training.feed.data import Steps
from canter.training.feed.speed import AtSpeed, speeds_of
from canter.training.recipe import run_training
from canter.training.run.reports import problem_kind
from canter.training.step.optimizers import Average, Optimizers, Schedule
from canter.training.step.weights import compile_layers, freeze, to_training


def factors(steps=100, **settings):
    optimizers = Optimizers(nn.Linear(4, 4), OptimizerConfig(name="adamw", learning_rate=2e-3, **settings), steps)
    return np.array([optimizers.factor(step) for step in range(steps)])


def test_a_cosine_falls_to_its_floor():
    values = factors(warmup=0.1, floor=0.2)
    assert values[:10] == pytest.approx(np.arange(1, 11) / 10, abs=0.02)
    assert values[54] == pytest.approx(0.6, abs=0.02)
    assert values[-1] == pytest.approx(0.2)


def test_the_learning_rate_does_not_jump_where_steps_are_estimated_again():
    """The learning rate does not jump when a run resumes, or returns to an earlier checkpoint."""
    schedule = Schedule(1000)
    optimizers = Optimizers(nn.Linear(4, 4), OptimizerConfig(name="adamw", learning_rate=1.0), 1000, schedule)
    before = [optimizers.factor(step) for step in range(20)]
    schedule.stretch(20, 400)  # steps take longer than predicted
    values = [optimizers.factor(step) for step in range(112)]
    schedule.stretch(112, 700)  # and then shorter
    values += [optimizers.factor(step) for step in range(112, 700)]
    assert values[:20] == before == [optimizers.factor(step) for step in range(20)]
    slope = np.diff(values)
    assert np.abs(slope).max() < 0.06  # 20 + 50 * 38 / 98 steps of warm-up
    after = slope[60:]
    assert after.max() <= 0
    assert after.min() > -1.6 * np.pi / 2 / 588
    assert values[-1] == pytest.approx(0.01)
    kept = json.loads(json.dumps(schedule.stretches))
    again = Optimizers(nn.Linear(4, 4), OptimizerConfig(name="adamw", learning_rate=1.0), 700, Schedule(1000, kept))
    assert [again.factor(step) for step in range(700)] == values


def test_inverse_sqrt_and_noam_fall_by_the_root_of_the_step():
    values = factors(schedule="inverse_sqrt", warmup=16)
    assert values[15] == 1
    assert values[63] == pytest.approx(0.5)
    noam = factors(schedule="noam", warmup=16)
    paper = [512**-0.5 * min(s**-0.5, s * 16**-1.5) for s in range(1, 101)]
    assert noam == pytest.approx(paper)


def test_a_constant_rate_stays():
    assert factors(schedule="constant", warmup=10)[9:].tolist() == [1.0] * 91


def test_a_gradient_that_is_not_finite_changes_no_weight():
    layer = nn.Linear(4, 4)
    before = [p.clone() for p in layer.parameters()]
    optimizers = Optimizers(layer, OptimizerConfig(name="adamw", learning_rate=2e-3), 10)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert not math.isfinite(optimizers.step(3)[1])
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters()))


def test_frozen_weights_and_statistics_stay(config):
    config = dataclasses.replace(config, steps=3, valid=(), freeze=("encoder.*",), track=("tensorboard",))
    finished = run_training(config)
    trained = finished.prepared.subject.model
    torch.manual_seed(config.seed)
    fresh = type(trained)(trained.config).state_dict()
    saved = load_file(config.output / "checkpoints" / "step-000003" / "model.safetensors")
    assert all(torch.equal(saved[n], t) for n, t in fresh.items() if n.startswith("encoder."))
    assert any(not torch.equal(saved[n], t) for n, t in fresh.items() if n.startswith("ctc."))
    assert list((config.output / "tensorboard").glob("events.out.tfevents.*"))


def test_a_pattern_must_match_and_leave_something():
    model = nn.Sequential(nn.Linear(2, 2), MaskedBatchNorm(2))
    with pytest.raises(ConfigError, match="'nothing' matches no parameter"):
        freeze(model, ["nothing"])
    assert freeze(model, ["1.*"]) == 4
    to_training(model)
    assert (model.training, model[1].training) == (True, False)
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        freeze(model, ["*"])


def test_an_average_trails_the_weights_and_takes_their_place_for_a_while():
    layer = nn.Linear(2, 1, bias=False)
    average = Average(layer, 0.5)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    average.update(layer, step=100)
    with average.in_place_of(layer):
        assert torch.allclose(layer.weight, start + 0.5)
    assert torch.allclose(layer.weight, start + 1)


@pytest.mark.filterwarnings("default")  # torch.compile's own
def test_compiled_layers_compute_the_same_and_one_utterance_is_not_compiled(config):
    from canter.training.recipe import prepare_training

    model = prepare_training(config).subject.model.eval()
    audio, lengths = torch.randn(2, 8000), torch.tensor([8000, 6000])
    plain = model.encode(*model.features(audio, lengths))[0]
    names = list(model.state_dict())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_layers(model, backend=backend)
    # one utterance would be a shape of its own to the compiler
    alone = model.encode(*model.features(audio[:1], lengths[:1]))[0]
    torch.testing.assert_close(alone, plain[:1], rtol=1e-4, atol=1e-4)
    assert not graphs
    torch.testing.assert_close(model.encode(*model.features(audio, lengths))[0], plain, rtol=1e-4, atol=1e-4)
    assert graphs
    assert list(model.state_dict()) == names


SPEEDS = (0.9, 1.0, 1.1)


def test_speeds_are_drawn_evenly_by_row_and_epoch():
    rows = np.arange(30_000)
    drawn = speeds_of(rows, 1, 0, SPEEDS)
    assert all(abs((drawn == speed).mean() - 1 / 3) < 0.02 for speed in SPEEDS)
    assert np.array_equal(speeds_of(rows[5:9], 1, 0, SPEEDS), drawn[5:9])
    for seed, epoch in ((1, 1), (2, 0)):
        assert abs((speeds_of(rows, seed, epoch, SPEEDS) == drawn).mean() - 1 / 3) < 0.02


def test_a_plan_batches_by_the_lengths_of_its_epoch():
    index = LengthIndex(np.linspace(1, 20, 200), np.full(200, 10))
    plan = Plan(AtSpeed(index, 0, 0, SPEEDS), Budget.from_batch_seconds(60))
    steps = Steps(plan)
    assert steps.plan_of(3).fingerprint == plan.fingerprint
    for epoch in (0, 3):
        seconds = index.seconds / speeds_of(np.arange(200), 0, epoch, SPEEDS)
        batches = [batch for step in steps.plan_of(epoch) for batch in step]
        assert sorted(np.concatenate(batches).tolist()) == list(range(200))
        assert all(np.ceil(seconds[batch] / 0.08).max() * 0.08 * len(batch) <= 60.08 for batch in batches)


def test_an_utterance_has_the_speed_that_the_plan_knows(config):
    config = dataclasses.replace(config, augment=AugmentConfig(speed=(0.8, 1.25)), steps=4, track=(), valid=())
    finished = run_training(config)
    data, index = finished.prepared.data.micro_batches, finished.prepared.data.index
    utterance = index.utterance(3)
    plain, slow = data.example(utterance, 3), data.example(utterance, 3, 0.8)
    assert len(slow.audio) == pytest.approx(len(plain.audio) / 0.8, abs=2)
    lines = map(json.loads, (config.output / "metrics.jsonl").read_text().splitlines())
    taken = sum(row["audio_seconds"] for row in lines)
    logged = map(json.loads, (config.output / "utterances.jsonl").read_text().splitlines())
    expected = 0.0
    for row in logged:
        rows = np.concatenate(row["rows"])
        expected += (index.seconds[rows] / speeds_of(rows, 0, row["epoch"], (0.8, 1.25))).sum()
    assert taken == pytest.approx(expected, rel=0.01)


def test_a_tracker_that_is_not_installed_is_named(config, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--track wandb needs wandb, .*: pip install 'canter\[log\]'"):
        run_training(dataclasses.replace(config, track=("wandb",)))


def test_reasons_are_counted_by_kind():
    one = problem_kind("/a/b.wav is empty (0 bytes); copy it again", "/a/b.wav")
    assert one == problem_kind("/c/d.wav is empty (0 bytes); copy it again", "/c/d.wav") == "is empty (N bytes)"
