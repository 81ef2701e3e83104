"""Audio and video are recognised by their content."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from canter.corpus.columns import ReadOptions
from canter.corpus.manifest import Problem, Utterance
from canter.corpus.media import HEAD, container_format, is_data, is_media, media_in
from canter.corpus.readers.folder import read_media_folder
from canter.corpus.sources import units_of
from canter.errors import ManifestError

DATA = Path(__file__).parent / "data"
NOISE = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)


def sound(kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, NOISE, 16000, format=kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("WAV", "WAV"),
        ("RF64", "WAV"),
        ("FLAC", "FLAC"),
        ("OGG", "Ogg"),
        ("MP3", "MP3"),
        ("AIFF", "AIFF"),
        ("AU", "AU"),
        ("CAF", "CAF"),
        ("W64", "Wave64"),
        ("NIST", "NIST SPHERE"),
        ("VOC", "VOC"),
    ],
)
def test_sound_files_by_their_first_bytes(kind, name):
    assert container_format(sound(kind)[:HEAD]) == name


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mov", "aac"),
        ("mp4", "aac"),
        ("matroska", "aac"),
        ("mpegts", "aac"),
        ("avi", "mp2"),
        ("adts", "aac"),
        ("ac3", "ac3"),
        ("asf", "wmav2"),
        ("flv", "aac"),
        ("mp2", "mp2"),
    ],
)
def test_media_files_by_their_first_bytes(encode, container, codec):
    data = encode(container, np.tile(NOISE, 3), codec=codec, rate=48000)
    assert container_format(data[:HEAD])


@pytest.mark.parametrize(
    "content",
    [
        b'{"audio_filepath": "a.wav"}\n',
        b"client_id\tpath\tsentence\n",
        b"#EXTM3U\nhttp://127.0.0.1/a.ts\n",
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"\0\0\0\x18ftypheic" + bytes(100),
        b'\xff\xfe{\0"\0a\0' * 50,  # JSON in UTF-16, which begins as an MP3 frame may
        b"PK\3\4" + bytes(100),
        b"",
    ],
)
def test_other_files(content):
    assert container_format(content) is None


@given(st.binary(max_size=600))
def test_text_and_chance_are_no_media(content):
    assert container_format(content.hex().encode()) is None
    container_format(content)
    is_data(content)


def test_the_content_decides_whatever_the_name(tmp_path):
    def put(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    row = b'{"audio_filepath": "a.wav", "duration": 1.0, "text": "a"}\n'
    for name in ("a.wav", "a", "a.txt", "a.jsonl", "a.mov", "a.unknown"):
        assert is_media(put(name, sound("WAV")))
    for name in ("m.jsonl", "m", "m.wav", "m.txt"):
        assert not is_media(put(name, row))
        (unit,) = units_of(str(tmp_path / name))
        assert unit.kind == "nemo"
    assert is_media(put("damaged.wav", b"\0" * 100))  # reading it says what is wrong
    assert not is_media(put("table.tsv", b"path\tsentence\n"))
    assert not is_media(str(tmp_path))
    assert is_media("missing.wav")
    assert not is_media("missing.jsonl")
    assert is_media("https://example.org/talk.mp3")
    with pytest.raises(ManifestError, match="is audio, not a manifest"):
        units_of(put("a.jsonl", sound("FLAC")))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with media of known, unknown and wrong names, and with other files."""
    for name, content in {
        "a.wav": sound("WAV"),
        "noname": sound("FLAC"),
        "wrong.txt": sound("MP3"),
        "sub/b.mpga": sound("MP3"),
        "a.txt": b"text of a",
        "notes.md": b"# notes",
        "code.ts": b"export const a = 1;\n",
        "data.json": json.dumps({"a": 1}).encode(),
        ".hidden.wav": sound("WAV"),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    shutil.copy(DATA / "clip.mov", tmp_path / "clip.mov")
    os.mkfifo(tmp_path / "pipe.wav")
    return tmp_path


def test_folders_are_searched_by_content(folder):
    media, others = media_in(str(folder))
    assert [os.path.relpath(one, folder) for one in media] == [
        "a.wav", "clip.mov", "noname", "sub/b.mpga", "wrong.txt"
    ]  # fmt: skip
    assert [os.path.basename(one) for one in others] == ["a.txt", "code.ts", "data.json", "notes.md", "pipe.wav"]


def test_a_folder_as_training_data_counts_what_it_does_not_take(folder):
    pytest.importorskip("av", reason="the extra 'av' is not installed")
    rows = [row for _, row in read_media_folder(str(folder), ReadOptions(require_text=False))]
    assert [os.path.basename(row.audio_filepath) for row in rows if isinstance(row, Utterance)] == [
        "a.wav", "clip.mov", "noname", "b.mpga", "wrong.txt"
    ]  # fmt: skip
    (last,) = (row for row in rows if isinstance(row, Problem))
    assert last.reason == "no audio or video: 4 files, the first code.ts"
