"""`canter align` as a user meets it: a file and a text, a manifest, and what can be wrong with either."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from canter.cli.align import given_text
from canter.cli.main import main
from canter.errors import ConfigError
from canter.loading import load_model
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.checkpoint import save_model
from canter.models.model import ModelConfig, SpeechModel
from canter.text import Characters, train_tokenizer

from ..models.formats.small_seamless import save_theirs, small_theirs, small_tokenizer

TEXT = "One two. Three four five"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a small random Canary that has a CTC head on characters."""
    tokenizer = train_tokenizer([TEXT, TEXT.lower()] * 20, languages=["en", "de"], vocab_size=50)
    config = ModelConfig(
        features=FeatureConfig(mels=16),
        encoder=FastConformerConfig(layers=1, width=16, heads=2, feedforward=32, subsampling_channels=4, mels=16),
        decoder=DecoderConfig(
            layers=1, width=16, heads=2, feedforward=32, vocabulary=tokenizer.vocab_size, positions=64
        ),
        ctc_vocabulary=29,
    )
    made = SpeechModel(config).eval()
    made.characters = Characters("abcdefghijklmnopqrstuvwxyz .")
    return str(save_model(made, tmp_path_factory.mktemp("model") / "m", tokenizer))


@pytest.fixture
def clip(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).normal(size=32000) * 0.1
    soundfile.write("clip.wav", noise, 16000)
    Path("text.txt").write_text(f"\ufeff{TEXT}\n", encoding="utf-8")
    return "clip.wav"


def test_words_are_printed(model, clip, capsys):
    assert main(["align", model, clip, TEXT, "--language", "en"]) == 0
    out, errors = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["start", "end", "prob.", "word"]
    assert [line[3] for line in lines[1:]] == TEXT.split()
    assert all(0 <= float(start) <= float(end) <= 2.0 for start, end, *_ in lines[1:])
    assert re.search(r"score -\d+\.\d\d \(mean log probability of a token\)", errors)


@pytest.mark.parametrize("suffix", ["srt", "vtt", "tsv", "txt", "json", "jsonl"])
def test_the_suffix_decides(model, clip, suffix, capsys):
    out = Path(f"out.{suffix}")
    assert main(["align", model, clip, "text.txt", "--language", "en", "-o", str(out)]) == 0
    assert capsys.readouterr().out == ""
    text = out.read_text()
    assert "Three four five" in " ".join(text.split())
    if suffix == "jsonl":
        row = json.loads(text)
        assert row["text"].split() == TEXT.split()
        assert "pred_text" not in row
        assert [segment["text"] for segment in row["segments"]] == ["One two.", "Three four five"]
        assert {"start", "end", "text", "probability"} == row["segments"][0]["words"][0].keys()
        assert row["score"] < 0


def test_a_manifest_keeps_its_fields_and_order(model, clip, tmp_path, capsys):
    rows = [
        {"audio_filepath": clip, "duration": 2.0, "text": "one two", "lang": "en", "speaker": 7},
        {"audio_filepath": "gone.wav", "duration": 2.0, "text": "one two", "lang": "en"},
        {"audio_filepath": clip, "offset": 0.5, "duration": 1.0, "text": "three four", "lang": "en"},
    ]
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["align", model, "m.jsonl", "-o", "out.jsonl"]) == 1
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [{key: one[key] for key in row} for one, row in zip(found, rows, strict=True)] == rows
    assert "gone.wav" in found[1]["error"]
    words = found[2]["segments"][0]["words"]
    assert [word["text"] for word in words] == ["three", "four"]
    assert all(0.5 <= word["start"] <= word["end"] <= 1.5 for word in words)  # of the file, as in transcripts
    assert "2 of 3 rows aligned" in capsys.readouterr().err
    assert main(["align", model, "m.jsonl"]) == 1
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found


@pytest.mark.parametrize("method", ["ctc", "attention"])
def test_both_methods(model, clip, method):
    assert main(["align", model, clip, TEXT, "--language", "en", "--method", method, "-o", f"{method}.tsv"]) == 0
    assert Path(f"{method}.tsv").read_text().startswith("start\tend\ttext\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["clip.wav"], "clip.wav is one recording: give its text too"),
        (["gone.wav", TEXT], "gone.wav"),
        (["clip.wav", "gone.txt"], "gone.txt does not exist"),
        (["clip.wav", "texts/gone"], "texts/gone does not exist"),
        (["clip.wav", "clip.wav"], "clip.wav is not text in UTF-8"),
        (["clip.wav", ""], "the text is empty"),
        (["clip.wav", "?!"], "has no letters"),
        (["text.txt", TEXT], "text.txt"),
        (["empty.jsonl", TEXT], "empty.jsonl"),
        (["clip.wav", TEXT, "-o", "out.docx"], "ends in one of"),
        (["two.jsonl", "-o", "out.srt"], "ends in .jsonl"),
        (["two.jsonl", TEXT], "a text belongs to one recording"),
        (["clip.wav", TEXT, "--language", "tlh"], "tlh"),
    ],
)
def test_bad_input_gives_one_message(model, clip, given, message, capsys):
    Path("empty.jsonl").write_text("")
    row = json.dumps({"audio_filepath": clip, "duration": 2.0, "text": "one", "lang": "en"})
    Path("two.jsonl").write_text(f"{row}\n{row}\n")
    language = [] if "--language" in given else ["--language", "en"]
    assert main(["align", model, *given, *language]) == 1
    out, errors = capsys.readouterr()
    assert out == ""
    assert [line for line in errors.splitlines() if line.startswith("canter: ")][-1].count(message) >= 1
    assert "Traceback" not in errors
    assert not list(Path().glob("out.*"))


def test_what_a_model_lacks(model, clip, tmp_path, capsys):
    assert main(["align", model, clip, TEXT]) == 1
    assert "names no language" in capsys.readouterr().err
    loaded = load_model(model)
    loaded.characters = None  # nothing says how the head spells
    other = str(save_model(loaded, tmp_path / "other", loaded.tokenizer))
    (tmp_path / "other" / "characters.json").unlink(missing_ok=True)
    assert main(["align", other, clip, TEXT, "--language", "en", "--method", "ctc"]) == 1
    assert "method ctc" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["align", str(tmp_path / "empty"), clip, TEXT]) == 1
    assert "empty" in capsys.readouterr().err


def test_text_or_file(clip):
    assert given_text("text.txt") == f"{TEXT}\n"
    assert given_text("Either/or is said. ") == "Either/or is said. "
    assert given_text("word") == "word"
    assert given_text("a long text " * 1000) == "a long text " * 1000
    assert given_text("https no") == "https no"
    with pytest.raises(ConfigError, match="does not exist"):
        given_text("no.srt")


@pytest.fixture(scope="module", params=["seamless", "cohere", "owsm"])
def family(request, tmp_path_factory) -> Path:
    """A folder with a small random model of another kind."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "seamless":
        return save_theirs(small_theirs(complete=True), folder, small_tokenizer())
    if request.param == "cohere":
        pytest.importorskip("transformers")
        from ..small_cohere import save_cohere

        save_cohere(folder)
        return folder
    return request.getfixturevalue("shared") / "fixtures" / "owsm" / "v4"


def test_other_kinds_of_models(family, clip):
    text = "the Farmer carried, the basket. Das ist ein Test"
    assert main(["align", str(family), clip, text, "--language", "en", "-o", "out.jsonl"]) == 0
    row = json.loads(Path("out.jsonl").read_text())
    words = [word for segment in row["segments"] for word in segment["words"]]
    assert [word["text"] for word in words] == text.split()
    assert words[-1]["end"] > words[0]["start"]
    assert [segment["text"] for segment in row["segments"]] == ["the Farmer carried, the basket.", "Das ist ein Test"]
    rows = [{"audio_filepath": clip, "duration": 2.0, "text": text, "lang": "en"}]
    Path("m.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert main(["inspect", "m.jsonl", "--suspects", str(family), "-o", "scored.jsonl"]) == 0
    assert json.loads(Path("scored.jsonl").read_text())["score"] == pytest.approx(row["score"], abs=1e-3)


def test_a_model_of_another_library_is_refused(clip, tmp_path, capsys):
    pytest.importorskip("transformers")
    from ..integrations.small_transformers import built, word_tokenizer

    moonshine = built("moonshine")
    tokenizer = word_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    for part in (moonshine.model, moonshine.extractor, tokenizer):
        part.save_pretrained(tmp_path / "moonshine")
    assert main(["align", str(tmp_path / "moonshine"), clip, TEXT]) == 1
    assert "alignment of a given text" in capsys.readouterr().err
