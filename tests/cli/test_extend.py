import json
import shutil

import pytest
import torch

from canter.cli import extend
from canter.corpus.manifest import write_manifest
from canter.errors import ConfigError
from canter.loading import load_model, save_module

ROWS = [
    {"audio_filepath": f"{n}.wav", "duration": 1.0, "text": text, "lang": lang}
    for n, (text, lang) in enumerate([("azul fell-awen", "kab"), ("azul amek", "kab"), ("hello hello", "en")] * 3)
]


@pytest.fixture
def folder(polyglot, tmp_path):
    return save_module(polyglot, tmp_path / "polyglot")


def test_a_language_with_pieces_is_learned_from_its_rows_only(folder, polyglot, tmp_path, capsys):
    write_manifest(tmp_path / "train.jsonl", ROWS)
    options = extend.Options(model=folder, output=tmp_path / "more", language="kab", like="es",
                             manifest=(tmp_path / "train.jsonl",), pieces=4)  # fmt: skip
    extend.run(options)
    text = capsys.readouterr().out
    size = polyglot.vocabulary
    assert f"{size + 5:,} tokens: {size:,} keep the rows of the model, 5 are new" in text
    assert "tokens a word over 6 texts, " in text
    assert "text of the other languages is encoded as before" in text
    model = load_model(tmp_path / "more")
    assert torch.equal(model.decoder.embedding.weight[:size], polyglot.decoder.embedding.weight)
    assert model.tokenizer.languages == ("en", "es", "fr", "kab")
    assert len(model.tokenizer.encode("azul", "kab")) < 4 == len(model.tokenizer.encode("azul", "en"))
    assert len(model.tokenizer.encode("hello", "kab")) == 5
    with pytest.raises(ConfigError, match="more exists; choose another name"):
        extend.run(options)


def test_a_real_whisper_transcribes_english_as_before(shared, tmp_path):
    """With timestamps too, whose ids now lie between two ranges of text."""
    import canter

    write_manifest(tmp_path / "train.jsonl", ROWS)
    folder = shared / "models" / "whisper-tiny.en"
    extend.run(extend.Options(model=folder, output=tmp_path / "more", language="kab", json=True,
                              manifest=(tmp_path / "train.jsonl",), pieces=4))  # fmt: skip
    clip = sorted((shared / "data" / "speech" / "librivox_mini" / "flac").iterdir())[0]
    before, after = (canter.load(one).transcribe(clip, timestamps="segment") for one in (folder, tmp_path / "more"))
    assert before.text == after.text
    assert [(one.start, one.end) for one in before.segments] == [(one.start, one.end) for one in after.segments]


def test_json(folder, tmp_path, capsys):
    extend.run(extend.Options(model=folder, output=tmp_path / "more", language="kab", json=True))
    summary = json.loads(capsys.readouterr().out)
    assert summary["new"] == 1
    assert summary["languages"] == ["en", "es", "fr", "kab"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to add"),
        ({"like": "es"}, "--like gives the start of a new language; name it with --language"),
        ({"language": "kab", "manifest": ("x.jsonl",)}, "--manifest gives the text of new pieces; add --pieces"),
        ({"language": "kab", "pieces": 5}, "learned from text, and there is none; name a --manifest"),
        ({"language": "kab", "like": "xho"}, "--like xho is not a language of this model; it knows en, es, fr"),
        ({"language": "Spanish"}, "the model knows 'es' already; train it as it is"),
    ],
)
def test_what_cannot_be_done_is_named(folder, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        extend.run(extend.Options(model=folder, output=tmp_path / "more", **settings))
    assert not (tmp_path / "more").exists()


def test_a_model_without_a_tokenizer_is_named(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tokenizer": False}))
    shutil.copytree(folder, tmp_path / "mute")
    with pytest.raises(ConfigError, match="mute has no tokenizer to extend"):
        extend.run(extend.Options(model=tmp_path / "mute", output=tmp_path / "more", language="kab"))
