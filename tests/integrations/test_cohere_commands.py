"""Cohere Transcribe through the commands, from a folder that transformers saved."""

import json

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import canter
from canter.cli.main import main
from canter.corpus.manifest import write_manifest

from ..small_cohere import save_cohere, transformers

SECONDS = (1.3, 2.0, 0.6, 1.1, 0.9, 1.7)
TRAINING = (
    "--loss.ctc-weight", "0", "--loss.ctc-warmup", "0", "--optimizer.name", "adamw", "--valid-utterances", "2",
    "--valid-every", "2", "--workers", "0", "--threads", "1", "--precision", "float32", "--device", "cpu",
    "--augment.speed", "0.9", "1.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def cohere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "cohere"
    save_cohere(folder, encoder_width=48, num_hidden_layers=3)
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A manifest of six clips."""
    folder, random = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    rows = []
    for number, seconds in enumerate(SECONDS):
        soundfile.write(folder / f"{number}.wav", 0.1 * random.standard_normal(round(16000 * seconds)), 16000)
        lang = "de" if number % 2 else "en"
        rows.append({"audio_filepath": f"{number}.wav", "duration": seconds, "text": "the doctor opened", "lang": lang})
    write_manifest(folder / "train.jsonl", rows)
    return folder


def test_shape_conversion_and_reshaping(cohere, tmp_path, capsys):
    assert main(["info", cohere]) == 0
    shown = capsys.readouterr().out
    assert "fastconformer, 2 layers, width 48" in shown
    assert "ar, de, en, fr, ja" in shown
    assert main(["convert", cohere, str(tmp_path / "ours")]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--format", "huggingface"]) == 0
    expected, found = load_file(f"{cohere}/model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(x, found[name]) for name, x in expected.items())
    arguments = ["reshape", cohere, "-o", str(tmp_path / "shallow"), "--decoder-layers", "1", "--match", "parameters"]
    assert main(arguments) == 0
    config = canter.load_model(tmp_path / "shallow").config
    assert (config.encoder.layers, config.decoder.layers) == (3, 1)
    shallow = str(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "shallow"), shallow, "--format", "huggingface"]) == 0
    assert transformers.CohereAsrForConditionalGeneration.from_pretrained(shallow).config.num_hidden_layers == 1


def test_tuned_trained_resumed_and_transcribed(cohere, corpus, tmp_path, capsys):
    data, run = str(corpus / "train.jsonl"), tmp_path / "run"
    assert main(["index", data, "-o", str(tmp_path / "lengths.arrow"), "--tokenizer", cohere]) == 0
    budget = str(tmp_path / "budget.json")
    assert main(["tune", cohere, "--index", str(tmp_path / "lengths.arrow"), "-o", budget, "--memory", "1GiB",
                 "--device", "cpu", "--probes", "12", "--minutes", "0.05", "--threads", "1"]) == 0  # fmt: skip
    train = ["train", "--manifest", data, "--valid", data, "--init", cohere, "--output", str(run), "--steps", "4",
             "--batch-seconds", "3", "--budget", budget, *TRAINING]  # fmt: skip
    assert main(train) == 0
    newest = run / "checkpoints" / "step-000004"
    assert canter.load_model(newest).tokenizer.prompt_format == "cohere"
    capsys.readouterr()
    output = tmp_path / "out.jsonl"
    assert main(["transcribe", str(run), data, "--output", str(output), "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    model = canter.load(run)
    for row, number in zip(rows, range(6), strict=True):
        result = model.transcribe(corpus / f"{number}.wav", language=row["lang"])
        assert row["pred_text"] == result.text
    assert main(["score", str(output)]) == 0
    assert "WER" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_measured_beside_transformers(cohere, corpus, tmp_path):
    output = tmp_path / "bench.json"
    arguments = ["bench", cohere, "--audio", str(corpus / "train.jsonl"), "--against", "transformers", "--repeats", "1"]
    assert main([*arguments, "--latency-utterances", "1", "--device", "cpu", "-o", str(output)]) == 0
    systems = json.loads(output.read_text())["systems"]
    assert systems["transformers float32"]["rtfx"] > 0
    assert systems["transformers float32"]["tokens"] > 0


def test_long_audio_and_word_times(cohere, tmp_path):
    random = np.random.default_rng(1)
    parts = [np.concatenate([0.1 * random.standard_normal(16000 * 24), np.zeros(16000)]) for _ in range(3)]
    soundfile.write(tmp_path / "long.wav", np.concatenate(parts), 16000)
    result = canter.load(cohere).transcribe(tmp_path / "long.wav", language="en", timestamps="word")
    assert len(result.segments) == 3
    assert max(segment.end - segment.start for segment in result.segments) <= 35.0  # Cohere's window
    words = [word for segment in result.segments for word in segment.words]
    assert all(0 <= word.start <= word.end <= 75 for word in words)
    assert " ".join(word.text for word in words).split() == result.text.split()
