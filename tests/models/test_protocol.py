"""Every model offers the interface of `AnyModel`, and the tables of docs/models.md are those of the code."""

import typing
from pathlib import Path

import pytest

from canter.errors import ConfigError
from canter.loading import FORMATS
from canter.models.model import SUPPORTED, SpeechModel
from canter.models.protocol import AnyModel, Capability, check_support, module_of

from .conftest import small_model

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
MEMBERS = sorted(name for name in {*dir(AnyModel), *AnyModel.__annotations__} if not name.startswith("_"))


def test_canters_model_offers_all_of_it():
    model: AnyModel = small_model()
    assert [name for name in MEMBERS if not hasattr(model, name)] == []
    assert model.layers()["encoder"]["kind"] == "fastconformer"
    assert sum(model.parts().values()) == sum(weight.numel() for weight in module_of(model).parameters())
    assert model.cost(1.0, 5).tokens == 5


def test_a_model_of_transformers_offers_all_of_it():
    pytest.importorskip("transformers")
    from ..integrations.small_transformers import built

    model: AnyModel = built("moonshine")
    assert [name for name in MEMBERS if not hasattr(model, name)] == []
    with pytest.raises(ConfigError, match="--compile: here is a model of another library"):
        check_support(model, {"--compile": "compile"}, "here")
    check_support(small_model(), {"--compile": "compile"}, "here")


def test_the_page_lists_every_format():
    for name, kept in FORMATS.items():
        assert f"| `{name}` | {kept.files}" in PAGE


def test_the_page_says_what_models_support():
    for capability in typing.get_args(Capability):
        ours = "yes" if capability in SUPPORTED else "no"
        row = next((line for line in PAGE.splitlines() if line.startswith(f"| `{capability}` |")), "")
        assert row.endswith(f"| {ours} | no |"), capability
    assert SpeechModel.supports.fget(small_model()) == SUPPORTED
