"""Pipes and devices where files belong: refused in one line, never waited for."""

import json
import os
import socket

import pytest

from canter.corpus.audio import audio_seconds, load_audio
from canter.corpus.build import index_sources
from canter.corpus.columns import ReadOptions
from canter.corpus.counting import UnitCounter
from canter.corpus.index import LengthIndex
from canter.corpus.manifest import Problem
from canter.corpus.mixture import read_mixture
from canter.corpus.readers.folder import read_media_folder
from canter.corpus.sources import open_source
from canter.errors import AudioError, ConfigError, ManifestError

NAMES = ("a.jsonl", "a.jsonl.gz", "a.tar", "a.tsv", "a.arrow", "a.parquet", "a.json")


@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_is_refused_as_manifest(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ManifestError, match="cannot be read: a named pipe, not a regular file; write it to a file"):
        list(open_source(tmp_path / name))
    with pytest.raises(ManifestError, match="a named pipe, not a regular file"):
        index_sources(tmp_path / name, tmp_path / "lengths.arrow", UnitCounter("bytes"))


def test_a_pipe_is_refused_as_mixture_and_index(tmp_path):
    os.mkfifo(tmp_path / "mix.yaml")
    os.mkfifo(tmp_path / "lengths.arrow")
    with pytest.raises(ConfigError, match="a named pipe, not a regular file"):
        read_mixture(tmp_path / "mix.yaml")
    with pytest.raises(ManifestError, match="a named pipe, not a regular file"):
        LengthIndex.open(tmp_path / "lengths.arrow")


def test_special_audio_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.wav"))
    kinds = {tmp_path / "pipe.wav": "named pipe", tmp_path / "socket.wav": "socket", "/dev/zero": "device"}
    for path, kind in kinds.items():
        for read in (load_audio, audio_seconds):
            with pytest.raises(AudioError, match=f"{path} cannot be read: a {kind}, not a regular file"):
                read(path)


def test_rows_whose_audio_is_a_pipe_are_left_out(tmp_path):
    """Special files are refused where durations are read from the audio, also in tars and in texts of a folder."""
    for name in ("pipe.wav", "a.tar"):
        os.mkfifo(tmp_path / name)
    rows = [{"audio_filepath": name, "text": "a"} for name in ("pipe.wav", "a.tar::b.wav")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ManifestError, match=r"(?s)no usable row.*named pipe.*named pipe"):
        list(open_source(tmp_path / "m.jsonl", measure_durations=True))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.wav").touch()
    os.mkfifo(tmp_path / "folder" / "a.txt")
    (found,) = read_one(tmp_path / "folder")
    assert found.reason.startswith("text missing")


def read_one(folder):
    return [row for _, row in read_media_folder(str(folder), ReadOptions()) if isinstance(row, Problem)]
