"""Trackers get the metrics of steps and validations. Weights & Biases and trackio are stood in for by modules that
take what theirs take."""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from canter.errors import ConfigError
from canter.training.recipe import run_training

from ..conftest import stopping_after


class Calls:
    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def log(self, data, step=None):
        self.logged.append((step, data))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    calls, module = Calls(), ModuleType("wandb")

    def init(project=None, name=None, id=None, resume=None, dir=None, config=None):
        calls.started.append(SimpleNamespace(name=name, id=id, resume=resume, config=config))
        return SimpleNamespace(log=calls.log, finish=calls.finish)

    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(module, "init", init, raising=False)
    return calls


@pytest.fixture
def trackio(monkeypatch):
    calls, module = Calls(), ModuleType("trackio")

    def init(project, name=None, config=None, resume="never"):
        calls.started.append(SimpleNamespace(name=name, id=name, resume=resume, config=config))

    monkeypatch.setitem(sys.modules, "trackio", module)
    for name, value in (("init", init), ("log", calls.log), ("finish", calls.finish)):
        monkeypatch.setattr(module, name, value, raising=False)
    return calls


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_one_run(config, request, name):
    calls = request.getfixturevalue(name)
    config = dataclasses.replace(config, track=(name,), steps=4, valid_every=2)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(config, stopping_after(3))
    assert calls.finished == 1
    assert [step for step, _ in calls.logged] == [1, 2, 2, 3]
    calls.logged.clear()
    run_training(config)
    assert calls.finished == 2
    assert [step for step, _ in calls.logged] == [3, 4, 4]
    _, step, valid = (data for _, data in calls.logged)
    assert 0 < step["train_loss"] < 100
    assert {"train_learning_rate", "train_gradient_norm", "train_audio_seconds"} <= step.keys()
    assert {"valid_wer", "valid_cer"} <= valid.keys()
    assert all(isinstance(value, int | float) for data in (step, valid) for value in data.values())
    first, second = calls.started
    assert (first.id, first.name, first.resume) == (second.id, "run", "allow")
    assert first.config["optimizer"]["schedule"] == "cosine"


def test_tensorboard(config):
    run_training(dataclasses.replace(config, steps=2, valid_every=2))
    events = EventAccumulator(str(config.output / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in events.Scalars("valid/wer")] == [2]


def test_a_missing_tracker_is_reported_before_any_work(config, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--track wandb needs wandb, which is not installed"):
        run_training(dataclasses.replace(config, track=("wandb",)))
    assert not (config.output / "config.yaml").exists()
