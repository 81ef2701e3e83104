"""Progress grows while rows are decoded, never goes back, and ends at the sum of the durations."""

from itertools import pairwise

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from canter.cli.progress import TranscriptionProgress, clock
from canter.corpus.manifest import Utterance
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig
from canter.inference.recording import ChunkKey, TranscribeConfig
from canter.inference.transcribe import Decoded, Tally, transcribe, transcribe_events
from canter.text import train_tokenizer

from .conftest import noises, small_model


def test_pieces_count_with_the_pauses_before_them_and_overlaps_once():
    tally = Tally([100.0, 10.0])
    tally.add(ChunkKey(0, 0, 5.0, 25.0))
    assert tally.decoded().seconds == 30.0
    assert tally.decoded([(ChunkKey(0, 1, 27.0, 30.0), 0.5)]).seconds == pytest.approx(43.5)
    tally.add(ChunkKey(0, 1, 27.0, 30.0))
    assert tally.decoded([(ChunkKey(1, 0, 0.0, 10.0), 0.5)]).seconds == pytest.approx(62.0)
    tally.finish(0)
    assert tally.decoded().seconds == pytest.approx(105.0)
    tally.finish(1)
    assert tally.decoded().seconds == 110.0


def test_what_is_longer_than_stated_counts_no_more_than_that():
    tally = Tally([10.0])
    assert tally.decoded([(ChunkKey(0, 0, 0.0, 30.0), 1.0)]).seconds == 10.0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.floats(0, 1)), max_size=30))
def test_progress_never_goes_back(events):
    """Whatever rows do: they are decoded anew when a hypothesis is not believed, or fail half-way."""
    tally, seen, finished = Tally([40.0] * 3), [0.0], set[int]()
    for utterance, number, fraction in events:
        seen.append(tally.decoded([(ChunkKey(utterance, number, number * 10.0, 10.0), fraction)]).seconds)
        if fraction > 0.9 and utterance not in finished:
            finished.add(utterance)
            tally.finish(utterance)
            seen.append(tally.decoded().seconds)
    for utterance in {0, 1, 2} - finished:
        tally.finish(utterance)
    assert all(one <= other for one, other in pairwise(seen))
    assert seen[-1] <= 120.0 == tally.decoded().seconds


@pytest.fixture(scope="module")
def engine():
    tokenizer = train_tokenizer(["one two three four"] * 20, languages=["en"], vocab_size=40)
    model = small_model(vocabulary=tokenizer.vocab_size)
    return Engine(model, tokenizer.end, EngineConfig(rows=4)), tokenizer


@pytest.mark.parametrize("window", [None, 1.0])
def test_progress_between_transcriptions(engine, window, tmp_path, monkeypatch):
    """Also of one long file, of which nothing is finished before the end."""
    monkeypatch.setattr("canter.inference.engine.engine.EVENT_SECONDS", 0.0)
    clips = noises(6) if window is None else [np.concatenate(noises(6))]
    utterances = []
    for number, clip in enumerate(clips):
        soundfile.write(tmp_path / f"{number}.wav", clip, 16000)
        utterances.append(Utterance(str(tmp_path / f"{number}.wav"), len(clip) / 16000, text="", lang="en"))
    given = (*engine, utterances, np.inf, TranscribeConfig(chunk_seconds=window))
    events = list(transcribe_events(*given))
    decoded = [event.seconds for event in events if isinstance(event, Decoded)]
    total = sum(utterance.duration for utterance in utterances)
    assert decoded[-1] == pytest.approx(total)
    assert all(one <= other for one, other in pairwise(decoded))
    first = next(place for place, event in enumerate(events) if not isinstance(event, Decoded))
    before = [event.seconds for event in events[:first] if isinstance(event, Decoded)]
    assert len(set(before)) >= 3
    assert 0 < before[0] < before[-1] < total
    found = dict(event for event in events if not isinstance(event, Decoded))
    assert [found[index] for index in range(len(utterances))] == transcribe(*given)


def test_speed_and_time_left():
    shown = TranscriptionProgress("transcribing", 3, 100.0, hidden=True)
    assert shown.speed(5.0) == "RTFx 0.0"
    shown.decoded = 25.0
    assert shown.speed(5.0) == "RTFx 5.0  0:15 left"
    shown.finish(10.0, failed=True)
    assert shown.speed(5.0) == "RTFx 3.0  0:15 left  1 failed"
    assert [clock(59.6), clock(3599), clock(3600)] == ["1:00", "59:59", "1:00:00"]
