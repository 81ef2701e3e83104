"""Channels of a recording: each is transcribed as a file with only it is, and they are merged in order of time."""

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

import canter
from canter.cli.main import main
from canter.corpus.manifest import Utterance
from canter.errors import AudioError, ConfigError
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig
from canter.inference.inputs import read_channel
from canter.inference.recording import ChunkKey, TranscribeConfig
from canter.inference.transcribe import Decoded, Tally, transcribe, transcribe_events
from canter.inference.transcript.reading import ChannelMerger, in_order_of_time
from canter.inference.transcript.segments import Segment
from canter.models.formats.checkpoint import save_model
from canter.text import train_tokenizer

from .conftest import noises, small_model

SENTENCES = ["one two three", "four five six seven", "eight nine ten", "three one two", "the end of it all"]
WINDOW = 2.0  # seconds


@pytest.fixture(scope="module")
def model():
    tokenizer = train_tokenizer(SENTENCES * 20, languages=["en"], vocab_size=40)
    found = small_model(vocabulary=tokenizer.vocab_size, seed=30)
    found.tokenizer = tokenizer
    return found


@pytest.fixture(scope="module")
def call(tmp_path_factory) -> Path:
    """A folder with a call of two people who take turns of up to 2.5 s, and each of them as a file."""
    folder = tmp_path_factory.mktemp("call")
    samples = np.zeros((16000 * 20, 2), np.float32)
    for turn, clip in enumerate(noises(5, shortest=1.0)):
        samples[turn * 64000 : turn * 64000 + len(clip), turn % 2] = clip
    soundfile.write(folder / "call.wav", samples, 16000)
    for channel in (0, 1):
        soundfile.write(folder / f"{channel}.wav", samples[:, channel], 16000)
    return folder


def heard(model, path: Path, rows: int = 8, **settings):
    config = TranscribeConfig(timestamps="word", **settings)
    engine = Engine(model, model.tokenizer.end, EngineConfig(rows=rows))
    (found,) = transcribe(engine, model.tokenizer, [Utterance(str(path), 20.0, text="", lang="en")], config=config)
    assert found.error is None
    return found


@pytest.mark.parametrize("seconds", [WINDOW, None], ids=["long", "fits the window"])
def test_each_channel_is_transcribed_as_a_file_of_its_own(model, call, seconds):
    found = heard(model, call / "call.wav", each_channel=True, chunk_seconds=seconds)
    alone = [heard(model, call / f"{channel}.wav", chunk_seconds=seconds) for channel in (0, 1)]
    for channel, one in enumerate(alone):
        part = [segment for segment in found.segments if segment.channel == channel]
        assert [(one.start, one.end, one.text, one.words) for one in part] == [
            (one.start, one.end, one.text, one.words) for one in one.segments
        ]
        assert part
    assert all(before.start <= after.start for before, after in pairwise(found.segments))
    assert [segment.channel for segment in found.segments][:2] == [0, 1]
    assert found.text == " ".join(segment.text for segment in found.segments)
    assert found.seconds == 20.0
    assert heard(model, call / "call.wav", rows=1, each_channel=True, chunk_seconds=seconds) == found


def test_recordings_with_several_channels_share_batches(model, call):
    """Mono and stereo recordings in one call give what they give by themselves."""
    paths = [call / name for name in ("call.wav", "0.wav", "call.wav", "1.wav")]
    config = TranscribeConfig(each_channel=True)
    engine = Engine(model, model.tokenizer.end, EngineConfig(rows=3))
    utterances = [Utterance(str(path), 20.0, text="", lang="en") for path in paths]
    together = transcribe(engine, model.tokenizer, utterances, config=config)
    for one, utterance in zip(together, utterances):
        assert [one] == transcribe(engine, model.tokenizer, [utterance], config=config)
    assert {segment.channel for segment in together[1].segments} == {0}
    (stated,) = transcribe(
        engine, model.tokenizer, [Utterance(str(paths[0]), 20.0, "", channel_selector=1)], config=config
    )
    assert {segment.channel for segment in stated.segments} == {1}


def test_python_takes_channels_of_files_and_arrays(model, call, tmp_path):
    whisper = canter.load(save_model(model, tmp_path / "model", model.tokenizer), device="cpu")
    samples, _ = soundfile.read(call / "call.wav", dtype="float32")
    for audio in (call / "call.wav", samples):
        each = whisper.transcribe(audio, channel="each", timestamps="word")
        assert {segment.channel for segment in each.segments} == {0, 1}
        for channel in (0, 1):
            one = whisper.transcribe(audio, channel=channel, timestamps="word")
            assert one.text == whisper.transcribe(call / f"{channel}.wav").text
            assert {segment.channel for segment in one.segments} == {None}
            assert " ".join(part.text for part in each.segments if part.channel == channel) == one.text
        assert whisper.transcribe(audio).text == whisper.transcribe(audio, channel="mix").text != each.text
        with pytest.raises(AudioError, match="has no channel 2: it has 2, counted from 0; choose one of them"):
            whisper.transcribe(audio, channel=2)
    with pytest.raises(ConfigError, match="channel is 'left'; it must be each, mix, or the number"):
        whisper.transcribe(samples, channel="left")
    row = json.loads(whisper.transcribe(call / "call.wav", channel=1).save(tmp_path / "a.jsonl").read_text())
    assert row["channel_selector"] == 1


def test_the_command_writes_one_file_with_both_channels(model, call, tmp_path, capsys):
    folder = str(save_model(model, tmp_path / "model", model.tokenizer))

    def written(name: str, *options: str) -> str:
        assert main(["transcribe", folder, str(call / "call.wav"), "-o", str(tmp_path / name), *options]) == 0
        return (tmp_path / name).read_text()

    lines = written("a.txt", "--channel", "each").splitlines()
    assert [line[:11] for line in lines[:2]] == ["[channel 0]", "[channel 1]"]
    assert "<v Channel 1>" in written("a.vtt", "--channel", "each")
    assert "[channel 1] " in written("a.srt", "--channel", "each")
    row = json.loads(written("a.jsonl", "--channel", "each"))
    assert {segment["channel"] for segment in row["segments"]} == {0, 1}
    assert "segments" not in json.loads(written("b.jsonl"))
    entry = json.loads(written("a.json", "--channel", "each"))
    assert {segment["channel"] for segment in entry["segments"]} == {0, 1}
    manifest = tmp_path / "rows.jsonl"
    rows = [{"audio_filepath": str(call / "call.wav"), "duration": 20.0}, {"channel_selector": 1}]
    rows[1] |= rows[0]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "rows-out.jsonl"
    assert main(["transcribe", folder, str(manifest), "-o", str(out), "--channel", "0"]) == 0
    first, second = [json.loads(line) for line in out.read_text().splitlines()]
    assert (first["channel_selector"], second["channel_selector"]) == (0, 1)
    assert first["pred_text"] != second["pred_text"]
    assert main(["transcribe", folder, str(call / "call.wav"), "--channel", "-1"]) != 0
    assert "channel is '-1'; it must be each, mix, or the number of a channel" in capsys.readouterr().err


def test_a_longer_recording_needs_no_more_memory(model, tmp_path):
    """Each channel is read in blocks: with three times the length, no more of it is in memory."""
    peaks = []
    for minutes in (3, 9):
        samples = np.zeros((minutes * 60 * 16000, 2), np.float32)
        for turn, clip in enumerate(noises(4)):
            samples[turn * 640_000 : turn * 640_000 + len(clip), turn % 2] = clip
        soundfile.write(tmp_path / "long.wav", samples, 16000)
        size = samples.nbytes
        del samples
        tracemalloc.start()
        try:
            found = heard(model, tmp_path / "long.wav", each_channel=True, chunk_seconds=WINDOW)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert {segment.channel for segment in found.segments} == {0, 1}
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < size / 3


def test_progress_counts_all_channels(model, call):
    tally = Tally([20.0])
    tally.add(ChunkKey(0, 0, 0.0, 20.0, part=0, parts=2))
    assert tally.decoded().seconds == 10.0
    tally.add(ChunkKey(0, 0, 10.0, 5.0, part=1, parts=2))
    assert tally.decoded().seconds == 17.5
    engine = Engine(model, model.tokenizer.end, EngineConfig(rows=1))
    utterance = Utterance(str(call / "call.wav"), 20.0, text="", lang="en")
    config = TranscribeConfig(each_channel=True, chunk_seconds=WINDOW)
    events = transcribe_events(engine, model.tokenizer, [utterance], config=config)
    seconds = [event.seconds for event in events if isinstance(event, Decoded)]
    assert seconds == sorted(seconds)
    assert seconds[-1] == 20.0


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=3), st.data())
def test_merged_segments_leave_in_order_of_time(channels, data):
    """Whichever channel is ahead, what leaves is in order, and nothing is lost."""
    parts = [
        [Segment(start, start + 1.0, f"{place}", channel=channel) for place, start in enumerate(sorted(segments))]
        for channel, segments in enumerate(channels)
    ]
    merger, left, places = ChannelMerger(len(parts)), list[Segment](), [0] * len(parts)
    while any(place <= len(part) for place, part in zip(places, parts)):
        channel = data.draw(st.sampled_from([n for n, part in enumerate(parts) if places[n] <= len(part)]))
        place = places[channel]
        places[channel] += 1
        until = parts[channel][place].start if place < len(parts[channel]) else np.inf
        left += merger.add(channel, parts[channel][max(0, place - 1) : place], until)
    assert left == in_order_of_time(segment for part in parts for segment in part)


@pytest.mark.parametrize("value", ["", "left", "1.0", "²", True, -1])
def test_channels_that_are_none(value):
    with pytest.raises(ConfigError, match="must be each, mix, or the number of a channel"):
        read_channel(value)
