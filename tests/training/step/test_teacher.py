"""Distillation: a student trained on the token probabilities of the model that it was cut from."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from canter.cli import reshape
from canter.errors import BudgetError, CheckpointError, ConfigError
from canter.loading import load_model
from canter.models.batch import Batch, SoftTargets, distillation_loss, targets_of
from canter.models.formats.checkpoint import save_model
from canter.planning.budget import Budget
from canter.training.config import AugmentConfig, LossConfig, ModelShape, OptimizerConfig, TrainConfig, rooted
from canter.training.defaults import decided
from canter.training.feed.data import collate
from canter.training.measure import SyntheticStep, measured_on
from canter.training.recipe import prepare_training, run_training
from canter.training.step import gradient
from canter.training.step.gradient import Gradient, Objective, TargetCounts

from ..conftest import a_config, stopping_after
from ..distributed.test_ranks import assert_same_steps, steps, train_on

# Python 3.12 warns of forking where threads are
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(scope="module")
def taught(spoken, tmp_path_factory):
    """A run from a model with one decoder layer, with the model of two layers that it was cut from as its teacher."""
    folder = tmp_path_factory.mktemp("taught")
    config = dataclasses.replace(a_config(spoken, folder), valid=(), track=(), steps=4, output=folder / "deep")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder_layers=2))
    run_training(config)
    reshape.run(reshape.Options(folder / "deep", folder / "shallow", decoder_layers=1, seconds=0.5, batch_size=1))
    return dataclasses.replace(
        config,
        output=folder / "taught",
        init=folder / "shallow",
        teacher=folder / "deep",
        model=ModelShape(),
        vocab_size=TrainConfig.vocab_size,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        loss=LossConfig(ctc_weight=0.3, label_smoothing=0.0, teacher_weight=0.8),
    )


@pytest.fixture
def config(taught, tmp_path):
    return dataclasses.replace(taught, output=tmp_path / "run")


def metrics(config):
    lines = map(json.loads, (config.output / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def weights(config):
    return load_file(sorted((config.output / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def assert_same_bits(ours, theirs):
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -- the loss --


def a_batch(lengths, prompts, v):
    n, u = len(lengths), max(lengths)
    one = torch.ones(n, dtype=torch.long)
    return Batch(
        audio=torch.zeros(n, 1),
        audio_lengths=one,
        tokens=torch.randint(v, (n, u)),
        token_lengths=torch.tensor(lengths),
        prompt_lengths=torch.tensor(prompts),
        characters=one[:, None],
        character_lengths=one,
        rows=one,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_loss_is_the_divergence_computed_directly(temperature):
    torch.manual_seed(0)
    batch = a_batch([6, 4, 3], [2, 1, 2], 7)
    ours, theirs = torch.randn(2, 3, 5, 7).unbind()
    expected = 0.0
    for row, places in enumerate(([1, 2, 3, 4], [0, 1, 2], [1])):  # text and end: neither prompt nor padding
        for place in places:
            p, q = (np.exp(one[row, place].double().numpy() / temperature) for one in (theirs, ours))
            p, q = p / p.sum(), q / q.sum()
            expected += temperature**2 * float((p * np.log(p / q)).sum())
    found = distillation_loss(ours, SoftTargets(theirs, temperature), targets_of(batch))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    none = distillation_loss(theirs, SoftTargets(theirs, temperature), targets_of(batch))
    assert none.item() == pytest.approx(0.0, abs=1e-5)


# -- the step --


@pytest.fixture(scope="module")
def prepared(taught, tmp_path_factory):
    return prepare_training(dataclasses.replace(taught, output=tmp_path_factory.mktemp("prepared") / "run"))


@pytest.fixture
def batches(prepared):
    """Six utterances of unequal lengths, in one micro-batch and in two."""
    data, pad = prepared.data.micro_batches, prepared.data.tokenizer.pad
    examples = [data.example(prepared.data.index.utterance(row), row) for row in range(6)]
    return collate(examples, pad), [collate(examples[:2], pad), collate(examples[2:], pad)]


def gradient_of(prepared, batches, weight=0.8, parts=1):
    """Sums of the losses, and the gradient of a step of these micro-batches, each computed in ``parts``."""
    loss = dataclasses.replace(prepared.config.loss, teacher_weight=weight)
    config, model = dataclasses.replace(prepared.config, loss=loss), prepared.subject.model.eval()
    computing = Gradient(config, model, "float32", teacher=prepared.subject.teacher)
    objective = Objective(config.loss, TargetCounts.of(batches))
    sums = sum(computing._backward_in_parts(batch, objective, 0, parts) for batch in batches)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    computing.discard()
    return sums, found


def test_the_objective_weighs_cross_entropy_and_divergence(prepared, batches):
    batch, model, teacher = batches[0], prepared.subject.model.eval(), prepared.subject.teacher
    with torch.no_grad():
        student, target = model.token_logits(batch), teacher.token_logits(batch)
        plain = model.loss(batch)
    divergence = distillation_loss(student, SoftTargets(target, 2.0), targets_of(batch))
    (attention, ctc, teacher_sum), _ = gradient_of(prepared, [batch])
    assert divergence > 1
    assert teacher_sum.item() == pytest.approx(divergence.item(), rel=1e-4)
    assert (attention.item(), ctc.item()) == pytest.approx((plain.attention.item(), plain.ctc.item()), rel=1e-4)
    for weight in (0.25, 1.0):
        config = LossConfig(ctc_weight=0.0, teacher_weight=weight)
        expected = ((1 - weight) * attention + weight * divergence) / plain.attention_count
        with torch.no_grad():
            loss = model.loss(batch, teacher=SoftTargets(target, 2.0))
        assert Objective(config, TargetCounts.of([batch]))(loss).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_gradient_does_not_depend_on_micro_batches_and_splits(prepared, batches, parts):
    whole, halves = batches
    (sums, expected), (found_sums, found) = gradient_of(prepared, [whole]), gradient_of(prepared, halves, parts=parts)
    torch.testing.assert_close(found_sums, sums, rtol=1e-4, atol=1e-3)
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-6, msg=name)
    _, without = gradient_of(prepared, [whole], weight=0.1)
    assert any(not torch.allclose(without[name], one, rtol=1e-2) for name, one in expected.items())


def test_the_teacher_stays_as_it_is_and_draws_no_random_numbers(prepared, batches):
    teacher = prepared.subject.teacher
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = torch.random.get_rng_state()
    computing = Gradient(prepared.config, prepared.subject.model, "float32", teacher=teacher)
    objective = Objective(prepared.config.loss, TargetCounts.of([batches[0]]))
    soft = computing.soft_targets(batches[0], objective)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert soft.logits.shape == (6, batches[0].tokens.shape[1] - 1, teacher.vocabulary)
    assert not soft.logits.requires_grad
    assert computing.soft_targets(batches[0], dataclasses.replace(objective, ctc_only=True)) is None


def test_a_budget_counts_the_teacher(prepared):
    config, student, teacher = prepared.config, prepared.subject.model, prepared.subject.teacher
    with_it, without = (SyntheticStep(config, student, "float32", teacher=one) for one in (teacher, None))
    size = sum(tensor.nbytes for tensor in (*teacher.parameters(), *teacher.buffers()))
    assert with_it.state_bytes - without.state_bytes == size
    calls = []
    handle = teacher.decoder.register_forward_hook(lambda *_: calls.append(1))
    with_it(2, 20, 8)
    handle.remove()
    assert calls == [1]
    shape = measured_on(config, student, "float32", teacher)["model_shape"]
    assert shape == f"{measured_on(config, student, 'float32')['model_shape']}, teacher {teacher.shape}"


# -- runs --


def test_a_run_with_a_teacher(config):
    finished = run_training(dataclasses.replace(config, precision="bf16"))
    rows = metrics(config)
    assert finished.progress.step == 4
    assert all(row["loss_teacher"] > 0 for row in rows)
    for row in rows:
        expected = 0.3 * row["loss_ctc"] + 0.7 * (0.2 * row["loss_attention"] + 0.8 * row["loss_teacher"])
        assert row["loss"] == pytest.approx(expected, rel=1e-6)


def test_it_learns_what_the_teacher_predicts(config):
    only = LossConfig(teacher_weight=1.0, teacher_temperature=1.0)
    rate = OptimizerConfig(learning_rate=3e-3, schedule="constant")
    run_training(dataclasses.replace(config, steps=30, loss=only, optimizer=rate))
    divergence = [row["loss_teacher"] for row in metrics(config)]
    assert np.mean(divergence[-5:]) < 0.5 * np.mean(divergence[:5])


def test_weight_0_is_training_without_a_teacher_bit_for_bit(config, tmp_path):
    loss = dataclasses.replace(config.loss, teacher_weight=None)
    plain = dataclasses.replace(config, output=tmp_path / "plain", teacher=None, loss=loss)
    zero = dataclasses.replace(config, loss=dataclasses.replace(loss, teacher_weight=0.0))
    run_training(plain)
    run_training(zero)
    assert [row["loss"] for row in metrics(zero)] == [row["loss"] for row in metrics(plain)]
    assert metrics(zero)[0]["loss_teacher"] is None
    assert_same_bits(zero, plain)


def test_it_resumes_bit_exactly(config, tmp_path):
    augment = AugmentConfig(frequency_masks=1, frequency_width=8, time_masks=2)
    config = dataclasses.replace(config, micro_batches_per_step=2, augment=augment, save_every=2)
    run_training(config)
    again = dataclasses.replace(config, output=tmp_path / "again")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(again, stopping_after(3))
    run_training(again)
    assert [row["loss"] for row in metrics(again)] == [row["loss"] for row in metrics(config)]
    assert_same_bits(again, config)


def test_another_teacher_is_a_change_that_is_named(config):
    run_training(dataclasses.replace(config, steps=2))
    other = dataclasses.replace(config, steps=2, teacher=config.init)
    with pytest.raises(ConfigError, match=r"teacher: .*deep -> .*shallow.*--allow-changes"):
        run_training(other)
    run_training(dataclasses.replace(other, allow_changes=True))


@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_two_ranks_take_the_same_steps(config, tmp_path, on_ranks, parallel):
    config = dataclasses.replace(config, micro_batches_per_step=2, steps=3)
    run_training(config)
    shared = dataclasses.replace(config, output=tmp_path / "ranks", parallel=parallel)
    assert on_ranks(2, train_on, shared) == [(3, "")] * 2
    assert_same_steps(steps(shared), steps(config))


def test_memory_that_runs_out_for_the_teacher_splits_the_micro_batch(config, tmp_path, monkeypatch):
    run_training(dataclasses.replace(config, steps=2))
    soft, failed = Gradient.soft_targets, []

    def short(self, batch, objective):
        if not failed:
            failed.append(len(batch.rows))
            raise torch.OutOfMemoryError("out of memory")
        return soft(self, batch, objective)

    monkeypatch.setattr(gradient.Gradient, "soft_targets", short)
    capped = dataclasses.replace(config, steps=2, output=tmp_path / "capped", check_memory=False)
    run_training(capped)
    assert failed
    assert "out of memory" in (capped.output / "metrics.jsonl").read_text()
    assert metrics(capped)[0]["loss"] == pytest.approx(metrics(config)[0]["loss"], rel=1e-4)


# -- errors --


def test_errors_name_what_to_change(config, spoken, tmp_path):
    with pytest.raises(ConfigError, match=r"--loss.teacher-weight 0.5 needs a --teacher"):
        TrainConfig(loss=LossConfig(teacher_weight=0.5))
    with pytest.raises(ConfigError, match=r"--loss.teacher-weight is 1.5; it must be between 0 and 1"):
        dataclasses.replace(config, loss=LossConfig(teacher_weight=1.5))
    with pytest.raises(ConfigError, match=r"--loss.teacher-temperature is 0; it must be positive"):
        dataclasses.replace(config, loss=LossConfig(teacher_temperature=0))
    assert decided(dataclasses.replace(config, loss=LossConfig())).loss.teacher_weight == 0.5
    assert decided(TrainConfig()).loss.teacher_weight is None
    assert rooted(dataclasses.replace(config, teacher="relative")).teacher.is_absolute()
    with pytest.raises(CheckpointError, match=r"nowhere"):
        prepare_training(dataclasses.replace(config, teacher=tmp_path / "nowhere"))


def test_a_teacher_that_does_not_fit_is_refused(config, spoken, tmp_path):
    scratch = dataclasses.replace(config, init=None, teacher=None, loss=LossConfig(), output=tmp_path / "other")
    run_training(dataclasses.replace(scratch, steps=1, vocab_size=90, model=a_config(spoken, tmp_path).model))
    with pytest.raises(
        ConfigError,
        match=r"--teacher .*other has another tokenizer \(\w{16} of 90 outputs\) than --init .*shallow \(\w{16} of 100 "
        r"outputs\); use a teacher with the same tokenizer",
    ):
        prepare_training(dataclasses.replace(config, teacher=tmp_path / "other"))
    model = load_model(next((config.teacher / "checkpoints").glob("step-*")))
    narrow = dataclasses.replace(model.config, decoder=dataclasses.replace(model.config.decoder, positions=64))
    short = type(model)(narrow)
    short.tokenizer = model.tokenizer
    save_model(short, tmp_path / "short")
    with pytest.raises(ConfigError, match=r"--teacher .*short takes at most 16000 Hz, inf s and 64 tokens, and --init"):
        prepare_training(dataclasses.replace(config, teacher=tmp_path / "short"))


def test_a_budget_of_another_teacher_is_refused(config, prepared, tmp_path):
    subject = prepared.subject
    budget = Budget.from_batch_seconds(60.0)
    conditions = measured_on(prepared.config, subject.model, "float32")
    dataclasses.replace(budget, measured_on=conditions).save(tmp_path / "plain.json")
    with pytest.raises(BudgetError, match=r"model_shape is .*, teacher .* here and "):
        prepare_training(dataclasses.replace(config, budget=tmp_path / "plain.json"))
