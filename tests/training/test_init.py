"""A run that starts from a checkpoint: its weights, shape and tokenizer."""

import dataclasses
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from canter.cli import reshape
from canter.errors import CheckpointError, ConfigError
from canter.loading import load_model
from canter.models.formats.checkpoint import save_model
from canter.text import Characters, load_tokenizer, train_tokenizer
from canter.text.spelling import Vocabulary
from canter.training.config import LoraConfig, LossConfig, ModelShape, TrainConfig
from canter.training.recipe import prepare_training, run_training

from .conftest import Messages

HEAD_BIAS = "decoder.head_bias"


@pytest.fixture
def trained(config):
    """The folder of a finished run."""
    config = dataclasses.replace(config, steps=4)
    run_training(config)
    return config.output


@pytest.fixture
def onwards(config, trained, tmp_path):
    """A run of four steps from there."""
    return dataclasses.replace(
        config,
        init=trained,
        output=tmp_path / "onwards",
        steps=4,
        model=ModelShape(),
        vocab_size=TrainConfig.vocab_size,
        loss=LossConfig(ctc_weight=0.3),
    )


def test_a_run_starts_with_weights_shape_and_tokenizer_of_the_checkpoint(onwards, trained):
    prepared = prepare_training(onwards)
    before = load_model(next((trained / "checkpoints").glob("step-*")))
    assert prepared.subject.model.config == before.config
    ours, theirs = prepared.subject.model.state_dict(), before.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert prepared.data.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert prepared.data.characters.fingerprint == Characters.load(trained / "tokenizer").fingerprint
    assert prepared.schedule.budget.measured_on["model"]


def test_it_trains_on_and_resumes_without_the_checkpoint_it_came_from(onwards, trained):
    finished = run_training(onwards)
    assert finished.progress.step == 4
    newest = sorted((onwards.output / "checkpoints").glob("step-*"))[-1]
    ours = load_file(newest / "model.safetensors")
    theirs = load_file(next((trained / "checkpoints").glob("step-*")) / "model.safetensors")
    assert any(not torch.equal(x, theirs[name]) for name, x in ours.items())
    shutil.rmtree(trained)
    again = run_training(onwards)
    assert again.progress.step == 4


def test_a_reshaped_checkpoint(onwards, trained, tmp_path):
    """The alphabet of its CTC head goes along."""
    reshape.run(reshape.Options(trained, tmp_path / "reshaped", encoder_layers=3, seconds=0.5, batch_size=1, json=True))
    finished = run_training(dataclasses.replace(onwards, init=tmp_path / "reshaped", steps=1))
    assert finished.prepared.subject.model.config.encoder.layers == 3
    Characters("abc").save(tmp_path / "reshaped")
    config = dataclasses.replace(onwards, init=tmp_path / "reshaped", output=tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"has 3 characters, but .* a CTC head of \d+ outputs"):
        prepare_training(config)


def test_without_ctc_the_head_is_left_out(onwards):
    prepared = prepare_training(dataclasses.replace(onwards, loss=LossConfig()))
    assert prepared.subject.model.ctc is None
    assert prepared.subject.model.config.ctc_vocabulary == 0


def test_a_checkpoint_without_a_ctc_head_wants_its_weight_at_zero(onwards, trained, tmp_path):
    model = load_model(next((trained / "checkpoints").glob("step-*")))
    model.ctc, model.config = None, dataclasses.replace(model.config, ctc_vocabulary=0)
    save_model(model, tmp_path / "attention")
    config = dataclasses.replace(onwards, init=tmp_path / "attention")
    with pytest.raises(ConfigError, match=r"no CTC head; leave --loss.ctc-weight out"):
        prepare_training(config)
    config = dataclasses.replace(config, loss=LossConfig())
    assert run_training(config).progress.step == 4


def test_a_checkpoint_without_a_tokenizer_is_refused(onwards, trained, tmp_path):
    model = load_model(next((trained / "checkpoints").glob("step-*")))
    model.tokenizer = None
    save_model(model, tmp_path / "mute")
    with pytest.raises(ConfigError, match="no tokenizer"):
        prepare_training(dataclasses.replace(onwards, init=tmp_path / "mute"))


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"model": ModelShape(width=32, heads=2)}, "--model.width, --model.heads cannot go with --init"),
        ({"tokenizer": "x", "lora": LoraConfig(rank=4)}, "--lora.rank 4 cannot go with --tokenizer"),
    ],
)
def test_what_the_checkpoint_decides_cannot_be_set(tmp_path, settings, flag):
    with pytest.raises(ConfigError, match=flag):
        TrainConfig(init=tmp_path, **settings)


def test_another_tokenizer_keeps_the_rows_that_both_have_and_says_so(onwards, trained, tmp_path):
    """The alphabet of the CTC head does not depend on it, and a run resumes without the tokenizer's folder."""
    old = load_model(next((trained / "checkpoints").glob("step-*")))
    train_tokenizer(["un autre texte, et des mots", "the same letters"] * 3, ["en", "es", "fr"], 60, tmp_path / "other")
    config = dataclasses.replace(onwards, tokenizer=tmp_path / "other")
    said: list[str] = []
    model = prepare_training(config, Messages(said)).subject.model
    new = load_tokenizer(tmp_path / "other")
    assert model.tokenizer.fingerprint == new.fingerprint
    assert model.vocabulary == new.vocab_size
    rows, before = model.decoder.embedding.weight, old.decoder.embedding.weight
    ours, theirs = Vocabulary(new).ids, Vocabulary(old.tokenizer).ids
    same = [(theirs[spelling], ours[spelling]) for spelling in ours.keys() & theirs.keys()]
    assert len(same) > 10
    assert all(torch.equal(before[n], rows[number]) for n, number in same)
    others = {name: x for name, x in old.state_dict().items() if name not in ("decoder.embedding.weight", HEAD_BIAS)}
    assert all(torch.equal(model.state_dict()[name], x) for name, x in others.items())
    (line,) = [line for line in said if "--tokenizer" in line]
    assert re.search(rf"{new.vocab_size} tokens: \d+ keep the rows of the model, \d+ are new, each the mean of", line)
    assert run_training(config).progress.step == 4
    shutil.rmtree(tmp_path / "other")
    assert run_training(dataclasses.replace(config, steps=5, allow_changes=True)).progress.step == 5
    with pytest.raises(ConfigError, match="would make its weights useless"):
        run_training(dataclasses.replace(config, tokenizer=None, allow_changes=True))
