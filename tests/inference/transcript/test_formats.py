"""Byte for byte what openai-whisper 20250625 wrote (its `get_writer`, default options) for the same segments."""

import html
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canter.inference.inputs import Item
from canter.inference.recording import Transcription
from canter.inference.transcript.formats import (
    SUFFIXES,
    json_text,
    render,
    render_one,
    render_segments,
    srt,
    timestamp,
    vtt,
    whisper_json,
)
from canter.inference.transcript.segments import Segment, Word

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
def test_texts_of_segments_join_to_the_text(parts, space):
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


@given(st.text(alphabet="ab&<>-\n \t", max_size=30))
def test_webvtt_is_escaped_and_never_ends_a_cue_early(text):
    """``&``, ``<`` and ``>`` are, so that no arrow and no tag is left."""
    found = vtt([Segment(0.0, 2.0, text)])
    _, *cues = found.split("\n\n")
    if not text.strip():
        assert found == "WEBVTT\n\n"
        return
    (times, body), rest = cues[0].split("\n", 1), cues[1:]
    assert rest == [""]
    assert times == "00:00.000 --> 00:02.000"
    assert not {"<", ">"} & {*body}
    assert html.unescape(body).split() == text.split()


numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(st.recursive(numbers | st.text() | st.none(), lambda one: st.lists(one) | st.dictionaries(st.text(), one)))
def test_numbers_that_are_not_finite_leave_as_null(value):
    def plain(one):
        if isinstance(one, float):
            return one if math.isfinite(one) else None
        if isinstance(one, list):
            return [plain(other) for other in one]
        return {key: plain(other) for key, other in one.items()} if isinstance(one, dict) else one

    assert json.loads(json_text(value), parse_constant=lambda name: pytest.fail(name)) == plain(value)


def test_a_row_with_a_duration_that_is_not_a_number_is_json():
    row = {"audio_filepath": "a.wav", "duration": float("nan"), "speakers": [float("inf"), 1.5]}
    (line,) = render([Item(row, None)], [Transcription("one")], "nemo")
    assert json.loads(line) == {
        "audio_filepath": "a.wav",
        "duration": None,
        "speakers": [None, 1.5],
        "pred_text": "one",
    }
    segments = [Segment(0.0, 1.0, "one", avg_logprob=float("-inf"))]
    value = json.loads(render_segments("json", "one", segments, "en"), parse_constant=pytest.fail)
    assert value["segments"][0]["avg_logprob"] is None


def test_a_detected_language_stands_in_json_and_manifest():
    item, found = (
        Item({"audio_filepath": "a.wav"}, None),
        Transcription("eins", language="de", language_probability=0.98765),
    )
    assert json.loads(render_one(item, found, "json")) | {"segments": []} == {
        "text": "eins",
        "segments": [],
        "language": "de",
        "language_probability": 0.9877,
    }
    (line,) = render([item], [found], "nemo")
    assert json.loads(line) == {
        "audio_filepath": "a.wav",
        "pred_text": "eins",
        "language": "de",
        "language_probability": 0.9877,
    }
    (line,) = render([item], [Transcription("eins", language="de")], "nemo")  # as it was stated
    assert "language" not in json.loads(line)
