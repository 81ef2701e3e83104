"""`canter bench` on a small model: a table, a file with everything, errors in one line."""

import json

import numpy as np
import pytest
import soundfile

from canter.cli.main import main
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.checkpoint import save_model
from canter.models.model import ModelConfig, SpeechModel
from canter.text import train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    tokenizer = train_tokenizer(["one two three four five"] * 20, languages=["en", "de"], vocab_size=40)
    config = ModelConfig(
        features=FeatureConfig(mels=16),
        encoder=FastConformerConfig(layers=1, width=16, heads=2, feedforward=32, subsampling_channels=4, mels=16),
        decoder=DecoderConfig(layers=1, width=16, heads=2, feedforward=32, vocabulary=40, positions=16),
    )
    return str(save_model(SpeechModel(config), tmp_path_factory.mktemp("model") / "m", tokenizer))


def test_figures_of_a_folder_with_a_bad_file(model, tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).normal(size=8000 + 4000 * number) * 0.1
        soundfile.write(tmp_path / "clips" / f"{number}.wav", noise, 16000)
    (tmp_path / "clips" / "bad.wav").write_text("no audio")
    out = tmp_path / "new" / "bench.json"
    arguments = ["bench", model, "--audio", str(tmp_path / "clips"), "--repeats", "2"]
    assert main([*arguments, "--latency-utterances", "2", "-o", str(out)]) == 0
    captured = capsys.readouterr()
    assert "canter float32" in captured.out
    assert "rows useful" in captured.out
    assert "left out: " in captured.err
    value = json.loads(out.read_text())
    assert (value["clips"], value["left_out"], value["repeats"]) == (4, 1, 2)
    assert value["audio_seconds"] == pytest.approx(3.5)
    speed = value["systems"]["canter float32"]
    assert len(speed["seconds"]) == 2
    assert speed["rtfx"] == pytest.approx(3.5 / np.median(speed["seconds"]))
    assert sum(speed["details"]["shares"].values()) == pytest.approx(1)
    assert set(speed["latency_seconds"]) == {"p50", "p90", "p95", "p99"}
    assert value["machine"]["threads"] >= 1


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_noise_without_audio(model, capsys, precision):
    arguments = ["--utterances", "2", "--repeats", "1", "--latency-utterances", "1", "--precision", precision]
    assert main(["bench", model, *arguments]) == 0
    assert "2 utterances" in (out := capsys.readouterr().out)
    assert precision in out


def test_precisions_and_beams_side_by_side(model, tmp_path, capsys):
    arguments = [
        "--utterances",
        "2",
        "--repeats",
        "1",
        "--latency-utterances",
        "1",
        "--json",
        "-o",
        str(tmp_path / "x"),
    ]
    assert main(["bench", model, *arguments, "--against", "canter:int8", "--beam-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads((tmp_path / "x").read_text())
    systems = json.loads(printed)["systems"]
    assert list(systems) == ["canter float32", "canter float32, 2 beams", "canter int8"]
    assert all(speed["rtfx"] > 0 for speed in systems.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "nothing"], "--against nothing: there are"),
        (["--repeats", "0"], "--repeats 0: at least 1"),
        (["--audio", "absent"], "absent does not exist"),
        (["--device", "cuda"], "no GPU is available"),
        (["--against", "ctranslate2", "--utterances", "1"], "ctranslate2"),
    ],
)
def test_misuse_is_one_line(model, capsys, arguments, message):
    assert main(["bench", model, *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
