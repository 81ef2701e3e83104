"""Limits on what a folder may ask of transformers: numbers have ranges, and a model has the size of its weights."""

import json
import os
import shutil

import pytest
import torch

from canter.errors import CheckpointError

from .small_transformers import make, word_tokenizer

from canter.integrations.transformers_files import check_folder, load_parts  # isort: skip

FAMILIES = ("speech_to_text", "moonshine", "seamless")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        torch.manual_seed(0)
        model, extractor = make(family)
        for part in (model, extractor, word_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>")):
            part.save_pretrained(root / family)
    return root


@pytest.fixture
def folder(folders, tmp_path):
    return lambda family: shutil.copytree(folders / family, tmp_path / family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_every_number_is_refused_or_harmless(folder, family, file, within_200_mib):
    """Nothing is allocated and nothing runs for long, whichever number of a file is huge."""
    path = folder(family)
    sound = json.loads((path / file).read_text())
    refused = 0
    for name, value in sound.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        (path / file).write_text(json.dumps(sound | {name: 10**9}))
        try:
            check_folder(path)
        except CheckpointError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"hidden_size": 1000, "intermediate_size": 100_000}, "parameters, but its weights have only"),
        ("config.json", {"hidden_size": "x"}, "transformers cannot load it"),
        ("config.json", {"encoder_num_hidden_layers": 10**6}, "must be from 0 to 256"),
        ("config.json", {"encoder_num_attention_heads": 0}, "must be from 1 to 512"),
        ("config.json", {"vocab_size": -(10**6)}, "must be from 0"),
        ("config.json", {"a": {"b": [{"hidden_size": 10**400}]}}, "hidden_size is 1000"),
        ("config.json", {"dtype": "Tensor"}, ""),
        ("preprocessor_config.json", {"sampling_rate": 1}, "must be from 1,000 to 192,000"),
        ("preprocessor_config.json", {"sampling_rate": None}, ""),
        ("generation_config.json", {"eos_token_id": 10**9}, "below the model's vocabulary of 60"),
        ("generation_config.json", {"max_length": 10**12}, "must be a number from 0 to 1,000,000"),
        ("generation_config.json", {"suppress_tokens": [1] * 200_000}, "at most 100,000"),
        ("tokenizer_config.json", {"model_max_length": [1]}, ""),
        ("tokenizer_config.json", {"eos_token": 5}, ""),
        ("special_tokens_map.json", {"eos_token": [1]}, ""),
    ],
)  # fmt: skip
def test_settings_that_lie(folder, file, changes, message):
    """An empty message: loaded or refused, by an error of ours."""
    path = folder("moonshine")
    values = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).write_text(json.dumps(values | changes))
    if not message:
        try:
            load_parts(path)
        except CheckpointError as error:
            message = str(error)
        return
    with pytest.raises(CheckpointError, match=message):
        load_parts(path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "config.json"])
def test_files_that_never_end_or_never_answer(folder, name):
    path = folder("moonshine")
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_parts(path)
    (path / name).unlink()
    (path / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_parts(path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "pytorch_model.bin"])
def test_indexes_that_lead_elsewhere(folder, name):
    path = folder("moonshine")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="refused"):
        load_parts(path)
