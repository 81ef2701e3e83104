import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.corpus.index import LengthIndex
from canter.errors import CanterError
from canter.models.model import ModelConfig, SpeechModel
from canter.planning.budget import Budget, Polynomial
from canter.planning.elastic import share_out
from canter.planning.plan import Plan
from canter.training.config import LossConfig, TrainConfig
from canter.training.feed.speed import AtSpeed
from canter.training.measure import choose_speed, synthetic_batch
from canter.training.recipe import prepare_training, run_training
from canter.training.schedule import Pace, choose_steps, limited, predicted

from .conftest import Messages

BYTES = Budget(limit_bytes=1e8, fixed_bytes=1e6, memory=Polynomial(T=5e4, TT=100.0, U=1e4, TU=50.0))


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0.1, 60.0), st.integers(3, 200)), min_size=1, max_size=60),
    st.floats(1.0, 100.0),
    st.floats(2e7, 1e9),
)
def test_micro_batches_hold_to_seconds_and_memory(rows, batch_seconds, memory):
    index = LengthIndex(np.array([s for s, _ in rows], np.float32), np.array([u for _, u in rows]))
    budget = dataclasses.replace(BYTES, limit_bytes=memory)
    plan = Plan(index, limited(budget, batch_seconds, index))
    frames = budget.frames(index.seconds)
    for step in plan:
        for batch in step:
            longest = frames[batch].max()
            if len(batch) > 1:
                assert longest * 0.08 * len(batch) <= max(batch_seconds, frames.max() * 0.08) + 1e-6


def test_the_longest_utterance_fits_by_itself_at_any_speed():
    index = LengthIndex(np.full(50, 30.0, np.float32), np.full(50, 40))
    speeds = (0.9, 1.0, 1.1)
    for epoch in range(4):
        budget = limited(Budget.from_batch_seconds(60.0), 24.0, index, slowest=min(speeds))
        plan = Plan(AtSpeed(index, 0, epoch, speeds), budget, epoch=epoch)
        assert plan.left_out() == []
        assert sum(len(batch) for step in plan for batch in step) == 50


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_minutes_are_those_of_the_ranks_there_are(ranks):
    """A run at the speed of the budget takes the given minutes, with or without new estimates of its steps."""
    random = np.random.default_rng(0)
    index = LengthIndex(random.uniform(1, 12, 4000).astype(np.float32), random.integers(5, 60, 4000))
    budget = dataclasses.replace(BYTES, time=Polynomial(T=1e-3, U=1e-4), fixed_seconds=0.02)
    plan = Plan(index, limited(budget, 24.0, index), micro_batches_per_step=4)
    true = []
    for before, _, _ in plan.walk():
        seconds = plan.step_seconds(before.window, before.step)
        true.append(max(float(seconds[one].sum()) for one in share_out(seconds, ranks)))
    _, mean, _ = predicted(plan, ranks)
    assert mean == pytest.approx(np.mean(true))
    config = TrainConfig(minutes=10.0)
    steps = choose_steps(config, mean, len(plan))
    pace = Pace(config, mean)
    pace.plan(0, steps)
    for one in true[:60]:
        pace.took(one, one)
    recorded = pace.steps(60, steps, sum(true[:60]))
    assert steps * mean == pytest.approx(600, rel=0.01)
    assert recorded * mean == pytest.approx(600, rel=0.05)


def test_steps_come_from_the_first_that_is_given(config):
    assert choose_steps(config, 0.5, 10) == 8
    assert choose_steps(dataclasses.replace(config, steps=None, minutes=1.0), 0.5, 10) == 120
    assert choose_steps(dataclasses.replace(config, steps=None, epochs=2.5), 0.5, 10) == 25


def test_measured_where_no_budget_is_given(config):
    said = []
    prepared = prepare_training(
        dataclasses.replace(config, budget=None, precision="auto", threads=None), Messages(said)
    )
    assert (config.output / "budget.json").exists()
    assert prepared.subject.precision in ("float32", "bf16")
    assert any("a step takes" in line for line in said)
    assert prepared.schedule.budget.step_seconds(4, 50, 20) > prepared.schedule.budget.step_seconds(1, 50, 20) > 0
    assert prepared.schedule.budget.bytes(4, 50, 20) > prepared.schedule.budget.bytes(4, 25, 20)
    again = prepare_training(dataclasses.replace(config, budget=None, precision="auto", threads=None))
    assert again.schedule.budget == prepared.schedule.budget
    assert again.subject.precision == prepared.subject.precision


def test_synthetic_batches_have_the_shape_asked_for(config):
    model = prepare_training(config).subject.model
    batch = synthetic_batch(model, 3, 40, 12, prompt=5)
    encoded, lengths = model.encode(*model.features(batch.audio, batch.audio_lengths))
    assert encoded.shape[:2] == (3, 40)
    assert lengths.tolist() == [40] * 3
    assert batch.tokens.shape == (3, 12)


def test_a_run_with_the_budget_of_another_takes_the_same_steps(config, tmp_path, monkeypatch):
    """Measured once, with all that follows from it: batches and their number, also what a CPU makes of them."""
    monkeypatch.setattr("canter.training.schedule.PROBES", 6)
    plain = dataclasses.replace(config, budget=None, steps=None, epochs=1.0, batch_seconds="auto", valid=())
    said = []
    first = prepare_training(plain, Messages(said))
    path = first.run.folder / "budget.json"
    (told,) = [line for line in said if "another run of this command measures its own" in line]
    assert told.endswith(f"'--budget {path}' gives it the same")
    said.clear()
    second = prepare_training(dataclasses.replace(plain, output=tmp_path / "second", budget=path), Messages(said))
    assert not any("measures its own" in line for line in said)
    assert second.schedule.plan.fingerprint == first.schedule.plan.fingerprint
    kept = ("precision", "threads", "steps", "batch_limits", "batches", "micro_batches_per_step")
    recorded = [one.run.recorded() for one in (first, second)]
    assert [recorded[0][name] for name in kept] == [recorded[1][name] for name in kept]


def test_threads_and_precision_are_those_of_a_given_budget(config, tmp_path):
    given = {"precision": "bf16", "threads": 1}
    path = tmp_path / "given.json"
    dataclasses.replace(Budget.from_batch_seconds(60.0), measured_on=given).save(path)
    config = dataclasses.replace(config, budget=path, precision="auto", threads=None)
    assert choose_speed(config, SpeechModel(ModelConfig())) == ("bf16", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"freeze": ("encodr.*",)},
            r"--freeze 'encodr.\*' matches no parameter; did you mean 'encoder\.[a-z_]+\.\*'\?",
        ),
        ({"freeze": ("*",)}, r"--freeze \* leaves nothing to train"),
        ({"freeze": ("encoder.*", "ctc.*")}, "nothing to train during the CTC-only warm-up; set --loss.ctc-warmup 0"),
        ({"tokenizer": "nowhere"}, "nowhere"),
        ({"budget": "nowhere.json"}, r"nowhere.json: no such budget"),
        ({"valid": "nowhere.jsonl"}, r"nowhere.jsonl does not exist"),
        ({"output": "/dev/null/run"}, r"/dev/null/run: cannot write there \(Not a directory\)"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read_or_measured(config, monkeypatch, changes, message):
    def measured(*_, **__):
        raise AssertionError("too late")

    for name in ("find_tokenizer", "find_index", "find_budget", "choose_subject"):
        monkeypatch.setattr(f"canter.training.recipe.{name}", measured)
    with pytest.raises(CanterError, match=message):
        run_training(dataclasses.replace(config, **changes))


def test_patterns_are_those_of_the_model_that_is_trained(config):
    loss = LossConfig(ctc_warmup=0.0)
    config = dataclasses.replace(config, freeze=("encoder.*", "ctc.*"), steps=1, valid=(), loss=loss)
    finished = run_training(config)
    frozen = {name for name, p in finished.prepared.subject.model.named_parameters() if not p.requires_grad}
    assert frozen == {
        name for name in dict(finished.prepared.subject.model.named_parameters()) if name[:3] in ("enc", "ctc")
    }
