"""`canter index` and `canter inspect`: what they print, and what a user can get wrong."""

import json
import os
import re
import time

import numpy as np
import pytest

import canter
from canter.cli.main import main
from canter.corpus.index import LengthIndex
from canter.corpus.manifest import write_manifest
from canter.corpus.statistics import QUANTILES, joint_histogram, summarise


@pytest.fixture
def manifests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 40), ("b", 10)):
        rows = [
            {"audio_filepath": f"{name}{number}.wav", "duration": 2 + number % 5, "text": "word " * (1 + number % 7)}
            for number in range(count)
        ]
        write_manifest(f"{name}.jsonl", rows)
    return tmp_path


def test_index_then_inspect(manifests, capsys):
    with open("a.jsonl", "a") as file:
        file.write('{\n{"audio_filepath": "c.wav", "duration": 1.0, "text": "%s"}\n' % ("fast [b]" * 60))
    assert main(["index", "a.jsonl", "b.jsonl", "-o", "l.arrow", "--tokenizer", "chars", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "51 utterances" in out
    assert "left out 1: invalid JSON" in out
    assert f"{manifests}/a.jsonl:41: invalid JSON" in out
    assert "l.skipped.jsonl" in out
    assert main(["inspect", "l.arrow", "--figure", "l.png"]) == 0
    out = capsys.readouterr().out
    assert "51 utterances" in out
    assert re.search(r"\na +41 ", out)
    assert "c.wav: fast [b]" in out
    assert "left out of the index, 1: invalid JSON" in out
    assert (manifests / "l.png").read_bytes().startswith(b"\x89PNG")


def test_json_of_both(manifests, capsys):
    assert main(["index", "a.jsonl", "b.jsonl", "--tokenizer", "bytes", "--prompt-tokens", "4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 50
    assert [source["weight"] for source in facts["sources"]] == pytest.approx([0.8, 0.2])
    assert main(["inspect", "lengths.arrow", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["fingerprint"] == facts["fingerprint"]
    assert figures["tokens"] == facts["tokens"]


def test_mixtures(manifests, capsys):
    (manifests / "equal.yaml").write_text("temperature: 0\ninput_cfg: [{path: a.jsonl}, {path: b.jsonl}]\n")
    assert main(["index", "equal.yaml", "--tokenizer", "chars"]) == 0
    assert LengthIndex.open("lengths.arrow").weights == pytest.approx([0.5, 0.5])
    (manifests / "mix.yaml").write_text(
        "- {path: a.jsonl, weight: 1, tags: {lang: en}}\n- {path: b.jsonl, weight: 3}\n"
    )
    assert main(["index", "mix.yaml", "--tokenizer", "chars"]) == 0
    index = LengthIndex.open("lengths.arrow")
    assert index.weights == pytest.approx([0.25, 0.75])
    assert index.utterance(0).lang == "en"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index"], "nothing to index"),
        (["index", "none.jsonl"], "none.jsonl does not exist"),
        (["index", "a.jsonl"], "num_tokens missing: name a tokenizer"),
        (["index", "a.jsonl", "--tokenizer", "none"], "none"),
        (["index", "a.jsonl", "--tokenizer", "chars", "--prompt-tokens", "-1"], "must be 0 or more"),
        (["index", "a.jsonl", "--tokenizer", "chars", "-o", "a.jsonl"], "exists and is not a length index"),
        (["index", "a.jsonl", "--tokenizer", "chars", "-o", "a.jsonl/l.arrow"], "cannot be written"),
        (["index", "a.jsonl", "--tokenizer", "chars", "--workers", "-3"], "--workers is -3"),
        (["index", "m.yaml", "a.jsonl"], "m.yaml is a mixture: name it alone"),
        (["index", "m.yaml"], "m.yaml does not exist"),
        (["inspect", "none.arrow"], "none.arrow does not exist"),
        (["inspect", "empty.jsonl"], "canter index"),
        (["inspect", "good.arrow", "--worst", "-1"], "--worst is -1"),
        (["inspect", "good.arrow", "--figure", "no/such/folder.png"], "cannot be written"),
        (["inspect", "good.arrow", "--figure", "x.words"], "cannot be written"),
    ],
)
def test_one_clean_message(manifests, monkeypatch, capsys, arguments, message):
    LengthIndex([1.0, 2.0], [3, 4]).save("good.arrow")
    monkeypatch.setenv("XDG_CACHE_HOME", str(manifests / "cache"))
    (manifests / "empty.jsonl").touch()
    before = (manifests / "a.jsonl").read_text()
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("canter: ")
    assert message in error
    assert "Traceback" not in error
    assert (manifests / "a.jsonl").read_text() == before


def test_inspect_copes_with_a_single_row_and_with_equal_rows(manifests, capsys):
    LengthIndex([1.0], [0]).save("one.arrow")
    LengthIndex(np.full(9, 3.0), np.full(9, 7)).save("equal.arrow")
    for name in ("one.arrow", "equal.arrow"):
        assert main(["inspect", name, "--figure", "x.png"]) == 0
        assert main(["inspect", name, "--json", "--worst", "0"]) == 0


def test_summary_is_what_numpy_computes():
    generator = np.random.default_rng(1)
    seconds = generator.lognormal(1.5, 0.6, 5000).astype(np.float32)
    tokens = (seconds * generator.normal(4, 0.5, 5000)).astype(int) + 3
    tokens[77] = 60000
    index = LengthIndex(seconds, tokens)
    summary = summarise(index)
    rates = tokens / seconds.astype(float)
    assert summary.mean_rate == pytest.approx(rates.mean(), rel=1e-5)
    assert summary.std_rate == pytest.approx(rates.std(), rel=1e-5)
    assert [one.row for one in summary.outliers] == [77]
    assert summary.outliers[0].z == pytest.approx((rates[77] - rates.mean()) / rates.std(), rel=1e-4)
    assert summary.quantiles["tokens"] == pytest.approx(np.quantile(tokens, QUANTILES))
    counts, edges, _ = joint_histogram(index, 10, 7)
    assert counts.sum() == 5000
    assert counts.shape[1] <= 8
    assert counts[:-1].sum(axis=1) == pytest.approx(np.histogram(seconds, edges)[0][:-1], abs=1)


def test_the_index_is_not_read_anew_where_nothing_changed(manifests, capsys):
    arguments = ["index", "a.jsonl", "--tokenizer", "chars", "--workers", "1"]
    assert main(arguments) == 0
    parts = {path: path.stat().st_mtime_ns for path in (manifests / "lengths.arrow.parts").iterdir()}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (manifests / "lengths.arrow.parts").iterdir()} == parts
    os.utime("a.jsonl", (time.time() + 9, time.time() + 9))
    assert main(arguments) == 0
    assert set((manifests / "lengths.arrow.parts").iterdir()).isdisjoint(parts)


def test_columns_are_named_alike_by_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = "".join(f"{number}.wav,{2 + number % 5},wrong,{'a' * (number + 1)}\n" for number in range(30))
    (tmp_path / "t.csv").write_text("clip,duration,text,said\n" + rows)
    columns = ["--text-column", "said", "--audio-column", "clip"]
    assert main(["index", "t.csv", "-o", "l.arrow", "--tokenizer", "chars", *columns]) == 0
    assert LengthIndex.open("l.arrow").tokens.tolist() == [number + 2 for number in range(30)]
    assert LengthIndex.open("l.arrow").utterance(3).audio_filepath == f"{tmp_path}/3.wav"
    index = canter.build_index("t.csv", tokenizer="chars", text_column="said", audio_column="clip", progress=False)
    assert index.tokens.tolist() == LengthIndex.open("l.arrow").tokens.tolist()
    capsys.readouterr()
    assert main(["inspect", "t.csv", "--tokenizer", "chars", "--json", *columns]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == sum(range(2, 32))
    for command in ("plan", "compare"):
        assert main([command, "t.csv", "--json", *columns, *(["--ranks", "2"] if command == "compare" else [])]) == 0
        assert json.loads(capsys.readouterr().out)
    assert main(["plan", "t.csv", "--audio-column", "sound"]) == 1
    error = capsys.readouterr().err
    assert "t.csv has no column 'sound' of audio; it has clip, duration, text, said" in error
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> str:
    """A folder with a small random model and its tokenizer."""
    from canter.models.decoder import DecoderConfig
    from canter.models.fastconformer import FastConformerConfig
    from canter.models.features import FeatureConfig
    from canter.models.formats.checkpoint import save_model
    from canter.models.model import ModelConfig, SpeechModel
    from canter.text import train_tokenizer

    tokenizer = train_tokenizer(["one two three four five"] * 20, languages=["en", "de"], vocab_size=40)
    config = ModelConfig(
        features=FeatureConfig(mels=16),
        encoder=FastConformerConfig(layers=1, width=16, heads=2, feedforward=32, subsampling_channels=4, mels=16),
        decoder=DecoderConfig(layers=1, width=16, heads=2, feedforward=32, vocabulary=40, positions=64),
    )
    return str(save_model(SpeechModel(config), tmp_path_factory.mktemp("model") / "m", tokenizer))


@pytest.fixture
def speech(tmp_path, monkeypatch) -> list[dict]:
    """A manifest of noises, one of which says far too much; one file is missing and one is no audio."""
    import soundfile

    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(24):
        samples = np.random.default_rng(number).normal(size=16000 + 500 * number) * 0.1
        if number != 5:
            soundfile.write(f"{number}.wav", samples, 16000)
        text = "one two three four five " * (9 if number == 3 else 1)
        rows.append({"audio_filepath": f"{number}.wav", "duration": len(samples) / 16000, "text": text, "lang": "en"})
        rows[-1]["speaker"] = f"s{number}"
    (tmp_path / "6.wav").write_bytes(b"no audio")
    write_manifest("m.jsonl", rows)
    return rows


def test_suspects(scorer, speech, tmp_path, capsys):
    arguments = ["inspect", "m.jsonl", "--suspects", scorer, "--worst", "4", "-o", "out.jsonl"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["speaker"] for row in found] == [row["speaker"] for row in speech]
    assert all(os.path.isabs(row["audio_filepath"]) for row in found)
    listed = [row["speaker"] for row in found if row["suspect"]]
    assert {"s3", "s5", "s6"} <= set(listed)
    assert f"{len(listed)} of 24 rows are suspects" in out
    assert out.count("unreadable") == 2
    assert "rate" in next(line for line in out.splitlines() if " 3.wav" in line)
    assert "5.wav" in found[5]["error"]
    assert found[3]["reason"] == "rate"
    assert found[3]["suspicion"] >= 1
    assert all({"score", "end_logprob", "characters_per_second"} <= row.keys() for row in found if "error" not in row)
    assert main([*arguments[:4], "--worst", "4", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["rows"], made["suspects"], made["unscored"]) == (24, len(listed), 2)
    assert [row["speaker"] for row in made["worst"]][:3] == ["s5", "s6", "s3"]
    assert "pred_text" in made["worst"][2]


def test_suspects_of_rows_without_a_language(scorer, speech, capsys):
    write_manifest("m.jsonl", [{key: row[key] for key in row if key != "lang"} for row in speech])
    assert main(["inspect", "m.jsonl", "--suspects", scorer, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unscored"] == 24
    assert main(["inspect", "m.jsonl", "--suspects", scorer, "--json", "--language", "German"]) == 0
    assert json.loads(capsys.readouterr().out)["unscored"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--output", "out.jsonl"], "are for --suspects"),
        (["--suspects", "no/model"], "no/model"),
        (["--suspects", "MODEL", "--figure", "a.png"], "--figure draws lengths"),
        (["--suspects", "MODEL", "--language", "tlh"], "tlh"),
    ],
)
def test_suspects_refuse_what_they_cannot_do(scorer, speech, given, message, capsys):
    assert main(["inspect", "m.jsonl", *(scorer if one == "MODEL" else one for one in given)]) == 1
    assert message in capsys.readouterr().err
    assert not os.path.exists("out.jsonl")
