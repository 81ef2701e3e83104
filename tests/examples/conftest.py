import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from canter.corpus.manifest import write_manifest
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig, WhisperFeatureConfig
from canter.models.formats.checkpoint import save_model
from canter.models.model import ModelConfig, SpeechModel
from canter.models.whisper import WhisperEncoderConfig
from canter.text import train_tokenizer


@pytest.fixture
def manifest(tmp_path):
    """Thirty clips of noise."""
    random, rows = np.random.default_rng(0), []
    for number in range(30):
        seconds = random.uniform(2, 9)
        soundfile.write(tmp_path / f"{number}.wav", random.normal(size=int(16000 * seconds)) * 0.1, 16000)
        text = "aia ia" if number % 2 else "bpb pb"
        rows.append({"audio_filepath": f"{number}.wav", "duration": seconds, "text": text, "lang": "en"})
    write_manifest(tmp_path / "train.jsonl", rows)
    return tmp_path / "train.jsonl"


@pytest.fixture
def run(monkeypatch, capsys):
    """``run(name, *arguments)``: what a script of examples/ prints."""

    def run(name, *arguments):
        script = str(Path(__file__).parents[2] / "examples" / name)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def tokenizer(tmp_path):
    texts = [f"{a}{b}{a} {b}{a}" for a in "abcdefgh" for b in "ijklmnop"]
    return train_tokenizer(texts, ["en"], 60, tmp_path / "tokenizer")


@pytest.fixture
def whisper(tokenizer, tmp_path):
    """The folder of a small Whisper."""
    torch.manual_seed(0)
    decoder = DecoderConfig(1, 16, 2, 32, tokenizer.vocab_size, 50)
    encoder = WhisperEncoderConfig(1, 16, 2, 32, 20)
    model = SpeechModel(ModelConfig(WhisperFeatureConfig(mels=20), encoder, decoder))
    model.tokenizer = tokenizer
    return save_model(model, tmp_path / "whisper")


@pytest.fixture
def canary(tokenizer, tmp_path):
    """The folder of a small model with BatchNorm."""
    torch.manual_seed(0)
    encoder = FastConformerConfig(layers=1, width=16, heads=2, feedforward=32, subsampling_channels=4, mels=20)
    decoder = DecoderConfig(1, 16, 2, 32, tokenizer.vocab_size, 50)
    model = SpeechModel(ModelConfig(FeatureConfig(mels=20), encoder, decoder))
    model.tokenizer = tokenizer
    return save_model(model, tmp_path / "canary")
