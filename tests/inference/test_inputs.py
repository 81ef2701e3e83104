"""Unset fields of rows get defaults, invalid input becomes an item with a problem, and no item stops the others."""

import json

import numpy as np
import pytest
import soundfile

from canter.corpus.manifest import Utterance
from canter.errors import ManifestError
from canter.inference.inputs import Item, read_items
from canter.inference.languages import Defaults
from canter.inference.recording import Transcription
from canter.inference.transcript.formats import file_names, file_segments, render, result_row, write_output
from canter.inference.transcript.segments import Segment


def test_results_have_urls_without_their_secrets():
    url = "https://u:s3cr3t@host/data/talk.wav?X-Amz-Signature=s3cr3t&part=2"
    other = "https://host/data/call?token=s3cr3t"
    rows = [{"audio_filepath": path, "duration": 1.0, "source": url, "text": "a", "n": 3} for path in (url, other)]
    items = [Item(row, Utterance(str(row["audio_filepath"]), 1.0, text="a")) for row in rows]
    items.append(Item({"audio_filepath": url}, None, f"{url} cannot be read"))
    found = [Transcription("one"), Transcription("two"), Transcription("", error=items[-1].problem)]
    row = result_row(items[0], found[0])
    assert row["audio_filepath"] == row["source"] == "https://host/data/talk.wav?part=2"
    assert row | {"audio_filepath": url, "source": url} == rows[0] | {"pred_text": "one"}
    for kind in ("nemo", "json"):
        written = "".join(render(items, found, kind))
        assert "s3cr3t" not in written
        assert written.count("https://host/data/talk.wav?part=2") >= 2
    assert file_names(items) == ["talk", "call", "talk-2"]


@pytest.fixture
def clip(tmp_path):
    soundfile.write(tmp_path / "clip.wav", np.zeros(800), 16000)
    return tmp_path / "clip.wav"


def test_paths_that_are_nothing_are_items_among_others(tmp_path, clip):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no audio")
    (tmp_path / "m.jsonl").write_text("")
    names = [tmp_path / "absent", tmp_path / "empty", clip, tmp_path / "texts", tmp_path / "m.jsonl"]
    items = read_items(names)
    assert [item.utterance is not None for item in items] == [False, False, True, False, False]
    assert [item.row["audio_filepath"] for item in items] == [str(name) for name in names]
    for number, reason in [(0, "does not exist"), (1, "holds nothing"), (3, "holds nothing"), (4, "m.jsonl")]:
        assert reason in str(items[number].problem)
    with pytest.raises(ManifestError, match=r"(?s)absent.*empty"):
        read_items(names[:2])


def test_recordings_of_any_name(tmp_path, clip):
    for name in ("a.mov", "noname", "a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(clip.read_bytes())
        (item,) = read_items([tmp_path / name])
        assert item.row == {"audio_filepath": str(tmp_path / name), "duration": 0.05}
    (tmp_path / "m.wav").write_text('{"audio_filepath": "clip.wav", "duration": 0.05}')
    (item,) = read_items([tmp_path / "m.wav"])
    assert item.utterance is not None
    assert item.utterance.audio_filepath == str(clip)
    assert [item.utterance for item in read_items([clip], track=1)] == [None]


def utterance_of(tmp_path, row: dict, defaults: Defaults):
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio_filepath": "clip.wav", "duration": 0.05, **row}))
    (item,) = read_items([tmp_path / "m.jsonl"], defaults=defaults)
    assert item.utterance
    return item.utterance


@pytest.mark.parametrize(
    ("row", "defaults", "expected"),
    [
        ({}, Defaults("de"), ("de", None, None, None)),
        ({"lang": "fr"}, Defaults("de"), ("fr", None, None, None)),
        ({"source_lang": "fr"}, Defaults("de"), (None, "fr", None, None)),
        ({}, Defaults("de", "translate"), ("de", "de", "en", "translate")),
        ({"lang": "fr"}, Defaults("de", "translate", "es"), ("fr", "fr", "es", "translate")),
        ({"target_lang": "it"}, Defaults("de", "translate"), (None, None, "it", "translate")),
        ({"taskname": "asr"}, Defaults("de", "translate"), ("de", None, None, "asr")),
        ({}, Defaults(None, "transcribe"), (None, None, None, "transcribe")),
    ],
)
def test_defaults_fill_what_a_row_leaves_open(tmp_path, clip, row, defaults, expected):
    found = utterance_of(tmp_path, row, defaults)
    assert (found.lang, found.source_lang, found.target_lang, found.taskname) == expected


def test_names_are_never_the_same():
    stems = ["a", "a", "a-2", "b", "a", "b", "a-2"]
    names = file_names([Item({"audio_filepath": f"/x/{stem}.wav"}, None) for stem in stems])
    assert len(set(names)) == len(names)
    assert [names[0], names[2], names[3]] == ["a", "a-2", "b"]


def test_names_keep_folders_and_tell_suffixes_apart():
    files = ["/v/a.mp4", "/v/a.mkv", "/v/sub/a.mp4", "/v/sub/b.mp4", "/w/a.mp4", "/v/sub/b.mp4", "/else/c.x.wav"]
    names = file_names([Item({"audio_filepath": file}, None) for file in files], ["/v", "/w"])
    assert names == ["a.mp4", "a.mkv", "sub/a", "sub/b", "a.mp4-2", "sub/b-2", "c.x"]


def test_times_are_those_of_the_file(tmp_path, clip):
    row = {"audio_filepath": str(clip), "duration": 2.0, "offset": 10.0}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    (item,) = read_items([tmp_path / "m.jsonl"])
    told = Transcription("a", segments=(Segment(0.5, 1.0, "a"),), language="en")
    assert [(one.start, one.end) for one in file_segments(item, told)] == [(10.5, 11.0)]
    assert result_row(item, told) == row | {"pred_text": "a"}
    assert result_row(item, told, timed=True)["segments"] == [{"start": 10.5, "end": 11.0, "text": "a"}]
    untold = Transcription("a")
    assert [(one.start, one.end) for one in file_segments(item, untold)] == [(10.0, 12.0)]
    assert result_row(item, untold) == row | {"pred_text": "a"}


def test_several_utterances_in_one_file():
    items = [Item({"audio_filepath": name}, None) for name in ("a", "b")]
    results = [Transcription("one\ntwo", language="en"), Transcription("", error="gone")]
    assert "".join(render(items, results, "txt")) == "one two\n\n"
    first, second = json.loads("".join(render(items, results, "json")))
    assert (first["audio_filepath"], first["text"], first["language"]) == ("a", "one\ntwo", "en")
    assert second == {"audio_filepath": "b", "error": "gone"}


def test_names_that_are_no_utf8_are_written_in_ascii(tmp_path):
    """A file name in other bytes, or such an escape in a manifest, does not lose the other rows."""
    rows = [{"audio_filepath": "sch\udcf6n.wav"}, {"audio_filepath": "schön.wav", "speaker": "Jörg"}]
    items = [Item(row, None) for row in rows]
    results = [Transcription("größer"), Transcription("größer")]
    for kind in ("nemo", "json"):
        write_output(tmp_path / kind, render(items, results, kind))
        text = (tmp_path / kind).read_text()
        found = json.loads(text) if kind == "json" else [json.loads(line) for line in text.splitlines()]
        assert [row["audio_filepath"] for row in found] == [row["audio_filepath"] for row in rows]
        assert text.count("größer") == (1 if kind == "nemo" else 2)
        assert "schön.wav" in text


def test_a_folder_of_recordings_with_several_manifests_is_its_recordings(tmp_path, clip):
    for name in ("one.jsonl", "other.jsonl"):
        (tmp_path / name).write_text('{"pred_text": "of an earlier run"}\n')
    (item,) = read_items([tmp_path])
    assert item.row["audio_filepath"] == str(tmp_path / "clip.wav")
