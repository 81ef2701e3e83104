import contextlib
import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from canter.errors import ConfigError
from canter.fields import from_mapping
from canter.training.config import (
    LossConfig,
    ModelShape,
    OptimizerConfig,
    TrainConfig,
    differences,
    dump_config,
    load_config,
    rooted,
)
from canter.training.defaults import decided


def test_a_configuration_survives_yaml(tmp_path):
    config = TrainConfig(
        manifest=(tmp_path / "a.jsonl",), minutes=3.0, model=ModelShape(width=64), loss=LossConfig(0.0, 0.0)
    )
    assert from_mapping(TrainConfig, yaml.safe_load(dump_config(config)), "x") == config


def test_trained_weights_get_other_settings_than_random_ones(tmp_path):
    scratch, tuned = decided(TrainConfig()), decided(TrainConfig(init=tmp_path))
    assert (scratch.optimizer.name, scratch.optimizer.learning_rate) == ("muon", 2e-3)
    assert (tuned.optimizer.name, tuned.optimizer.learning_rate) == ("adamw", 3e-5)
    assert (scratch.loss.ctc_weight, scratch.loss.ctc_alone) == (0.3, 0.2)
    assert (tuned.loss.ctc_weight, tuned.loss.ctc_alone) == (0.0, 0.0)
    assert decided(TrainConfig(loss=LossConfig(ctc_weight=0.0))).loss.ctc_alone == 0
    own = TrainConfig(init=tmp_path, optimizer=OptimizerConfig(name="muon", learning_rate=1e-3))
    asked = decided(own).optimizer
    assert (asked.name, asked.learning_rate) == ("muon", 1e-3)


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("manifest: train.jsonl\noptimizer: {learning_rate: 1e-3}\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.manifest == (tmp_path / "train.jsonl",)
    assert config.optimizer.learning_rate == 1e-3  # YAML 1.1 takes 1e-3 for a string


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stepz: 3", "did you mean 'steps'"),
        ("model: {widht: 3}", "did you mean 'width'"),
        ("steps: many", "expected int, found 'many'"),
        ("steps: true", "expected int, found True"),
        ("steps: -1", "must be positive"),
        ("minutes: .inf", "--minutes is inf; it must be positive and finite"),
        (f"minutes: 1{400 * '0'}", "minutes: expected float, found 1000"),
        ("epochs: .nan", "--epochs is nan; it must be positive and finite"),
        (
            "seed: 100000000000000000000000",
            "--seed is 100000000000000000000000; it must be at least 0 and below 2^63",
        ),
        ("workers: -1", "--workers is -1; it must be 0 or more"),
        ("optimizer: {learning_rate: -0.1}", "--optimizer.learning-rate is -0.1; it must be positive"),
        ("model: {encoder_layers: 0}", "--model.encoder-layers is 0; it must be at least 1"),
        ("model: {dropout: 2}", "--model.dropout is 2.0; it must be at least 0 and below 1"),
        ("skip_limit: 3", "must be between 0 and 1"),
        ("precision: fp8", "none of auto, bf16, float32"),
        ("- 1", "expected a mapping"),
        ("a: [", "is not YAML"),
        ("model: {width: 100, heads: 3}", "not a multiple"),
        ("loss: {ctc_weight: 0.0, ctc_alone: 0.1}", "ctc-alone"),
    ],
)
def test_mistakes_are_named(tmp_path, text, says):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml") as caught:
        load_config(path)
    assert says in str(caught.value)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)
FIELDS = st.sampled_from([f.name for f in dataclasses.fields(TrainConfig)])


@given(st.dictionaries(FIELDS, VALUES, max_size=4))
def test_any_mapping_gives_a_configuration_or_a_config_error(mapping):
    with contextlib.suppress(ConfigError):
        assert isinstance(from_mapping(TrainConfig, mapping, "file"), TrainConfig)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")))
def test_recipes_can_be_read(path):
    assert load_config(path) != TrainConfig()


def test_differences_leave_out_what_changes_no_step():
    config = TrainConfig(steps=5)
    assert differences(dataclasses.replace(config, workers=4, threads=1), config) == []
    assert differences(dataclasses.replace(config, seed=2), config) == ["seed: 0 -> 2"]
    assert differences(dataclasses.replace(config, model=ModelShape(width=32)), config) == ["model.width: 144 -> 32"]


@pytest.mark.parametrize("url", ["s3://bucket/train.jsonl", "/here/https:/host/m.jsonl::/here/https:/host/a.tar"])
def test_a_url_is_for_a_mixture(url):
    with pytest.raises(ConfigError, match=r"is a URL; name it in a mixture's YAML"):
        rooted(TrainConfig(manifest=(Path(url),)))
    with pytest.raises(ConfigError, match="is a URL; copy it"):
        rooted(TrainConfig(valid=(Path(url),)))
    kept = (Path("/here/a:b/train.jsonl"),)
    assert rooted(TrainConfig(manifest=kept)).manifest == kept
