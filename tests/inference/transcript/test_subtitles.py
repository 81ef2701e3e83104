"""Cues hold every word once and in order, keep to the limits, and end where sentences end."""

import html
import json
import os
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from canter.errors import ConfigError
from canter.inference.recognizer import Transcript
from canter.inference.transcript.formats import render_segments, srt, vtt
from canter.inference.transcript.segments import Segment, Word
from canter.inference.transcript.subtitles import LINES, LONGEST_CUE, SENTENCES, WHISPER, WIDTH, SubtitleStyle, cues_of

SHAPED = json.loads((Path(__file__).parent / "golden_formats" / "shaped.json").read_text())
KINDS = ("sentence", "whisper")


def spoken(text: str, start: float = 0.0, seconds: float = 0.3) -> Segment:
    """Return a segment of consecutive words, each of the given length in seconds."""
    texts = text.split()
    words = [Word(start + n * seconds, start + (n + 1) * seconds, word, 1.0) for n, word in enumerate(texts)]
    return Segment(start, start + len(texts) * seconds, text, words=tuple(words))


@st.composite
def segments(draw, timed: bool = True) -> list[Segment]:
    """Speech with pauses, words that share a time and words too long for a line, with or without times of words."""
    found, time = [], draw(st.sampled_from([0.0, 3.25]))
    for _ in range(draw(st.integers(1, 4))):
        start, words = time, []
        count = draw(st.integers(1, 25))
        texts = draw(
            st.lists(
                st.sampled_from(["a", "one", "Three", "hundreds,", "So.", "Yes!", "Mr.", "x" * 50, "&", "<b>"]),
                min_size=count,
                max_size=count,
            )
        )
        gaps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.1, 0.4, 1.2, 4.0]), min_size=count, max_size=count))
        for text, gap in zip(texts, gaps):
            begin = time + draw(st.sampled_from([0.0, 0.0, 0.2, 2.0]))
            time = begin + gap
            words.append(Word(round(begin, 3), round(time, 3), text, 1.0))
        found.append(Segment(start, round(time, 3), " ".join(texts), words=tuple(words) if timed else ()))
    return found


limits = st.builds(
    SubtitleStyle,
    cues=st.sampled_from(KINDS),
    max_line_width=st.sampled_from([None, 5, 20, 42]),
    max_line_count=st.sampled_from([None, 1, 2, 3]),
    max_words_per_line=st.sampled_from([None, 1, 3]),
)


def said(found: list[Segment]) -> list[str]:
    return [word for segment in found for word in segment.text.split()]


@given(segments() | segments(timed=False), limits)
def test_every_word_once_and_in_order(found, style):
    cues = cues_of(found, style)
    assert [word for cue in cues for word in "".join(cue.words).split()] == said(found)


@given(segments() | segments(timed=False), limits.filter(lambda style: style.by_sentence))
def test_cues_never_overlap_and_are_seen(found, style):
    cues = cues_of(found, style)
    assert all(one.start < one.end for one in cues)
    assert all(one.end <= other.start for one, other in pairwise(cues))


@given(segments(), limits)
def test_limits_hold_wherever_words_allow(found, style):
    if style.by_sentence:
        width, count = style.max_line_width or WIDTH, style.max_line_count or LINES
    else:
        width, count = style.max_line_width or 1000, (style.max_line_width and style.max_line_count) or 1000
    for cue in cues_of(found, style):
        lines = "".join(cue.words).split("\n")
        assert len(lines) <= count
        assert all(len(line) <= width or " " not in line for line in lines)
        if style.max_words_per_line and (style.by_sentence or style.max_line_count is None):
            assert all(len(line.split()) <= style.max_words_per_line for line in lines)
        if style.by_sentence and len(cue.words) > 1:
            assert cue.end - cue.start <= LONGEST_CUE + 1e-6


@given(segments(), limits)
def test_highlighting_marks_every_word_once(found, style):
    marked = SubtitleStyle(style.cues, style.max_line_width, style.max_line_count, style.max_words_per_line, True)
    cues = [cue for cue in cues_of(found, marked) if cue.underlined is not None]
    assert [cue.words[cue.underlined].strip() for cue in cues] == said(found)
    assert {"".join(cue.words) for cue in cues} == {"".join(cue.words) for cue in cues_of(found, style)}


@pytest.mark.parametrize("case", SHAPED["cases"], ids=lambda case: "-".join(map(str, case["options"].values())))
def test_shaped_as_whisper_shapes_them(case):
    """Byte for byte what openai-whisper 20250625 wrote with these options for whisper-tiny.en's words."""
    found = [
        Segment(
            value["start"],
            value["end"],
            value["text"].strip(),
            words=tuple(
                Word(word["start"], word["end"], word["word"].strip(), word["probability"]) for word in value["words"]
            ),
        )
        for value in SHAPED["segments"]
    ]
    style = SubtitleStyle("whisper", **case["options"])
    assert render_segments("srt", "", found, None, style) == case["srt"]
    assert html.unescape(render_segments("vtt", "", found, None, style)) == case["vtt"]


def lines_of(found: list[Segment], style: SubtitleStyle | None = None) -> list[str]:
    return ["".join(cue.words) for cue in cues_of(found, style or SubtitleStyle())]


def test_cues_end_where_sentences_end():
    text = "The door was open. She looked in, and nobody was there at all. Dr. Smith had left."
    assert lines_of([spoken(text)]) == [
        "The door was open.",
        "She looked in,\nand nobody was there at all.",
        "Dr. Smith had left.",
    ]


def test_a_sentence_across_two_segments_is_one_cue():
    found = [spoken("He opened the"), spoken("door. She went out.", 0.9)]
    assert lines_of(found) == ["He opened the door.", "She went out."]


def test_long_sentences_part_at_commas_into_even_lines():
    text = (
        "When the rain came down on the roof of the old house, everyone who had been in the garden ran inside, "
        "laughing and shaking the water from their coats."
    )
    assert lines_of([spoken(text)]) == [
        "When the rain came down\non the roof of the old house,",
        "everyone who had been\nin the garden ran inside,",
        "laughing and shaking\nthe water from their coats.",
    ]


def test_short_sentences_share_a_cue_and_a_pause_parts_them():
    assert lines_of([spoken("Yes. No. I do not know.")]) == ["Yes. No. I do not know."]
    assert lines_of([spoken("Yes."), spoken("No.", 2.0)]) == ["Yes.", "No."]


def test_a_short_cue_stays_for_a_second_where_there_is_room():
    first, second = cues_of([spoken("Yes."), spoken("No.", 1.4)])
    assert (first.start, first.end) == (0.0, 1.0)
    assert (second.start, second.end) == (1.4, 2.4)


def test_a_pause_that_an_alignment_gives_to_a_word_is_not_in_the_cue():
    words = (Word(0.0, 0.5, "So", 1.0), Word(0.5, 9.0, "then.", 1.0), Word(9.0, 10.0, "Go.", 1.0))
    found = cues_of([Segment(0.0, 10.0, "So then. Go.", words=words)])
    assert [(cue.start, round(cue.end, 3)) for cue in found] == [(0.0, 1.9), (9.0, 10.0)]


def test_without_times_of_words_a_segment_is_divided_by_its_characters():
    found = cues_of([Segment(10.0, 22.0, "One two three. Four five six. Seven.")])
    assert [(round(cue.start, 1), round(cue.end, 1)) for cue in found] == [(10.0, 14.9), (14.9, 19.7), (19.7, 22.0)]
    assert ["".join(cue.words) for cue in found] == ["One two three.", "Four five six.", "Seven."]


def test_scripts_without_spaces_take_two_columns_a_character():
    text = "今日はとても良い天気ですので散歩に行きましょう。明日は雨が降るかもしれませんね。"
    found = lines_of([Segment(0.0, 8.0, text)])
    assert "".join(found).replace("\n", "") == text
    assert [cue.endswith("。") for cue in found] == [True, True]
    assert all(len(line) <= WIDTH // 2 for cue in found for line in cue.split("\n"))


def test_text_without_words_is_kept():
    """Words without times occur if an alignment ends before the text does."""
    segment = Segment(0.0, 2.0, "one two three", words=(Word(0.0, 0.5, "one", 1.0),))
    for kind in KINDS:
        assert "".join(lines_of([segment], SubtitleStyle(kind))).split() == ["one", "two", "three"]


def test_webvtt_is_escaped_and_blank_lines_end_no_cue():
    segment = spoken("A&B <i> x --> y")
    text = vtt([segment], SubtitleStyle())
    assert text.splitlines()[3] == "A&amp;B &lt;i&gt; x --&gt; y"
    marked = vtt([segment], SubtitleStyle("sentence", highlight_words=True))
    assert "<u>A&amp;B</u> &lt;i&gt; x --&gt; y" in marked
    assert "A&amp;B <u>&lt;i&gt;</u> x --&gt; y" in marked
    assert srt([segment]).splitlines()[2] == "A&B <i> x -> y"
    assert srt([Segment(0.0, 1.0, "a\n\n b")]).splitlines()[2:4] == ["a", " b"]


@pytest.mark.parametrize("name", ["max_line_width", "max_line_count", "max_words_per_line"])
def test_limits_are_at_least_one(name):
    with pytest.raises(ConfigError, match=rf"{name.replace('_', ' ')} 0: at least 1"):
        SubtitleStyle(**{name: 0})


def test_which_cues_options_ask_for():
    assert SubtitleStyle().by_sentence
    assert not SubtitleStyle(max_line_width=30).by_sentence
    assert SubtitleStyle("sentence", max_line_width=30).by_sentence
    assert SubtitleStyle("sentence", highlight_words=True).needs_words
    assert not SubtitleStyle("sentence", max_line_width=30).needs_words
    assert SubtitleStyle(max_line_count=1).ignored
    assert not SubtitleStyle(max_line_count=1, max_line_width=42).ignored
    assert not SubtitleStyle("sentence", max_line_count=1).ignored


def test_one_transcript_is_written_in_the_format_of_its_suffix(tmp_path):
    result = Transcript("Yes. No.", (spoken("Yes. No."),), "en", 3.0)
    result.save(tmp_path / "a.srt")
    assert (tmp_path / "a.srt").read_text() == "1\n00:00:00,000 --> 00:00:01,000\nYes. No.\n\n"
    result.save(tmp_path / "a.vtt", max_words_per_line=1)
    assert (tmp_path / "a.vtt").read_text().count("-->") == 2
    result.save(tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["segments"][0]["words"][0]["word"] == " Yes."
    Transcript("Hello.", (), "en", 3.0).save(tmp_path / "c.srt")
    assert "00:00:00,000 --> 00:00:03,000\nHello." in (tmp_path / "c.srt").read_text()
    for name in ("a.mp3", "a"):
        with pytest.raises(ConfigError, match="the suffix is none of"):
            result.save(tmp_path / name)
    untimed = Transcript("Yes.", (Segment(0.0, 1.0, "Yes."),), "en", 3.0)
    with pytest.raises(ConfigError, match="timestamps='word'"):
        untimed.save(tmp_path / "a.srt", highlight_words=True)
    assert re.search("No", (tmp_path / "a.srt").read_text())


@pytest.mark.skipif("CANTER_SHARED" not in os.environ, reason="CANTER_SHARED names no folder with a Whisper model")
def test_subtitles_of_real_speech(tmp_path, capsys):
    """Two clips of LibriVox with a second between them: every sentence is a cue that stands where it is spoken."""
    from canter.cli.main import main
    from canter.corpus.audio import load_audio
    from canter.corpus.manifest import Utterance, read_manifest

    shared = Path(os.environ["CANTER_SHARED"])
    rows = [
        row
        for row in read_manifest(shared / "data" / "speech" / "librivox_mini" / "manifest.jsonl")
        if isinstance(row, Utterance) and row.text.startswith(("stuff it into you", "he could wait no longer"))
    ]
    first, second = (load_audio(row.audio_filepath) for row in rows[1::-1])
    parts = [first, np.zeros(16000, np.float32), second]
    soundfile.write(tmp_path / "talk.flac", np.concatenate(parts), 16000)
    model = str(shared / "models" / "whisper-tiny.en")
    assert main(["transcribe", model, str(tmp_path / "talk.flac"), "--format", "srt"]) == 0
    cues = capsys.readouterr().out.strip().split("\n\n")
    texts = [" ".join(cue.splitlines()[2:]) for cue in cues]
    assert texts == ["He could wait no longer.", "Stuff it into you, his belly counseled him."]
    start, end = (float(time[-6:].replace(",", ".")) for time in cues[1].splitlines()[1].split(" --> "))
    begins = len(first) / 16000 + 1
    assert begins - 0.5 < start < begins + 0.7
    assert begins + len(second) / 16000 - 0.7 < end < begins + len(second) / 16000 + 0.5


def test_cues_have_the_words_of_one_channel():
    """Two people who speak at the same time, in cues that both begin when they do."""
    segments = [
        Segment(0.0, 4.0, "One two three. Four five.", channel=0),
        Segment(1.0, 5.0, "Six seven. Eight.", channel=1),
        Segment(6.0, 7.0, "Nine.", channel=0),
    ]
    for style in (SENTENCES, WHISPER):
        cues = cues_of(segments, style)
        assert [cue.start for cue in cues] == sorted(cue.start for cue in cues)
        for channel in (0, 1):
            own = [replace(one, channel=None) for one in segments if one.channel == channel]
            assert [replace(cue, channel=None) for cue in cues if cue.channel == channel] == cues_of(own, style)
