"""SeamlessM4T v2 through every command, on a small random model as released: complete, and on clips of noise."""

import json

import numpy as np
import pytest
import soundfile
import torch

from canter.cli.main import main
from canter.corpus.manifest import write_manifest
from canter.loading import load_module
from canter.models.w2v_bert import W2vBertConfig
from canter.planning.budget import Budget

from ..models.formats.small_seamless import save_theirs, small_theirs, small_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_theirs(small_theirs(complete=True), tmp_path_factory.mktemp("seamless") / "model", small_tokenizer())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return a manifest of eight clips, the last ones to be translated, and a budget beside it."""
    folder, rows = tmp_path_factory.mktemp("corpus"), []
    for number in range(8):
        noise = np.random.default_rng(number).normal(size=9000 + 2000 * number)
        soundfile.write(folder / f"{number}.wav", 0.1 * noise, 16000)
        row = {"audio_filepath": f"{number}.wav", "duration": (9000 + 2000 * number) / 16000, "source_lang": "en"}
        target = "en" if number < 6 else "de"
        rows.append({**row, "target_lang": target, "text": "yes no" if target == "en" else "das ist ein Test"})
    write_manifest(folder / "train.jsonl", rows)
    Budget.from_batch_seconds(60.0).save(folder / "budget.json")
    return folder / "train.jsonl"


def test_it_is_described_converted_and_reshaped(model, tmp_path, capsys):
    assert main(["info", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "encoder: w2v_bert, 2 layers, width 32, heads 4" in shown
    assert "207 ids, arb, cmn, cmn_Hant, deu, eng, fra" in shown
    assert main(["convert", str(model), str(tmp_path / "ours")]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--format", "huggingface"]) == 0
    ours, again = load_module(model), load_module(tmp_path / "theirs")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())
    assert main(["convert", str(model), str(tmp_path / "x.nemo")]) == 1
    layers = ["--decoder-layers", "1", "--encoder-layers", "3"]
    assert main(["reshape", str(model), "-o", str(tmp_path / "small"), *layers]) == 0
    shaped = load_module(tmp_path / "small")
    assert isinstance(shaped.config.encoder, W2vBertConfig)
    audio = torch.randn(1, 16000) / 10
    with torch.no_grad():  # new layers change nothing at first
        states = [one.encode(*one.features(audio, torch.tensor([16000])))[0] for one in (ours, shaped)]
    assert (states[0] - states[1]).abs().max() < 1e-3


def test_it_is_trained_scored_and_measured(model, corpus, tmp_path, capsys):
    common = ["--manifest", str(corpus), "--valid", str(corpus), "--init", str(model), "--budget",
              str(corpus.with_name("budget.json")), "--batch-seconds", "3", "--steps", "4", "--valid-every", "2",
              "--valid-utterances", "4", "--workers", "0", "--threads", "1", "--precision", "float32",
              "--optimizer.learning-rate", "1e-3"]  # fmt: skip
    assert main(["train", *common, "--output", str(tmp_path / "run")]) == 0
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert main(["transcribe", str(tmp_path / "run"), str(corpus), "--output", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all("pred_text" in row for row in rows)
    assert main(["score", str(tmp_path / "out.jsonl")]) == 0
    assert main(["bench", str(model), "--audio", str(corpus), "--against", "transformers", "--utterances", "2",
                 "--repeats", "1", "--latency-utterances", "1", "--json"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    systems = json.loads(printed[printed.rindex('{\n  "model"') :])["systems"]
    assert list(systems) == ["canter float32", "transformers float32"]


def test_languages_are_stated(model, corpus, tmp_path, capsys):
    clip = str(corpus.with_name("0.wav"))
    assert main(["transcribe", str(model), clip]) == 1
    error = capsys.readouterr().err
    assert "0.wav names no language, and the model knows arb, cmn, cmn_Hant, deu, eng, fra: give 'lang'" in error
    assert main(["transcribe", str(model), clip, "--language", "ja"]) == 1
    assert "'ja' (Japanese) is not a language of this model; it knows arb" in capsys.readouterr().err
    for arguments in (["--language", "en"], ["--task", "translate", "--target-language", "zh-Hant"]):
        assert main(["transcribe", str(model), clip, *arguments]) == 0


def test_the_service_needs_what_the_prompt_needs(model):
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    from canter.serving.config import ServiceConfig
    from canter.serving.model import ModelSource, ServedModel
    from canter.serving.protocol import ApiError, AudioRequest

    source = ModelSource(("seamless",), model)
    served = ServedModel(source, source.load(), ServiceConfig())
    tokenizer = served.tokenizer
    try:
        assert served.targets == tokenizer.languages
        for fields, written in (
            (AudioRequest("transcribe", "deu"), "deu"),
            (AudioRequest("translate"), "eng"),
            (AudioRequest("translate", to_language="cmn_Hant"), "cmn_Hant"),
            (AudioRequest("translate", "eng", "fra"), "fra"),
        ):
            assert served.request(served.completed(fields)).prompt == [tokenizer.end, tokenizer.language_ids[written]]
        with pytest.raises(ApiError, match="needs the language of the audio"):
            served.request(AudioRequest("transcribe"))
    finally:
        served.close()
