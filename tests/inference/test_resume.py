"""Results of a stopped transcription are read completely, from any number of processes, and from no other model."""

import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.corpus.manifest import Utterance
from canter.errors import ConfigError
from canter.inference.recording import Transcription
from canter.inference.resume import Partial, partial_files, read_done, remove, row_key
from canter.inference.transcript.segments import Segment, Word

ROWS = [Utterance(f"/{number}.wav", 1.5, "", lang="en") for number in range(4)]
SPOKEN = Transcription(
    "a b",
    (1, 2),
    finished=False,
    segments=(Segment(0.0, 1.5, "a b", (1, 2), (Word(0.0, 0.7, "a", 0.5), Word(0.7, 1.5, "b", 0.25)), -0.5),),
    language="en",
)


def write(path, identity, rows):
    partial = Partial(path, identity)
    for row, transcription in rows:
        partial.add(row, transcription)
    partial.close()


def test_everything_comes_back_but_failures(tmp_path):
    first = tmp_path / "out.jsonl.partial"
    write(first, {"model": "a"}, [(ROWS[0], SPOKEN), (ROWS[1], Transcription("", error="gone"))])
    write(first, {"model": "a"}, [(ROWS[2], Transcription(""))])
    assert read_done(first, {"model": "a"}) == {row_key(ROWS[0]): SPOKEN, row_key(ROWS[2]): Transcription("")}


def test_all_ranks_are_read_and_removed(tmp_path):
    first = partial_files(tmp_path / "out", folder=True)
    assert first == tmp_path / "out" / "transcripts.partial"
    for rank, row in enumerate(ROWS):
        write(first.with_name(f"{first.name}-{rank}") if rank else first, {}, [(row, SPOKEN)])
    other = first.with_name("transcripts.partial-old")
    other.write_text("mine")
    assert set(read_done(first, {})) == {row_key(row) for row in ROWS}
    remove(first)
    assert [path.name for path in first.parent.iterdir()] == ["transcripts.partial-old"]


@given(st.integers(0, 200))
def test_complete_lines_of_a_torn_file_stay(tmp_path_factory, cut):
    first = tmp_path_factory.mktemp("torn") / "p"
    write(first, {"model": "a"}, [(row, Transcription("é" * 10, (3,))) for row in ROWS])
    size = first.stat().st_size
    os.truncate(first, max(0, size - cut))
    whole = first.read_bytes().count(b"\n")
    assert len(read_done(first, {"model": "a"})) == max(0, whole - 1)
    write(first, {"model": "a"}, [(replace(ROWS[0], offset=9.0), SPOKEN)])
    assert len(read_done(first, {"model": "a"})) == max(0, whole - 1) + 1


@pytest.mark.parametrize("content", ['{"model": "b"}\n', "anything\n", '{"model": "a"}\n{"no": "text"}\n'])
def test_another_model_is_not_continued(tmp_path, content):
    (tmp_path / "p").write_text(content)
    with pytest.raises(ConfigError, match="another model or setting; remove it"):
        read_done(tmp_path / "p", {"model": "a"})


def test_rows_are_known_by_what_they_ask_for():
    row = ROWS[0]
    assert row_key(row) == row_key(replace(row, text="said", id="7", num_tokens=3))
    changes = ({"offset": 1.0}, {"lang": "de"}, {"taskname": "translate"}, {"audio_filepath": "/x.wav"})
    assert len({row_key(replace(row, **change)) for change in changes} | {row_key(row)}) == 5


def test_a_file_that_was_replaced_is_transcribed_anew(tmp_path):
    """A replaced file of the same path and even size is transcribed again, also in an archive; other sources go by
    name."""
    for name in ("a.wav", "archive.tar"):
        (tmp_path / name).write_bytes(b"one")
    for path in (str(tmp_path / "a.wav"), f"{tmp_path / 'archive.tar'}::a.wav@0+3"):
        row = Utterance(path, 1.5, "", lang="en")
        before, file = row_key(row), tmp_path / ("archive.tar" if "::" in path else "a.wav")
        assert row_key(row) == before
        stated = file.stat()
        file.write_bytes(b"two")
        os.utime(file, ns=(stated.st_atime_ns, stated.st_mtime_ns + 1))
        later = row_key(row)
        assert later != before
        file.write_bytes(b"three")
        os.utime(file, ns=(stated.st_atime_ns, stated.st_mtime_ns + 1))
        assert row_key(row) not in (before, later)
    assert row_key(replace(ROWS[0], audio_filepath="https://x/a.wav")) == row_key(
        replace(ROWS[0], audio_filepath="https://x/a.wav")
    )


def test_the_key_is_that_of_the_file_that_was_read(tmp_path):
    """Replaced while it was transcribed, it is transcribed anew."""
    (tmp_path / "a.wav").write_bytes(b"one")
    row = Utterance(str(tmp_path / "a.wav"), 1.5, "", lang="en")
    first, key = tmp_path / "out.jsonl.partial", row_key(row)
    partial = Partial(first, {})
    (tmp_path / "a.wav").write_bytes(b"another")
    partial.add(row, SPOKEN, key)
    partial.close()
    assert row_key(row) not in read_done(first, {})


def test_what_is_kept_is_json(tmp_path):
    first = tmp_path / "out.jsonl.partial"
    odd = replace(SPOKEN, segments=(Segment(0.0, 1.5, "a", avg_logprob=float("-inf")),), language_probability=0.5)
    write(first, {}, [(ROWS[0], odd)])
    for line in first.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert read_done(first, {})[row_key(ROWS[0])].language_probability == 0.5
