import json
from pathlib import Path

import pytest

from canter.cli.tokenizer import Options, run
from canter.corpus.manifest import write_manifest
from canter.errors import ConfigError, ManifestError
from canter.text import load_tokenizer

ROWS = [
    {"audio_filepath": f"{n}.wav", "duration": 1.0, "text": text, "lang": lang}
    for n, (text, lang) in enumerate(
        [("the doctor opened the window", "en"), ("la reina encontró el jardín", "es"), ("", "en")]
    )
]


def test_trains_on_the_texts_and_names_what_it_skipped(tmp_path, capsys):
    write_manifest(tmp_path / "train.jsonl", ROWS)
    options = Options((tmp_path / "train.jsonl",), tmp_path / "tokenizer", vocab_size=4000, json=True)
    run(options)
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert summary["fingerprint"] == tokenizer.fingerprint
    assert summary["languages"] == ["en", "es"]
    assert summary["texts"] == 2
    assert tokenizer.decode(tokenizer.encode(ROWS[1]["text"])) == ROWS[1]["text"]
    assert "vocabulary lowered from 4000" in captured.err
    assert "train.jsonl:3: text is empty" in captured.err
    with pytest.raises(ConfigError, match="holds a tokenizer"):
        run(options)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(ManifestError, match=r"none\.jsonl"):
        run(Options((tmp_path / "none.jsonl",), tmp_path / "tokenizer"))
    with pytest.raises(ConfigError, match="at least one manifest"):
        run(Options((), Path("tokenizer")))
