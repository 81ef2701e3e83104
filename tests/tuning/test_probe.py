import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from canter.errors import BudgetError
from canter.training import measure
from canter.training.config import OptimizerConfig, TrainConfig
from canter.tuning.probe import Prober

from .conftest import AnyStep, small_step


def growing(width=64):
    """A step whose activations are B x T x 64 numbers, four times."""
    layer = nn.Linear(width, width)

    def run(batch, frames, tokens):
        layer(torch.randn(batch * frames, width)).relu().square().sum().backward()
        layer.zero_grad()

    return AnyStep(layer, run)


OWN = """
import json
import torch
from torch import nn
from canter.runtime import map_large_blocks
from canter.tuning.probe import ProbedStep, Prober

torch.set_num_threads(1)
map_large_blocks()
layer = nn.Linear(64, 64)

class Step(ProbedStep):
    model = layer

    def __call__(self, batch, frames, tokens):
        layer(torch.randn(batch * frames, 64)).relu().square().sum().backward()
        layer.zero_grad()

prober = Prober(Step(), 4e9)
prober(500, 50, 1, expected=0)  # whatever the first of such steps loads stays
print(json.dumps([prober(batch, 50, 1, expected=0).bytes for batch in (1000, 2000)]))
"""


def test_memory_grows_with_the_batch():
    """The test needs a separate process, because the memory of a process depends on its history."""
    done = subprocess.run([sys.executable, "-c", OWN], capture_output=True, text=True, check=True)
    one, two = json.loads(done.stdout)
    activations = 1000 * 50 * 64 * 4
    assert 2 * activations < one < 8 * activations
    assert 1.6 < two / one < 2.4


def test_a_probe_counts_what_is_always_there_and_takes_each_shape_once():
    prober = Prober(growing(), 4e9)
    probe = prober(1000, 50, 1, expected=0)
    assert prober.step.state_bytes == (64 * 64 + 64) * 4
    assert probe.bytes >= prober.step.state_bytes
    assert probe.seconds > 0
    assert probe.fits
    assert prober(1000, 50, 1) is probe


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
    ran, clock = [], [0.0]

    def run(batch, frames, tokens):
        ran.append((batch, frames, tokens))
        clock[0] += 60.0 if ran.count(ran[-1]) == 1 else 2.0

    prober = Prober(AnyStep(nn.Linear(1, 1), run, compiled=True), 1e9, clock=lambda: clock[0])
    prober.warm_up(1, 5, 5)
    assert prober(2, 5, 5, expected=0).seconds == 2.0
    assert ran == [(1, 5, 5), (2, 5, 5), (2, 5, 5)]


def test_layers_are_compiled_where_training_compiles_them(model, monkeypatch):
    compiled = []
    monkeypatch.setattr(measure, "compile_layers", compiled.append)
    config = TrainConfig(optimizer=OptimizerConfig(name="adamw"), compile=True)
    step = measure.SyntheticStep(config, model, "float32")
    assert compiled == [step.model]
    assert step.compiled
    assert measure.measured_on(config, model, "float32")["compile"]
    assert "compile" in measure.DECIDING


def test_an_error_that_is_not_memory_is_not_hidden():
    def run(batch, frames, tokens):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Prober(AnyStep(nn.Linear(1, 1), run), 1e9)(1, 1, 1)


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


@pytest.mark.parametrize("line", ["{", json.dumps({"format": "canter-probes/1", "measured_on": {}, "seconds": 1})])
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
