"""Byte for byte what openai-whisper 20250625 wrote (its `get_writer`, default options) for the same segments."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.inference.formats import SUFFIXES, render_segments, srt, timestamp, whisper_json
from canter.inference.segments import Segment, Word

GOLDEN = Path(__file__).parent / "golden_formats"


def read(name: str) -> tuple[str, list[Segment]]:
    """The text and segments behind a golden file."""
    result = json.loads((GOLDEN / f"{name}.json").read_text())
    segments = [
        Segment(
            value["start"],
            value["end"],
            value["text"].strip(),
            tuple(value["tokens"]),
            tuple(
                Word(word["start"], word["end"], word["word"].strip(), word["probability"])
                for word in value.get("words", ())
            ),
            value["avg_logprob"],
            value["temperature"],
            value["no_speech_prob"],
        )
        for value in result["segments"]
    ]
    return result["text"], segments


@pytest.mark.parametrize("kind", [kind for kind in SUFFIXES if kind != "nemo"])
@pytest.mark.parametrize("name", ["plain", "words", "silence"])
def test_as_whisper_writes_it(name, kind):
    text, segments = read(name)
    expected = (GOLDEN / f"{name}.{kind}").read_bytes()
    if kind == "vtt":  # Whisper escapes nothing
        expected = expected.replace(b"of -> the", b"of --&gt; the")
    assert render_segments(kind, text, segments, "en").encode() == expected


@given(st.floats(0, 1e6), st.booleans())
def test_timestamps_are_milliseconds(seconds, hours):
    shown = timestamp(seconds, hours=hours)
    front, _, fraction = shown.rpartition(".")
    parts = [int(part) for part in front.split(":")]
    assert parts[-1] < 60
    assert parts[-2] < 60
    total = sum(part * 60**place for place, part in enumerate(reversed(parts))) * 1000 + int(fraction)
    assert total == round(seconds * 1000)
    assert (len(parts) == 3) == (hours or total >= 3_600_000)


@given(st.lists(st.sampled_from(["a", "b c", "今日", "a b"]), max_size=6), st.sampled_from([" ", ""]))
def test_texts_of_segments_join_to_the_whole(parts, space):
    text = space.join(parts)
    value = whisper_json(text, [Segment(0.0, 1.0, part) for part in parts], None)
    assert "".join(segment["text"] for segment in value["segments"]) == text


def test_every_word_begins_with_a_space_as_whisper_has_it():
    words = (Word(0.0, 0.5, "One", 1.0), Word(0.5, 1.0, "two.", 1.0))
    value = whisper_json("One two. One two.", [Segment(0.0, 1.0, "One two.", words=words)] * 2, None)
    assert [[word["word"] for word in one["words"]] for one in value["segments"]] == [[" One", " two."]] * 2
    assert [one["text"] for one in value["segments"]] == ["One two.", " One two."]
    words = (Word(0.0, 0.5, "今", 1.0), Word(0.5, 1.0, "日", 1.0))
    (segment,) = whisper_json("今日", [Segment(0.0, 1.0, "今日", words=words)], None)["segments"]
    assert [word["word"] for word in segment["words"]] == ["今", "日"]


def test_an_arrow_in_a_word_does_not_break_the_cue():
    words = (Word(0.0, 0.5, "a", 1.0), Word(0.5, 1.0, "-->", 1.0))
    assert srt([Segment(0.0, 2.0, "a -->", words=words)]) == "1\n00:00:00,000 --> 00:00:01,000\na ->\n\n"
