"""Model cards: what they say, what they must not say, and that the hub's library reads them."""

import dataclasses
import re
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard

from canter.cli import convert
from canter.cli.train import parse
from canter.errors import ConfigError
from canter.training.config import AugmentConfig, LoraConfig, OptimizerConfig, TrainConfig
from canter.training.defaults import decided
from canter.training.recipe import run_training
from canter.training.run.card import TrainedOn, bare_name, command_of, model_card, with_library

TRAINED = TrainedOn(1200, 36_000.0, 7_200.0, 900, ("en", "English", "deu"), 1_234_567)
METRICS = {"wer": 0.1234, "cer": 0.045, "utterances": 87, "set": "x"}
CONFIG = TrainConfig(
    manifest=("/home/someone/data/train.jsonl", "/home/someone/more.jsonl::/home/someone/a.tar"),
    valid=("/home/someone/data/valid.jsonl",),
    output="/home/someone/runs/my model",
    init="openai/whisper-tiny.en@main",
    upload="s3://user:secret@bucket/run",
    optimizer=OptimizerConfig(learning_rate=1e-4),
    augment=AugmentConfig(speed=(0.9, 1.0), noise=("/home/someone/noise",), noise_probability=0.25),
    max_tokens_per_second="10:30 20:25",
    compile=True,
    mix_steps=False,
)


def test_the_hubs_library_reads_the_card():
    card = ModelCard(model_card(dataclasses.replace(CONFIG, license="cc-by-4.0"), TRAINED, METRICS))
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "canter"
    assert card.data.language == ["de", "en"]
    assert card.data.base_model == "openai/whisper-tiny.en"
    assert card.data.pipeline_tag == "automatic-speech-recognition"
    results = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert results == {"wer": 12.34, "cer": 4.5}
    assert card.data.eval_results[0].dataset_name == "valid.jsonl (87 utterances)"
    for text in (
        "12.34%",
        "87 validation utterances of valid.jsonl",
        "| updates | 1,200 |",
        "| 10.00 h |",
        "2.00 h in 900",
        "1,234,567",
        "canter.load(",
        "fine-tuned from openai/whisper-tiny.en@main",
        "German, English",
        "Canter 0.",
    ):
        assert text in card.text, text


def test_without_a_licence_the_card_says_how_to_state_one():
    text = model_card(dataclasses.replace(CONFIG, init=None), TRAINED, None)
    assert "license: other  # not stated; 'canter train --license NAME'" in text
    assert ModelCard(text).data.license == "other"
    assert ModelCard(text).data.get("base_model") is None
    assert "Not stated; 'canter train --license NAME'" in text
    assert "The run had no validation data." in text
    assert "trained from scratch" in text
    with pytest.raises(ConfigError, match="is not the name of a licence"):
        dataclasses.replace(CONFIG, license="All rights reserved")


def test_neither_folders_nor_secrets_are_in_the_card():
    text = model_card(CONFIG, TRAINED, METRICS)
    for hidden in ("/home", "someone", "secret", "s3:", "bucket"):
        assert hidden not in text
    assert bare_name("https://user:pw@host/data/x.tar?sig=abc") == "x.tar"
    assert bare_name("/a/b::/c/d.tar") == "b::d.tar"
    assert bare_name("openai/whisper-tiny") == "openai/whisper-tiny"


def test_the_command_is_the_configuration():
    """Read back, it gives the settings again, but for folders and those of a file."""
    command, file = command_of(decided(CONFIG))
    words = shlex.split(command)
    assert words[:2] == ["canter", "train"]
    again = parse(words[2:])
    plain = dataclasses.replace(
        decided(CONFIG),
        manifest=("train.jsonl", "more.jsonl::a.tar"),
        valid=("valid.jsonl",),
        output="my model",
        upload=None,
        augment=AugmentConfig(speed=(0.9, 1.0), noise=("noise",)),
    )
    assert again == plain
    assert yaml.safe_load(file) == {"augment": {"noise_probability": 0.25}}
    assert command_of(TrainConfig(manifest="a.jsonl")) == ("canter train --manifest a.jsonl", "")


def test_another_library():
    card = with_library(model_card(CONFIG, TRAINED, METRICS), "transformers")
    assert ModelCard(card).data.library_name == "transformers"
    assert card.count("library_name") == 1
    assert with_library("no front matter\nlibrary_name: x\n", "transformers") == "no front matter\nlibrary_name: x\n"


def test_a_run_writes_the_card_beside_its_best_checkpoint_and_conversion_copies_it(config, tmp_path):
    config = dataclasses.replace(config, steps=4, valid_every=2, license="mit")
    run_training(config)
    cards = list((config.output / "checkpoints").rglob("README.md"))
    best = yaml.safe_load((config.output / "checkpoints" / "best.json").read_text())["checkpoint"]
    assert [card.parent.name for card in cards if card.parent.name == best] == [best]
    text = (config.output / "checkpoints" / best / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert card.data.eval_results
    assert str(tmp_path) not in text
    assert str(config.manifest[0].parent) not in text
    assert re.search(rf"\| updates \| {int(best[5:])} \|", text)
    convert.run(convert.Options(config.output, tmp_path / "converted"))
    assert (tmp_path / "converted" / "README.md").read_text() == text
    assert run_training(dataclasses.replace(config, steps=5, allow_changes=True)).progress.step == 5


def test_a_run_without_validation_writes_it_beside_its_last_checkpoint(config):
    config = dataclasses.replace(config, steps=3, valid=(), lora=LoraConfig())
    run_training(config)
    (card,) = (config.output / "checkpoints").rglob("README.md")
    assert card.parent.name == "step-000003"
    assert "| updates | 3 |" in card.read_text()
