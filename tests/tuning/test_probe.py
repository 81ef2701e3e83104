import json
import math
import time

import pytest
import torch
from torch import nn

from canter.errors import BudgetError
from canter.training import measure
from canter.training.config import OptimizerConfig, TrainConfig
from canter.tuning.memory import steady_heap
from canter.tuning.probe import Prober, TrainingStep

from .conftest import small_step


def growing(width=64):
    """A step whose activations are B x T x 64 numbers, four times."""
    layer = nn.Linear(width, width)

    def run(batch, frames, tokens):
        layer(torch.randn(batch * frames, width)).relu().square().sum().backward()
        layer.zero_grad()

    return TrainingStep(layer, [], run)


def test_memory_grows_with_the_batch_and_counts_what_is_always_there():
    steady_heap()
    prober = Prober(growing(), 4e9)
    one, two = prober(1000, 50, 1, expected=0), prober(2000, 50, 1, expected=0)
    assert one.bytes > 2 * 1000 * 50 * 64 * 4
    assert 1.6 < two.bytes / one.bytes < 2.4
    assert one.seconds > 0
    assert one.fits
    assert prober.step.state_bytes == (64 * 64 + 64) * 4
    assert prober(1000, 50, 1) is one  # each shape once


def test_a_step_over_the_limit_is_an_event_and_leaves_nothing_behind():
    step = growing()
    prober = Prober(step, 30e6)
    probe = prober(1000, 100, 1)
    assert not probe.fits
    assert probe.bytes >= 30e6
    assert math.isnan(probe.seconds)
    assert prober.out_of_memory == 1
    assert step.model.weight.grad is None
    assert prober(10, 100, 1).fits


def test_a_step_that_compiles_is_measured_once_it_has():
    ran = []

    def run(batch, frames, tokens):
        ran.append((batch, frames, tokens))
        time.sleep(0.2 if ran.count(ran[-1]) == 1 else 0.0)

    prober = Prober(TrainingStep(nn.Linear(1, 1), [], run, compiled=True), 1e9)
    prober.warm_up(1, 5, 5)
    assert prober(2, 5, 5, expected=0).seconds < 0.2
    assert ran == [(1, 5, 5), (2, 5, 5), (2, 5, 5)]


def test_layers_are_compiled_where_training_compiles_them(model, monkeypatch):
    compiled = []
    monkeypatch.setattr(measure, "compile_layers", compiled.append)
    config = TrainConfig(optimizer=OptimizerConfig(name="adamw"), compile=True)
    step = measure.training_step(config, model, "float32", 1)
    assert compiled == [step.model]
    assert step.compiled
    assert measure.measured_on(config, model, "float32")["compile"]
    assert "compile" in measure.DECIDING


def test_an_error_that_is_not_memory_is_not_hidden():
    def run(batch, frames, tokens):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Prober(TrainingStep(nn.Linear(1, 1), [], run), 1e9)(1, 1, 1)


def test_not_even_one_utterance(model):
    with pytest.raises(BudgetError, match=r"not even one utterance of 100 frames and 20 tokens fits.*raise"):
        Prober(small_step(model), 5e6)(1, 100, 20)


def test_probes_are_kept_and_another_limit_reads_them(tmp_path):
    path = tmp_path / "budget.probes.jsonl"
    first = Prober(growing(), 60e6, {"device": "cpu"}, path)
    fitting, broken = first(100, 10, 1, expected=0), first(4000, 100, 1)
    again = Prober(growing(), 60e6, {"device": "cpu"}, path)
    assert again(100, 10, 1) == fitting
    assert not again(4000, 100, 1).fits
    assert again.steps == 0
    assert (4000, 100, 1) in first.known
    assert not broken.fits
    more = Prober(growing(), 4e9, {"device": "cpu"}, path)
    assert set(more.kept) == {(100, 10, 1)}
    assert not Prober(growing(), 60e6, {"device": "H100"}, path).kept


@pytest.mark.parametrize(
    "line", ["{", json.dumps({"format": "canter-probes/1", "measured_on": {}, "seconds": 1})]
)
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "budget.probes.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(BudgetError, match=r"budget.probes.jsonl:1: not a probe"):
        Prober(growing(), 1e9, {}, path)


def test_a_real_step_of_a_model(model):
    prober = Prober(small_step(model), 2e9)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    probe = prober(2, 50, 10, expected=0)
    assert probe.fits
    assert probe.bytes > prober.step.state_bytes > 3 * sum(p.nbytes for p in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
