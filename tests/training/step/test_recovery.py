"""Errors that a run survives: out of memory, and losses that are not finite."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from canter.corpus.manifest import write_manifest
from canter.errors import CanterError, ManifestError
from canter.runtime import is_out_of_memory
from canter.training.config import LossConfig, OptimizerConfig
from canter.training.feed.data import Address
from canter.training.recipe import prepare_training, run_training
from canter.training.step.gradient import Gradient, TargetCounts
from canter.training.step.optimizers import Optimizers

from ..conftest import Messages, memory_cap


def rows(config, kind):
    lines = map(json.loads, (config.output / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def losses(config):
    return [row["loss"] for row in rows(config, "train")]


def skipped(config):
    return [json.loads(line) for line in (config.output / "skipped.jsonl").read_text().splitlines()]


@pytest.fixture
def quiet(config):
    loss, rate = (LossConfig(ctc_warmup=0.0), OptimizerConfig(schedule="constant", warmup=1))  # whatever the steps are
    return dataclasses.replace(config, valid=(), batching_window=20, track=(), loss=loss, optimizer=rate)


def test_what_does_not_fit_is_cut_to_the_same_losses_and_the_budget_learns(quiet, tmp_path):
    """The cap is below what a micro-batch of the budget takes."""
    with memory_cap(1e12) as kept:
        run_training(dataclasses.replace(quiet, steps=4))
    cap = kept[1] / 1.25
    capped = dataclasses.replace(quiet, output=tmp_path / "capped", steps=12)
    with memory_cap(cap):
        finished = run_training(capped)
    events = rows(capped, "event")
    assert {event["what"] for event in events} == {"out of memory"}
    assert losses(capped)[:2] == pytest.approx(losses(quiet)[:2], rel=1e-4)
    limit = finished.prepared.schedule.plan.budgets[0][1].limit_bytes
    assert all(0.5 * limit < event["limit"] < limit for event in events)
    filled = [row["batch"] * row["frames_max"] for row in rows(capped, "train")]
    assert max(filled[-4:]) < max(filled)
    state = json.loads((capped.output / "checkpoints" / "step-000012" / "training" / "state.json").read_text())
    assert [last for *_, last in state["tightenings"]] == [event["limit"] for event in events]


def test_a_run_whose_budget_was_tightened_resumes_to_the_same_steps(quiet, tmp_path):
    with memory_cap(1e12) as kept:
        run_training(dataclasses.replace(quiet, steps=4))
    outputs = []
    for name, stops in (("through", (12,)), ("resumed", (5, 8, 12))):
        one = dataclasses.replace(quiet, output=tmp_path / name, save_every=1, allow_changes=True)
        for stop in stops:
            with memory_cap(kept[1] / 1.25):
                run_training(dataclasses.replace(one, steps=stop))
        outputs.append((one.output / "utterances.jsonl").read_text())
    assert rows(one, "event")
    assert outputs[0] == outputs[1]


def test_an_utterance_that_does_not_fit_by_itself_is_skipped_and_named(quiet):
    with memory_cap(300_000):
        finished = run_training(dataclasses.replace(quiet, steps=2, max_skipped=1.0))
    assert finished.progress.step == 2
    assert any("do not fit in memory even as a batch of one" in row["reason"] for row in skipped(quiet))


def test_the_gradient_is_a_mean_over_what_is_left(quiet):
    """One utterance of four does not fit even by itself: its targets do not count either."""
    prepared = prepare_training(dataclasses.replace(quiet, loss=LossConfig(ctc_weight=0.0, ctc_warmup=0.0)))
    model, true = prepared.subject.model, prepared.subject.model.loss_of
    lengths = np.asarray(prepared.data.index.seconds)
    four = np.argsort(lengths)[-4:]

    def gradient_of(rows, too_large=None):
        def loss_of(encoded, encoded_lengths, batch, **settings):
            if too_large in batch.rows.tolist():
                raise torch.OutOfMemoryError("out of memory")
            return true(encoded, encoded_lengths, batch, **settings)

        model.loss_of = loss_of
        one = prepared.data.micro_batches[Address(0, 0, True, rows, 0)]
        gradient, counts = Gradient(prepared.config, model, "float32"), TargetCounts.of([one.batch])
        computed = gradient.compute([one], counts, 0, ctc_only=False)
        assert computed.unfit == ([] if too_large is None else [too_large])
        gradient.correct(counts, TargetCounts.of([one.batch.without(computed.unfit)]), ctc_only=False)
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        gradient.discard()
        return torch.cat([part.flatten() for part in found])

    with_it, without_it = gradient_of(four, int(four[-1])), gradient_of(four[:-1])
    assert with_it.norm() == pytest.approx(float(without_it.norm()), rel=0.05)


def test_an_utterance_that_does_not_fit_by_itself_counts_in_no_figure(quiet):
    with memory_cap(300_000):
        run_training(dataclasses.replace(quiet, steps=2, max_skipped=1.0))
    lost = [row["step"] for row in skipped(quiet)]
    planned = [json.loads(line) for line in (quiet.output / "utterances.jsonl").read_text().splitlines()]
    for row, plan in zip(rows(quiet, "train"), planned, strict=True):
        assert row["utterances"] == sum(map(len, plan["rows"])) - lost.count(row["step"])


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_one):
    assert is_out_of_memory(error) is is_one


def test_memory_that_runs_out_elsewhere_ends_the_run_with_a_message(quiet, monkeypatch):
    def full(self, step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Optimizers, "step", full)
    with pytest.raises(CanterError, match=r"step 1: memory ran out outside of a micro-batch .*Tried to allocate 2 GiB"):
        run_training(quiet)


def spoiled(monkeypatch, steps):
    """The loss of these steps is not a number."""
    compute = Gradient.compute

    def spoil(self, loaded, counts, step, alone):
        found = compute(self, loaded, counts, step, alone)
        if step in steps:
            next(p for p in self.model.parameters() if p.grad is not None).grad[0] = math.nan
            return dataclasses.replace(found, ctc=math.nan) if step % 2 else found
        return found

    monkeypatch.setattr(Gradient, "compute", spoil)


def test_a_step_without_a_finite_loss_or_gradient_changes_nothing(quiet, monkeypatch):
    spoiled(monkeypatch, {2, 3})
    finished = run_training(quiet)
    assert finished.progress.step == 8
    assert [event["step"] for event in rows(quiet, "event")] == [3, 4]
    assert all(torch.isfinite(tensor).all() for tensor in finished.prepared.subject.model.state_dict().values())
    assert math.isfinite(losses(quiet)[-1])


def test_too_many_of_them_in_a_row_end_the_run(quiet, monkeypatch):
    spoiled(monkeypatch, set(range(2, 8)))
    with pytest.raises(CanterError, match=r"step 5: .* the last 3 steps .* lower --optimizer.learning-rate"):
        run_training(dataclasses.replace(quiet, max_bad_steps=3))


def test_validation_audio_that_cannot_be_read_is_reported(quiet, spoken, tmp_path):
    rows = [json.loads(line) for line in spoken.test_manifest.read_text().splitlines()]
    for row in rows:
        row["audio_filepath"] = str(spoken.test_manifest.parent / row["audio_filepath"])
    rows[0]["audio_filepath"] = "gone.wav"
    write_manifest(tmp_path / "valid.jsonl", rows)
    one = dataclasses.replace(quiet, valid=(tmp_path / "valid.jsonl",), valid_utterances=6, steps=1)
    said = []
    run_training(one, Messages(said))
    assert any("1 of 6 validation utterances cannot be used: " in line and "gone.wav" in line for line in said)
    write_manifest(tmp_path / "valid.jsonl", [row | {"audio_filepath": "gone.wav"} for row in rows])
    with pytest.raises(ManifestError, match=r"6 of 6 validation utterances cannot be used: .*gone.wav"):
        run_training(one)
    with pytest.raises(ManifestError, match=r"nowhere.jsonl does not exist"):
        run_training(dataclasses.replace(one, valid=(tmp_path / "nowhere.jsonl",), output=tmp_path / "new"))
