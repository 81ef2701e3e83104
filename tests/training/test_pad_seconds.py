"""Whisper fine-tuned at its utterances' own lengths."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from canter.corpus.manifest import write_manifest
from canter.errors import ConfigError
from canter.loading import load_model
from canter.models.formats.checkpoint import save_model
from canter.models.model import ModelConfig, SpeechModel
from canter.planning.budget import Budget
from canter.text import train_tokenizer
from canter.training.config import LossConfig, ModelShape, OptimizerConfig, TrainConfig
from canter.training.recipe import run_training

from .conftest import Reports

SHARED = os.environ.get("CANTER_SHARED")
needs_model = pytest.mark.skipif(not SHARED, reason="CANTER_SHARED names no folder with whisper-tiny.en")


@pytest.fixture
def whisper(config, tmp_path):
    """A run of two steps on four short clips."""
    clips = Path(SHARED or "") / "data/speech/an4"
    rows = [json.loads(line) for line in (clips / "manifest.jsonl").read_text().splitlines()[:4]]
    write_manifest(
        tmp_path / "clips.jsonl", [row | {"audio_filepath": str(clips / row["audio_filepath"])} for row in rows]
    )
    return dataclasses.replace(
        config,
        manifest=(tmp_path / "clips.jsonl",),
        valid=(),
        init=Path(SHARED or "") / "models/whisper-tiny.en",
        model=ModelShape(),
        vocab_size=TrainConfig.vocab_size,
        loss=LossConfig(ctc_weight=0.0, ctc_warmup=0.0, label_smoothing=0.0),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-5),
        steps=2,
        batch_seconds=None,
        valid_every=100,
    )


@needs_model
def test_at_their_own_lengths(whisper):
    reports = []

    # 20 ms a frame: the plan sees the utterances as long as they are
    Budget.from_batch_seconds(2.0, frame_seconds=0.02).save(whisper.budget)
    finished = run_training(dataclasses.replace(whisper, pad_seconds=0.0), Reports(reports.append))
    assert all(0 < report.frames_max < 150 for report in reports)
    assert all(0 < report.loss < 9 for report in reports)
    assert finished.prepared.schedule.plan.budgets[0][1].frame_seconds == 0.02
    saved = load_model(next((whisper.output / "checkpoints").glob("step-*")))
    assert saved.config.features.pad_seconds == 0.0


@needs_model
def test_what_the_model_pads_to_is_padding(whisper):
    finished = run_training(dataclasses.replace(whisper, steps=1))
    row = json.loads((whisper.output / "metrics.jsonl").read_text().splitlines()[0])
    assert row["padding"] == pytest.approx(1 - row["audio_seconds"] / (30 * row["utterances"]))
    assert finished.progress.utterances == row["utterances"]


@needs_model
def test_more_than_the_model_takes(whisper):
    with pytest.raises(ConfigError, match="takes 30 s at most"):
        run_training(dataclasses.replace(whisper, pad_seconds=31.0), Reports(lambda _: pytest.fail("it trains")))


def test_models_that_do_not_pad(config, tmp_path):
    with pytest.raises(ConfigError, match="needs --init"):
        dataclasses.replace(config, pad_seconds=0.0)
    model = SpeechModel(ModelConfig())
    model.tokenizer = train_tokenizer(["a b c"] * 10, ["en"], 19, tmp_path / "tokenizer")
    save_model(model, tmp_path / "canary")
    tuned = dataclasses.replace(config, init=tmp_path / "canary", pad_seconds=0.0, model=ModelShape())
    with pytest.raises(ConfigError, match="is no Whisper or OWSM"):
        run_training(dataclasses.replace(tuned, loss=LossConfig()), Reports(lambda _: pytest.fail("it trains")))
