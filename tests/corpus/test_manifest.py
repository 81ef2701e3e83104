"""NeMo manifests: accepted rows, refused rows, and the messages about them."""

import contextlib
import gzip
import itertools
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.corpus.manifest import (
    Problem,
    Utterance,
    checked_rows,
    count_problems,
    expand_shards,
    read_manifest,
    scan_lines,
    utterance_from_line,
    utterance_from_row,
    without_sub,
    write_manifest,
)
from canter.errors import ManifestError

GOOD = {"audio_filepath": "a.wav", "duration": 1.5, "text": "hello"}


def lines(path, *rows):
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


def test_paths_are_relative_to_the_manifest(tmp_path):
    rows = [GOOD, {**GOOD, "audio_filepath": "/abs/b.wav"}, {**GOOD, "audio_filepath": "s3://bucket/c.wav"}]
    found = list(read_manifest(lines(tmp_path / "m.jsonl", *rows)))
    assert [one.audio_filepath for one in found] == [f"{tmp_path}/a.wav", "/abs/b.wav", "s3://bucket/c.wav"]


def test_every_field_is_read(tmp_path):
    row = GOOD | {
        "offset": 2, "lang": "en", "source_lang": "en", "target_lang": "de", "taskname": "s2t", "pnc": True,
        "num_tokens": 9, "id": 7, "channel_selector": 1, "speaker": "ignored",
    }  # fmt: skip
    (found,) = read_manifest(lines(tmp_path / "m.jsonl", row))
    assert found == Utterance(
        f"{tmp_path}/a.wav", 1.5, "hello", 2.0, "en", "en", "de", "s2t", "yes", num_tokens=9, id="7", channel_selector=1
    )


def test_skipme_is_passed_over_in_silence(tmp_path):
    found = list(read_manifest(lines(tmp_path / "m.jsonl", {**GOOD, "_skipme": True}, GOOD)))
    assert len(found) == 1


HALF = "half a surrogate pair, which is no character"
BAD = [
    (b"{", "invalid JSON"),
    (b"[" * 100_000, "invalid JSON"),
    (b"1" * 5000, "invalid JSON"),
    (b'{"text": "\xff"}', "invalid UTF-8"),
    (b"[1]", "not a JSON object"),
    (b'"text"', "invalid row"),
    ({"duration": 1, "text": "x"}, "audio_filepath missing"),
    ({**GOOD, "audio_filepath": 3}, "audio_filepath is not a string"),
    ({**GOOD, "audio_filepath": ""}, "audio_filepath is not a path"),
    ({**GOOD, "audio_filepath": "a\0b"}, "audio_filepath is not a path"),
    ({"audio_filepath": "a.wav", "text": "x"}, "duration missing"),
    ({**GOOD, "duration": -1}, "duration is negative"),
    ({**GOOD, "duration": 0}, "duration is zero"),
    ({**GOOD, "duration": float("nan")}, "duration is not finite"),
    ({**GOOD, "duration": float("inf")}, "duration is not finite"),
    ({**GOOD, "duration": 10**400}, "duration is too large for seconds"),
    ({**GOOD, "duration": "1.5"}, "duration is not a number"),
    ({**GOOD, "duration": True}, "duration is not a number"),
    ({**GOOD, "offset": -0.5}, "offset is negative"),
    ({**GOOD, "channel_selector": [0, 1]}, "channel_selector is not the number of one channel"),
    ({**GOOD, "text": None}, "text missing"),
    ({**GOOD, "text": "  "}, "text is empty"),
    ({**GOOD, "text": ["x"]}, "text is not a string"),
    (b'{"audio_filepath": "a", "duration": 1, "text": "\\ud800"}', HALF),
    ({**GOOD, "num_tokens": 0}, "num_tokens is not a positive whole number"),
    ({**GOOD, "num_tokens": 2.5}, "num_tokens is not a positive whole number"),
    ({**GOOD, "lang": 5}, "lang is not a string"),
    ({**GOOD, "id": {}}, "id is not a string"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "kind"), BAD, ids=[f"{number}-{kind}" for number, (_, kind) in enumerate(BAD)])
def test_a_bad_row_is_listed_with_file_and_line(tmp_path, row, kind):
    path = lines(tmp_path / "m.jsonl", GOOD, b"", row, {**GOOD, "text": "other"})
    first, problem, last = read_manifest(path)
    assert isinstance(first, Utterance)
    assert isinstance(last, Utterance)
    assert isinstance(problem, Problem)
    assert (problem.file, problem.line, problem.kind) == (str(path), 3, kind)
    assert len(problem.reason) < 200


def test_duplicates_are_listed(tmp_path):
    named = {**GOOD, "id": "a"}
    others = [{**named, "audio_filepath": "b.wav"}, {**named, "offset": 1}, {**named, "duration": 2}]
    rows = [named, named, GOOD, GOOD, {**GOOD, "target_lang": "de"}, {**GOOD, "channel_selector": 1}, *others]
    found = list(read_manifest(lines(tmp_path / "m.jsonl", *rows)))
    assert [one.line for one in found if isinstance(one, Problem)] == [2, 4]
    assert count_problems(one for one in found if isinstance(one, Problem)) == {"duplicate": 2}


def test_no_usable_row_is_an_error_that_says_why(tmp_path):
    path = lines(tmp_path / "m.jsonl", b"{", {**GOOD, "duration": -3})
    with pytest.raises(ManifestError, match=r"no usable row:\n.*m\.jsonl:1: invalid JSON.*\n.*:2: duration is neg"):
        list(read_manifest(path))
    with pytest.raises(ManifestError, match="it is empty"):
        list(read_manifest(lines(tmp_path / "empty.jsonl")))


def test_missing_and_unreadable_manifests(tmp_path):
    with pytest.raises(ManifestError, match="does not exist"):
        list(read_manifest(tmp_path / "none.jsonl"))
    with pytest.raises(ManifestError, match="is a folder"):
        list(read_manifest(tmp_path))


def test_gzip_and_torn_gzip(tmp_path):
    path = tmp_path / "m.jsonl.gz"
    rows = [{**GOOD, "text": f"{number} {number**9}"} for number in range(2000)]
    whole = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    path.write_bytes(whole)
    assert len(list(read_manifest(path))) == 2000
    path.write_bytes(whole[: len(whole) // 2])
    found = list(read_manifest(path))
    assert isinstance(found[-1], Problem)
    assert found[-1].kind == "invalid gzip"
    assert found[-1].line == len(found)
    path.write_bytes(b"not gzip")
    with pytest.raises(ManifestError, match="invalid gzip"):
        list(read_manifest(path))


def test_text_may_be_missing_where_it_is_to_be_found_out(tmp_path):
    path = lines(tmp_path / "m.jsonl", {"audio_filepath": "a.wav", "duration": 1})
    (found,) = read_manifest(path, require_text=False)
    assert found.text == ""


def test_a_byte_order_mark_and_crlf_are_no_problem(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert len(list(read_manifest(path))) == 1


def test_written_manifests_read_back(tmp_path):
    given = [
        Utterance("/x/a.wav", 1.25, "Grüße\u2028 \U0001f40e"),
        Utterance("/x/b.wav", 2.0, "b", 0.5, lang="de", id="7"),
        Utterance("/x/b.wav", 2.0, "b", 0.0, channel_selector=0),
    ]
    assert write_manifest(tmp_path / "m.jsonl", given) == 3
    assert list(read_manifest(tmp_path / "m.jsonl")) == given
    with pytest.raises(TypeError):
        write_manifest(tmp_path / "m.jsonl", [{"text": object()}])
    assert list(read_manifest(tmp_path / "m.jsonl")) == given, "a failed write must leave the old file"
    assert len(list(tmp_path.iterdir())) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "audio_filepath",
    "duration",
    "text",
    "offset",
    "lang",
    "pnc",
    "num_tokens",
    "id",
    "_skipme",
    "channel_selector",
    "answer",
    "source_lang",
    "target_lang",
    "taskname",
    "file_name",
    "sentence",
    "language",
]


@given(st.binary(max_size=200))
def test_no_bytes_raise(line):
    assert isinstance(utterance_from_line(line, "/base"), (Utterance, str, type(None)))


@given(st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_no_json_raises_and_what_is_taken_is_sound(row):
    found = utterance_from_row(row, "/base")
    if isinstance(found, Utterance):
        assert 0 < found.duration < 1e7
        assert found.offset is None or found.offset >= 0
        assert found.text.strip()
        assert found.audio_filepath.startswith("/") or "://" in found.audio_filepath
        assert isinstance(found.identity, int)
    else:
        assert found is None or 0 < len(found) < 300


@given(st.lists(st.binary(max_size=30), max_size=20), st.integers(0, 600), st.integers(0, 600))
def test_ranges_cut_at_lines_see_every_line_once(tmp_path_factory, chunks, first, second):
    path = tmp_path_factory.mktemp("scan") / "f"
    path.write_bytes(b"\n".join(chunks))
    with open(path, "rb") as file:
        whole = [(place, line) for place, _, line in scan_lines(file)]
        assert b"".join(line for _, line in whole) == path.read_bytes()
        starts = [place for place, _ in whole] + [path.stat().st_size]
        cuts = sorted(
            {0, *(min(s for s in starts if s >= min(cut, starts[-1])) for cut in (first, second)), starts[-1]}
        )
        parts = []
        for start, end in itertools.pairwise(cuts):
            file.seek(0)
            parts += [(place, line) for place, _, line in scan_lines(file, start, end)]
    assert parts == whole


@given(st.lists(st.sampled_from(["a", "b", None, "why"]), max_size=12))
def test_usable_yields_each_utterance_once(kinds):
    rows = [Utterance("/" + kind, 1.0, "x") if kind in ("a", "b") else kind for kind in kinds]
    distinct = len({kind for kind in kinds if kind in ("a", "b")})
    found = []
    try:
        for row in checked_rows(enumerate(rows, 1), "f"):
            found.append(row)
    except ManifestError:
        assert distinct == 0
    assert sum(isinstance(row, Utterance) for _, row in found) == distinct
    assert len(found) == len([kind for kind in kinds if kind])


def test_shard_patterns():
    assert expand_shards("a__OP_0..2_CL_.tar") == ["a_0.tar", "a_1.tar", "a_2.tar"]
    assert expand_shards("x/{08..11}.tar") == ["x/08.tar", "x/09.tar", "x/10.tar", "x/11.tar"]
    assert expand_shards("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
    assert expand_shards("plain{x}.tar") == ["plain{x}.tar"]
    with pytest.raises(ManifestError, match="counts down"):
        expand_shards("{3..1}")
    with pytest.raises(ManifestError, match="more than a million"):
        expand_shards("{0..99999999}")


@given(st.text(string.ascii_letters + "_{}.0123456789", max_size=20))
def test_shard_patterns_never_fail_otherwise(pattern):
    with contextlib.suppress(ManifestError):
        assert expand_shards(pattern)


def test_nemo_sub_names():
    assert without_sub("d/a-sub12.wav") == "d/a.wav"
    assert without_sub("a-sub1") == "a"
    assert without_sub("a-subtle.wav") == "a-subtle.wav"
