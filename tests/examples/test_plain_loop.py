import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from canter.corpus.manifest import write_manifest
from canter.models.checkpoint import save_model
from canter.models.decoder import DecoderConfig
from canter.models.features import WhisperFeatureConfig
from canter.models.model import ModelConfig, SpeechModel
from canter.models.whisper import WhisperEncoderConfig
from canter.text import train_tokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "plain_loop.py"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return re.findall(r"step (\d+): \d+ utterances, loss ([\d.]+)", capsys.readouterr().out)

    return run


@pytest.fixture
def start(tmp_path):
    """The folder of a small Whisper."""
    texts = [f"{a}{b}{a} {b}{a}" for a in "abcdefgh" for b in "ijklmnop"]
    tokenizer = train_tokenizer(texts, ["en"], 60, tmp_path / "tokenizer")
    torch.manual_seed(0)
    decoder = DecoderConfig(1, 16, 2, 32, tokenizer.vocab_size, 50)
    model = SpeechModel(
        ModelConfig(WhisperFeatureConfig(mels=20), WhisperEncoderConfig(1, 16, 2, 32, 20), decoder)
    )
    model.tokenizer = tokenizer
    return save_model(model, tmp_path / "start")


@pytest.fixture
def manifest(tmp_path):
    random, rows = np.random.default_rng(0), []
    for number in range(30):
        seconds = random.uniform(2, 9)
        soundfile.write(tmp_path / f"{number}.wav", random.normal(size=int(16000 * seconds)) * 0.1, 16000)
        text = "aia ia" if number % 2 else "bpb pb"
        rows.append({"audio_filepath": f"{number}.wav", "duration": seconds, "text": text, "lang": "en"})
    write_manifest(tmp_path / "train.jsonl", rows)
    return tmp_path / "train.jsonl"


def test_goes_on_where_it_stopped(run, start, manifest, tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = run(start, manifest, tmp_path / "whole", 12)
    cut = run(start, manifest, tmp_path / "cut", 5)
    cut += run(start, manifest, tmp_path / "cut", 12)
    assert [step for step, _ in whole] == [str(n) for n in range(1, 13)]  # into the second epoch
    assert cut == whole
    assert float(whole[-1][1]) < float(whole[0][1])
