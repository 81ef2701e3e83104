"""Requests of several adapters share a batch, and each is decoded as by a model into which its adapter was merged."""

import copy
from dataclasses import replace

import pytest
import torch

from canter.errors import ConfigError
from canter.inference.engine.engine import Engine
from canter.inference.engine.graphs import FixedSteps
from canter.inference.engine.requests import EngineConfig, Request
from canter.models.formats.peft import attach_adapters, save_adapter
from canter.models.lora import LoraAdapter, attach, attach_bank, linear_layers, merge

from ..conftest import END, noises, small_model

CONFIG = {"tokens_per_frame": 0, "extra_tokens": 12}


def adapter_of(model, seed: int, rank: int, only: str = "") -> tuple[LoraAdapter, dict[str, torch.Tensor]]:
    """Random matrices, large enough to change what is written."""
    layers = {n: x for n, x in linear_layers(model).items() if only in n and "linear_pos" not in n}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A"] = torch.randn(rank, layer.in_features, generator=generator) * 0.2
        tensors[f"{name}.lora_B"] = torch.randn(layer.out_features, rank, generator=generator) * 0.2
    return LoraAdapter(rank, 2.0 * rank, 0.0, tuple(layers)), tensors


@pytest.fixture(scope="module")
def models():
    """The base with a bank, and the merged models of none, the first and the second adapter."""
    base = small_model()
    found = {"one": adapter_of(base, 1, 4), "two": adapter_of(base, 2, 2, only="decoder")}
    merged = [base]
    for adapter, tensors in found.values():
        merged.append(copy.deepcopy(base))
        merge(merged[-1], adapter, tensors)
    together = copy.deepcopy(base)
    together.set_bank(attach_bank(together, found, {"one": "one", "two": "two"}))
    return together, merged


def requests(count: int = 12) -> list[Request]:
    return [
        Request(clip, [5] * (1 + n % 3) + [7], n, adapter=n % 3, aligned=n % 2 == 0, scored=True)
        for n, clip in enumerate(noises(count))
    ]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_mixed_batch_is_the_merged_models_one_by_one(models, rows, beams):
    together, merged = models
    config = EngineConfig(rows=rows, beams=beams, **CONFIG)
    found = Engine(together, END, config).decode(requests())
    expected = [Engine(merged[one.adapter], END, config).decode([replace(one, adapter=0)])[0] for one in requests()]
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
        assert (one.alignment is None) == (other.alignment is None)
        if one.alignment and other.alignment:
            assert one.alignment.probabilities == pytest.approx(other.alignment.probabilities, abs=1e-3)
    plain = Engine(merged[0], END, config).decode([replace(one, adapter=0) for one in requests()])
    changed = [one.tokens != other.tokens for one, other in zip(found, plain)]
    assert any(changed[1::3])
    assert any(changed[2::3])
    assert not any(changed[::3])


def test_fixed_shapes_have_the_adapters_of_their_slots(models, monkeypatch):
    together, _ = models
    config = EngineConfig(rows=5, **CONFIG)
    expected = Engine(together, END, config).decode(requests())
    monkeypatch.setattr(Engine, "_fixed_steps", lambda engine: FixedSteps(engine.model.decoder, capture=False))
    found = Engine(together, END, config).decode(requests())
    assert [one.tokens for one in found] == [one.tokens for one in expected]


def test_adapters_of_folders(tmp_path):
    folders, models = {}, []
    for number, name in enumerate(("one", "two")):
        model = small_model()
        adapter, tensors = adapter_of(model, number, 3)
        model.adapter = adapter
        attach(model, adapter, seed=0)
        folders[name] = save_adapter(model, tmp_path / name, tensors)
        models.append(small_model())
        merge(models[-1], adapter, tensors)
    together = small_model()
    attach_adapters(together, folders, "the model")
    assert together.bank is not None
    assert together.bank.numbers == {"one": 1, "two": 2}
    config = EngineConfig(**CONFIG)
    for number, model in enumerate(models, 1):
        asked = [replace(one, adapter=number) for one in requests(4)]
        expected = Engine(model, END, config).decode([replace(one, adapter=0) for one in asked])
        assert [h.tokens for h in Engine(together, END, config).decode(asked)] == [h.tokens for h in expected]


def test_a_layer_that_all_rows_share_takes_no_adapters():
    model = small_model()
    name = next(name for name in linear_layers(model) if name.endswith("linear_pos"))
    layer = linear_layers(model)[name]
    tensors = {
        f"{name}.lora_A": torch.zeros(1, layer.in_features),
        f"{name}.lora_B": torch.zeros(layer.out_features, 1),
    }
    with pytest.raises(ConfigError, match=r"folder changes .*linear_pos, whose input all rows of a batch share"):
        attach_bank(model, {"x": (LoraAdapter(1, 1.0, 0.0, (name,)), tensors)}, {"x": "folder"})
