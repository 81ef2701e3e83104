"""Layers in int8: near the float ones, exact where they can be, and a row's result is its own."""

import pytest
import torch
from torch import nn

from canter.errors import ConfigError
from canter.inference.engine.engine import Engine
from canter.inference.engine.int8 import Int8Linear, quantize
from canter.inference.engine.requests import EngineConfig, Request
from canter.loading import load_module
from canter.models.model import SpeechModel

from ..conftest import END, noises, small_model


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_near_the_float_one(bias):
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=bias)
    x = torch.randn(3, 7, 96) * torch.rand(3, 7, 1) * 100  # rows of very different size
    expected, found = layer(x), Int8Linear(layer.weight, layer.bias)(x)
    assert found.shape == expected.shape
    assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 0.03


@torch.inference_mode()
def test_nothing_overflows_where_all_is_largest():
    layer = Int8Linear(torch.full((5, 512), 2.0), torch.arange(5.0))
    for sign in (1.0, -1.0):
        torch.testing.assert_close(layer(torch.full((4, 512), sign)), sign * 1024 + torch.arange(5.0).expand(4, 5))
    assert layer(torch.zeros(1, 512)).tolist() == [[0, 1, 2, 3, 4]]


@torch.inference_mode()
def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(1)
    layer = Int8Linear(torch.randn(40, 96), None)
    x = torch.randn(64, 96)
    together = layer(x)
    assert all(torch.equal(layer(x[n : n + 1])[0], together[n]) for n in range(len(x)))


def test_the_complete_model():
    model = quantize(small_model())
    small = {name for name, part in model.named_modules() if isinstance(part, Int8Linear)}
    assert len([name for name in small if name.startswith("encoder.layers.")]) == 2 * 11
    assert {name for name in small if name.startswith("decoder")} == {
        f"decoder.layers.{layer}.cross_attention.{part}" for layer in (0, 1) for part in ("key", "value")
    }
    requests = [Request(clip, [5, 7], n) for n, clip in enumerate(noises(12))]
    alone, together = (
        [h.tokens for h in Engine(model, END, EngineConfig(rows=rows)).decode(requests)] for rows in (1, 8)
    )
    assert sum(map(len, alone)) > 0
    assert sum(a == b for a, b in zip(alone, together)) >= 11  # attention is float32: near ties may fall differently


def test_elsewhere_than_on_a_processor(monkeypatch):
    with torch.device("meta"):
        model = SpeechModel(small_model().config)
    with pytest.raises(ConfigError, match="this model is on meta"):
        quantize(model)
    with pytest.raises(ConfigError, match="not on meta"):
        load_module("nowhere", "meta", "int8")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="oneDNN"):
        quantize(small_model())
