"""Result manifests, well and badly formed."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.errors import ManifestError
from canter.evaluation.transcripts import read_transcripts

values = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=2))
fields = st.sampled_from(["text", "pred_text", "lang", "target_lang", "id", "audio_filepath", "offset", "_skipme"])


@given(rows=st.lists(st.one_of(st.dictionaries(fields, values), values), max_size=8), garbage=st.binary(max_size=20))
def test_every_row_is_used_or_named(tmp_path_factory, rows, garbage):
    path = tmp_path_factory.mktemp("results") / "result.jsonl"
    lines = [json.dumps(row).encode() for row in rows] + [garbage.replace(b"\n", b"")]
    path.write_bytes(b"\n".join(lines))
    transcripts, problems = read_transcripts(path)
    lines_seen = sorted([row.line for row in transcripts] + [problem.line for problem in problems])
    skipped = [number for number, row in enumerate(rows, 1) if isinstance(row, dict) and row.get("_skipme")]
    blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
    assert sorted([*lines_seen, *skipped, *blank]) == list(range(1, len(lines) + 1))
    for row in transcripts:
        assert (row.text, row.pred_text) == (rows[row.line - 1]["text"], rows[row.line - 1]["pred_text"])


def test_fields_and_reasons(tmp_path: Path):
    path = tmp_path / "result.jsonl"
    path.write_text(
        '{"audio_filepath": "a.wav", "offset": 2.5, "text": "a", "pred_text": "", "lang": "en"}\n'
        '{"text": "a", "pred_text": "b", "lang": "en", "target_lang": "de"}\n'
        '{"text": "a", "pred_text": "b", "source_lang": "es"}\n'
        '{"text": "a"}\n{"pred_text": "a"}\n{"text": "a", "pred_text": 3}\n[1]\n{"text": \n'
    )
    transcripts, problems = read_transcripts(path)
    assert [(row.name, row.lang) for row in transcripts] == [
        ("a.wav @ 2.5 s", "en"),
        ("line 2", "de"),
        ("line 3", "es"),
    ]
    assert [str(problem).removeprefix(f"{path}:") for problem in problems][:4] == [
        "4: pred_text missing",
        "5: text missing",
        "6: pred_text is not a string: 3",
        "7: not a JSON object",
    ]
    assert problems[4].line == 8
    with pytest.raises(ManifestError, match="does not exist"):
        read_transcripts(tmp_path / "none.jsonl")


def test_a_torn_gzip_is_named_and_what_came_before_is_kept(tmp_path: Path):
    path = tmp_path / "result.jsonl.gz"
    rows = "".join(json.dumps({"text": f"{n * 7919 % 1000}", "pred_text": f"{n}"}) + "\n" for n in range(20_000))
    whole = gzip.compress(rows.encode())
    path.write_bytes(whole[: len(whole) // 2])
    transcripts, problems = read_transcripts(path)
    assert len(transcripts) > 100
    assert "invalid gzip" in problems[-1].reason
