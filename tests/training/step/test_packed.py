"""Training without padding: the step's gradient, what does not fit in memory, resuming, other ranks, refusals."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from canter.errors import ConfigError
from canter.models.norm import MaskedBatchNorm
from canter.training.config import LoraConfig, LossConfig, ModelShape, OptimizerConfig
from canter.training.feed.data import Address
from canter.training.recipe import prepare_training, run_training
from canter.training.step.gradient import Gradient, SplitMicroBatch, TargetCounts

from ..conftest import memory_cap


@pytest.fixture
def packed(config):
    loss, rate = LossConfig(ctc_warmup=0.0), OptimizerConfig(schedule="constant", warmup=1)
    return dataclasses.replace(config, strategy="packed", valid=(), track=(), loss=loss, optimizer=rate)


def rows(config, kind):
    lines = map(json.loads, (config.output / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def losses(config):
    return [row["loss"] for row in rows(config, "train")]


def gradient_of(config, model, loaded, split=None):
    """Return sums of the losses, gradient and statistics of a micro-batch, as a step computes them."""
    gradient, counts = Gradient(config, model, "float32"), TargetCounts.of([loaded.batch])
    if split is not None:
        attempt = gradient._attempt

        def once(*arguments):
            arguments[3][loaded.address.number] = split
            return attempt(*arguments)

        gradient._attempt = once
    computed = gradient.compute([loaded], counts, 0, ctc_only=False)
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    statistics = [torch.stack(n.pending[0]) for n in model.modules() if isinstance(n, MaskedBatchNorm)]
    gradient.discard()
    return (computed.attention, computed.ctc), found, statistics


def test_a_step_gives_the_gradient_of_padded_micro_batches(packed):
    """SpecAugment included, whose masks are the utterance's own; and so do its parts after an out-of-memory error."""
    packed = dataclasses.replace(packed, augment=dataclasses.replace(packed.augment, frequency_masks=1, time_masks=2))
    prepared = prepare_training(packed)
    model = prepared.subject.model.train()
    loaded = prepared.data.micro_batches[Address(0, 0, True, np.arange(9), 0)]
    assert len(loaded.batch.by_length()) > 2
    padded = dataclasses.replace(prepared.config, strategy="balanced")
    sums, expected, statistics = gradient_of(padded, model, loaded)
    for split in (None, SplitMicroBatch(0, 1, 2, True)):
        found = gradient_of(prepared.config, model, loaded, split)
        assert found[0] == pytest.approx(sums, rel=1e-6)
        assert (found[1] - expected).norm() < 1e-5 * expected.norm()
        for one, other in zip(found[2], statistics, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_split_to_the_same_losses(packed, tmp_path):
    packed = dataclasses.replace(packed, steps=4, check_memory=False)
    with memory_cap(1e12) as kept:
        run_training(packed)
    capped = dataclasses.replace(packed, output=tmp_path / "capped")
    with memory_cap(kept[1] / 1.2):
        run_training(capped)
    assert {event["what"] for event in rows(capped, "event")} == {"out of memory"}
    assert losses(capped)[:2] == pytest.approx(losses(packed)[:2], rel=1e-4)


def test_a_run_has_no_padding_and_every_utterance_once_an_epoch(packed):
    run_training(dataclasses.replace(packed, steps=None, epochs=1.0))
    assert all(row["padding"] == pytest.approx(0.0, abs=1e-9) for row in rows(packed, "train"))
    planned = [json.loads(line) for line in (packed.output / "utterances.jsonl").read_text().splitlines()]
    seen = [row for step in planned for micro_batch in step["rows"] for row in micro_batch]
    assert sorted(seen) == list(range(40))


def test_a_teacher_is_asked_group_by_group(packed, tmp_path):
    run_training(dataclasses.replace(packed, steps=2))
    results = []
    for strategy in ("packed", "balanced"):
        one = dataclasses.replace(packed, output=tmp_path / strategy, strategy=strategy)
        one = dataclasses.replace(one, teacher=packed.output, tokenizer=packed.output / "tokenizer")
        prepared = prepare_training(one)
        loaded = prepared.data.micro_batches[Address(0, 0, True, np.arange(9), 0)]
        gradient = Gradient(
            prepared.config, prepared.subject.model.train(), "float32", teacher=prepared.subject.teacher
        )
        results.append(gradient.compute([loaded], TargetCounts.of([loaded.batch]), 0, ctc_only=False))
    assert results[0].distillation == pytest.approx(results[1].distillation, rel=1e-5)
    assert results[0].attention == pytest.approx(results[1].attention, rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_lora_and_bf16(packed, tmp_path, precision):
    first = dataclasses.replace(packed, steps=2)
    run_training(first)
    tuned = dataclasses.replace(
        packed, output=tmp_path / "tuned", init=first.output, lora=LoraConfig(rank=2), steps=3, precision=precision,
        model=ModelShape(),
    )  # fmt: skip
    run_training(tuned)
    assert len(losses(tuned)) == 3
    assert np.isfinite(losses(tuned)).all()
    assert losses(tuned)[0] == pytest.approx(losses(first)[1], rel=0.2)


def test_compiled_layers_are_refused(packed):
    with pytest.raises(ConfigError, match="--compile compiles layers for padded micro-batches"):
        prepare_training(dataclasses.replace(packed, compile=True))


def test_a_budget_of_padded_steps_is_refused(packed, tmp_path):
    """Packed steps take other memory and time, so a measured budget names what it is of."""
    first = dataclasses.replace(packed, budget=None, strategy="balanced", steps=1, output=tmp_path / "first")
    prepare_training(first)
    measured = dataclasses.replace(packed, budget=first.output / "budget.json")
    with pytest.raises(ValueError, match="measured on something else"):
        prepare_training(measured)
