"""Weights cast once a step: on a GPU how bf16 is trained in, here on a CPU."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.lora import LoraAdapter, attach, linear_layers
from canter.models.model import ModelConfig, SpeechModel
from canter.training.config import LossConfig, OptimizerConfig
from canter.training.measure import synthetic_batch
from canter.training.recipe import run_training
from canter.training.step import gradient
from canter.training.step.gradient import Bf16Weights, bf16_weights

from .test_recovery import losses, rows


@pytest.fixture
def model():
    torch.manual_seed(0)
    encoder = FastConformerConfig(layers=2, width=32, heads=2, feedforward=64, subsampling_channels=8, mels=16)
    decoder = DecoderConfig(layers=2, width=32, heads=2, feedforward=64, vocabulary=50, positions=64)
    return SpeechModel(ModelConfig(FeatureConfig(mels=16), encoder, decoder, ctc_vocabulary=20)).train()


def backward(model, batch):
    loss = model.loss(batch)
    (loss.attention / loss.attention_count + loss.ctc / loss.ctc_count).backward()
    return float(loss.attention.detach())


def test_gradients_come_close_and_weights_come_back(model):
    batch = synthetic_batch(model, 3, 40, 12, prompt=2)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    exact = backward(model, batch)
    gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
    with Bf16Weights(model) as half:
        assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
        assert backward(model, batch) == pytest.approx(exact, rel=0.02)
        half.collect()
        assert all(one.grad is None for one in model.parameters())
    for name, one in model.named_parameters():
        assert torch.equal(one, before[name])
        assert one.grad.dtype == torch.float32
        assert (one.grad - gradients[name]).norm() <= 0.25 * gradients[name].norm() + 1e-2, name


def test_an_adapter_is_trained_in_bf16_copies(model):
    names = tuple(name for name in linear_layers(model) if ".layers." in name)
    attach(model, LoraAdapter(4, 8.0, 0.0, names), 0)
    for name, one in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(one, std=0.1)
    batch = synthetic_batch(model, 3, 40, 12, prompt=2)
    exact = backward(model, batch)
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad}
    with Bf16Weights(model) as half:
        assert backward(model, batch) == pytest.approx(exact, rel=0.02)
        half.collect()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert found.keys() == gradients.keys()
    ours, exactly = (torch.cat([tensors[name].flatten() for name in gradients]) for tensors in (found, gradients))
    assert (ours - exactly).norm() <= 0.1 * exactly.norm()


def test_micro_batches_are_summed_in_float32(model):
    """A hundred and one gradients of one: in bf16 they would come to 100."""
    weight = model.decoder.head_bias
    with Bf16Weights(model) as half:
        for size in [256.0] + 100 * [1.0]:
            weight.grad = torch.full_like(weight, size)
            half.collect()
    assert weight.grad.unique().tolist() == [356.0]


def test_what_is_frozen_has_no_gradient_and_what_was_collected_is_forgotten(model):
    model.encoder.requires_grad_(False)
    batch = synthetic_batch(model, 2, 20, 8, prompt=2)
    with Bf16Weights(model) as half:
        backward(model, batch)
        half.collect()
    assert all(one.grad is None for one in model.encoder.parameters())
    assert all(one.grad is not None for one in model.decoder.parameters())

    def broken():
        with Bf16Weights(model) as half:
            backward(model, batch)
            half.collect()
            half.sums = {}
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        broken()
    assert all(one.grad is None and one.dtype == torch.float32 for one in model.parameters())


def test_a_run_learns_as_in_float32_splits_and_saves_float32_weights(config, tmp_path, monkeypatch):
    rate = OptimizerConfig(schedule="constant", warmup=1)
    quiet = dataclasses.replace(config, valid=(), track=(), loss=LossConfig(ctc_warmup=0.0), optimizer=rate)
    run_training(quiet)
    monkeypatch.setattr(gradient, "bf16_weights", lambda model, precision: Bf16Weights(model))
    half = dataclasses.replace(quiet, output=tmp_path / "half", precision="bf16")
    run_training(half)
    assert losses(half) == pytest.approx(losses(quiet), rel=0.05)
    assert rows(half, "event") == []
    saved = load_file(half.output / "checkpoints/step-000008/model.safetensors")
    assert {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()} == {torch.float32}


def test_on_a_cpu_bf16_is_autocast(model):
    assert bf16_weights(model, "bf16") is None
