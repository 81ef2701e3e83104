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
    REMOVED,
    RENAMED,
    LossConfig,
    ModelShape,
    OptimizerConfig,
    TrainConfig,
    changes,
    dump_config,
    load_config,
    load_run_config,
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
    assert (scratch.loss.ctc_weight, scratch.loss.ctc_warmup) == (0.3, 0.2)
    assert (tuned.loss.ctc_weight, tuned.loss.ctc_warmup) == (0.0, 0.0)
    assert decided(TrainConfig(loss=LossConfig(ctc_weight=0.0))).loss.ctc_warmup == 0
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
        ("seed: 100000000000000000000000", "--seed is 100000000000000000000000; it must be at least 0 and below 2^63"),
        ("workers: -1", "--workers is -1; it must be 0 or more"),
        ("optimizer: {learning_rate: -0.1}", "--optimizer.learning-rate is -0.1; it must be positive"),
        ("model: {encoder_layers: 0}", "--model.encoder-layers is 0; it must be at least 1"),
        ("model: {dropout: 2}", "--model.dropout is 2.0; it must be at least 0 and below 1"),
        ("max_skipped: 3", "must be between 0 and 1"),
        ("precision: fp8", "none of auto, bf16, float32"),
        ("- 1", "expected a mapping"),
        ("a: [", "is not YAML"),
        ("model: {width: 100, heads: 3}", "--model.width 100 is not a multiple of --model.heads 3"),
        ("model: {decoder_width: 100, heads: 3}", "model.decoder_width 100 is not a multiple of --model.heads 3"),
        ("model: {decoder_width: 0}", "must be at least 1"),
        ("loss: {ctc_weight: 0.0, ctc_warmup: 0.1}", "ctc-warmup"),
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
    assert changes(dataclasses.replace(config, workers=4, threads=1), config) == []
    assert changes(dataclasses.replace(config, seed=2), config) == [("seed", 0, 2)]
    assert changes(dataclasses.replace(config, model=ModelShape(width=32)), config) == [("model.width", 144, 32)]


@pytest.mark.parametrize("url", ["s3://bucket/train.jsonl", "/here/https:/host/m.jsonl::/here/https:/host/a.tar"])
def test_a_url_is_for_a_mixture(url):
    with pytest.raises(ConfigError, match=r"is a URL; name it in a mixture's YAML"):
        rooted(TrainConfig(manifest=(Path(url),)))
    with pytest.raises(ConfigError, match="is a URL; copy it"):
        rooted(TrainConfig(valid=(Path(url),)))
    kept = (Path("/here/a:b/train.jsonl"),)
    assert rooted(TrainConfig(manifest=kept)).manifest == kept


OLD = """
vocabulary: 300
lang_column: tongue
window: 1000
largest_first: false
keep: 5
skip_limit: 0.5
bad_steps: 3
short_first: false
loss: {ctc_weight: 0.3, ctc_alone: 0.1}
optimizer: {matrix_every: 2}
"""


def test_a_run_of_canter_0_1_keeps_its_settings_under_their_new_names(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(OLD)
    assert load_run_config(path) == TrainConfig(
        vocab_size=300,
        language_column="tongue",
        batching_window=1000,
        check_memory=False,
        keep_checkpoints=5,
        max_skipped=0.5,
        max_bad_steps=3,
        loss=LossConfig(0.3, 0.1),
    )


@pytest.mark.parametrize("line", ["short_first: true", "optimizer: {matrix_every: 1}"])
def test_a_removed_setting_at_another_value_is_refused(tmp_path, line):
    path = tmp_path / "config.yaml"
    path.write_text(line)
    with pytest.raises(ConfigError, match=rf"'{line.split(':')[0]}[^ ]*' is .* no longer supports"):
        load_run_config(path)


@pytest.mark.parametrize("old", [*RENAMED, *REMOVED])
def test_old_names_in_a_user_s_file_are_refused_with_the_new_ones(tmp_path, old):
    path = tmp_path / "c.yaml"
    path.write_text(f"{old}: 1" if "." not in old else f"{old.replace('.', ': {')}: 1}}")
    way = f"renamed to '{RENAMED[old]}'" if old in RENAMED else "removed"
    with pytest.raises(ConfigError, match=rf"'{old}' was {way}"):
        load_config(path)
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert old not in names
    assert RENAMED.get(old, "steps").partition(".")[0] in names
