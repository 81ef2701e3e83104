"""`canter score`: figures, difference, and what a user can get wrong."""

import json
import re
from pathlib import Path

import pytest
import yaml

from canter.cli.main import main

ROWS = [
    {"audio_filepath": "a.wav", "text": "Mr. Smith went to the shop", "pred_text": "mister smith want the shop now"},
    {"audio_filepath": "b.wav", "text": "der Hund schläft", "pred_text": "der hund schläft", "lang": "de"},
    {"audio_filepath": "c.wav", "text": "hmm", "pred_text": "so", "lang": "en"},
]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_table_and_alignment(tmp_path, capsys):
    assert main(["score", write(tmp_path / "r.jsonl", ROWS)]) == 0
    out = capsys.readouterr().out
    assert "44.44%" in out  # 4 errors in 9 words
    assert "1 of the insertions are in utterances whose reference is empty" in out
    assert "ref  mister smith went to the shop ***" in out
    assert "hyp  mister smith want ** the shop now" in out
    assert main(["score", write(tmp_path / "r.jsonl", ROWS), "--normalize", "leaderboard"]) == 0
    out = capsys.readouterr().out
    assert "33.33%" in out
    assert "1 utterances left out" in out
    assert "1 words transcribed there are not counted" in " ".join(out.split())


def test_a_result_at_a_url(tmp_path, capsys):
    url = f"file://{write(tmp_path / 'r.jsonl', ROWS)}"
    assert main(["score", url, "--against", url, "--output", str(tmp_path / "page.html")]) == 0
    assert "44.44%" in capsys.readouterr().out


def test_json(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", ROWS)
    better = write(tmp_path / "s.jsonl", [{**ROWS[0], "pred_text": ROWS[0]["text"]}, *ROWS[1:]])
    assert main(["score", path, "--json", "--normalize", "basic", "--against", better]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["languages"]["de"]["wer"] == 0
    assert (summary["substitutions"], summary["deletions"], summary["insertions"]) == (3, 1, 1)
    assert summary["difference"]["wer"] == pytest.approx(summary["wer"] - 1 / 10)
    assert summary["worst"][0]["utterance"] == "a.wav"


def test_confidence_of_words(tmp_path, capsys):
    def words(*pairs):
        return [{"words": [{"text": text, "start": 0.0, "end": 1.0, "confidence": value} for text, value in pairs]}]

    rows = [
        {**ROWS[0], "segments": words(*zip(ROWS[0]["pred_text"].split(), (0.9, 0.8, 0.2, 0.9, 0.95, 0.1)))},
        {**ROWS[1], "segments": words(("der", 0.99), ("hund", 0.98), ("schläft", 0.97))},
        ROWS[2],
    ]
    assert main(["score", write(tmp_path / "r.jsonl", rows)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "confidence of 9 words: 77.8% are right, mean confidence 75.4%" in out
    assert "AUC 1.000" in out
    assert main(["score", str(tmp_path / "r.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["confidence"]["words"] == 9
    assert main(["score", write(tmp_path / "plain.jsonl", ROWS), "--json"]) == 0
    assert "confidence" not in json.loads(capsys.readouterr().out)


def test_translations_have_bleu_and_chrf_too(tmp_path, capsys):
    pytest.importorskip("sacrebleu", reason="the extra bleu is not installed")
    rows = [
        {"text": "Der Hund bellt sehr laut.", "pred_text": "Der Hund bellt sehr laut.", "target_lang": "de"},
        {"text": "The dog barks loudly.", "pred_text": "A dog barks.", "source_lang": "de", "target_lang": "en"},
    ]
    path = write(tmp_path / "r.jsonl", rows)
    assert main(["score", path, "--bleu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["translation"]
    assert found["de"]["bleu"] == pytest.approx(100)
    assert 0 < found["en"]["chrf"] < 100
    assert main(["score", path, "--bleu"]) == 0
    assert "into de: BLEU 100.00, chrF 100.00" in capsys.readouterr().out


def test_page_shows_the_worst_and_escapes_what_it_shows(tmp_path, capsys):
    rows = [*ROWS, {"text": "one two", "pred_text": "<script> two", "id": "<b>"}]
    page = tmp_path / "new" / "page.html"
    path = write(tmp_path / "r.jsonl", rows)
    assert main(["score", path, "--output", str(page), "--normalize", "none"]) == 0
    text = page.read_text()
    assert '<mark title="for: one">&lt;script&gt;</mark> two' in text
    assert "<script>" not in text
    assert "<del>" in text
    assert "&lt;b&gt;" in text
    assert re.search(r"value.>[\d.]+%</div><div class=.name.>WER<", text)  # the figure large, its name below
    assert f"written: {page}" in capsys.readouterr().err


def test_words_where_none_were_said_are_insertions_and_no_rate(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", [{"text": "", "pred_text": "thanks everyone"}])
    for normalize in ("standard", "basic", "none"):
        assert main(["score", path, "--json", "--normalize", normalize]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["wer"], found["insertions"], found["wer_interval"]) == (None, 2, [None, None])
    page = tmp_path / "page.html"
    assert main(["score", path, "--against", path, "--output", str(page)]) == 0
    out = capsys.readouterr().out
    assert "n/a" in out
    assert "%" not in out
    assert "2 of the insertions are in utterances whose reference is empty" in out
    assert "n/a" in page.read_text()


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([ROWS[0], {"text": "a"}, {"text": "b"}], [], ":2: pred_text missing, and 1 more such rows"),
        ([{"text": "a"}], ["--skip-bad"], ":1: pred_text missing"),
        ([], [], "holds no rows"),
        (ROWS, ["--worst", "-1"], "--worst is -1"),
        (ROWS, ["--output", "/"], "the page cannot be written to /"),
        (ROWS, ["--against", "{other}"], "do not hold the same utterances"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, rows, arguments, message):
    other = write(tmp_path / "other.jsonl", ROWS[:1])
    path = write(tmp_path / "r.jsonl", rows)
    assert main(["score", path, *(argument.format(other=other) for argument in arguments)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_bad_rows_can_be_skipped_and_are_listed(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", [*ROWS, {"text": "a"}])
    assert main(["score", path, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert ":4: pred_text missing" in captured.err
    assert "44.44%" in captured.out


def test_the_wer_is_written_for_the_hub(tmp_path, capsys):
    write(tmp_path / "r.jsonl", [{"audio_filepath": "a.wav", "text": "the doctor", "pred_text": "the nurse"}])
    given = [
        str(tmp_path / "r.jsonl"),
        "--eval-results",
        str(tmp_path),
        "--dataset",
        "hf-audio/open-asr-leaderboard:ami",
    ]
    assert main(["score", *given]) == 0
    (file,) = (tmp_path / ".eval_results").iterdir()
    assert f"written: {file}" in capsys.readouterr().err
    (entry,) = yaml.safe_load(file.read_text())
    assert (entry["dataset"]["task_id"], entry["value"]) == ("ami", 50.0)
    assert main(["score", *given[:3]]) == 1
    assert "--eval-results FOLDER and --dataset DATASET:TASK go together" in capsys.readouterr().err
    given[2] = str(tmp_path / "none")
    assert main(["score", *given]) == 1
    assert "none is not a folder; name the model's" in capsys.readouterr().err
