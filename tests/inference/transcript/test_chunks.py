"""Long audio in pieces: all speech is in some piece, none is longer than the window, memory is bounded."""

import tracemalloc
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from canter.inference.transcript.chunks import MIN_TRIM, SILENCE, split_audio, trim_silence
from canter.inference.transcript.vad import FRAME, RATE, USUAL_VAD, energy, loudness

MARGIN = USUAL_VAD.padding_seconds


def speech(spans: list[tuple[float, float]]) -> np.ndarray:
    """Stretches of modulated noise, (pause before, length) in seconds each, in faint noise."""
    random = np.random.default_rng(0)
    parts = []
    for pause, length in spans:
        parts.append(1e-4 * random.normal(size=round(pause * RATE)))
        parts.append(0.1 * random.normal(size=round(length * RATE)))
    return np.concatenate(parts).astype(np.float32)


def blocks(samples: np.ndarray, size: int):
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def oracle(samples: np.ndarray) -> np.ndarray:
    """A detector that knows: the faint noise is 1e-4, speech a thousand times as loud."""
    return (loudness(samples) > -50).astype(float)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0.0, 8.0), st.floats(0.3, 14.0)), min_size=1, max_size=6),
    st.sampled_from([1234, 16000, 10**7]),
    st.sampled_from([None, oracle, energy]),
)
@example([(2.0, 0.375), (8.0, 1.0)], 1234, energy)  # a piece that goes on into a long silence
@example([(7.75, 1.0), (2.0, 1.0)], 1234, oracle)  # one that begins late in what is looked at together
def test_nothing_is_lost(spans, size, detector):
    samples = speech(spans)
    pieces = list(split_audio(blocks(samples, size), detector, window=5.0, overlap=1.0))
    seen = np.zeros(len(samples), dtype=int)
    for piece in pieces:
        start = round(piece.start * RATE)
        assert len(piece.samples) <= 5.0 * RATE
        assert np.array_equal(piece.samples, samples[start : start + len(piece.samples)])
        seen[start : start + len(piece.samples)] += 1
    loud = np.abs(samples) > 0.02
    assert seen[loud].min() >= 1
    assert seen.max() <= 2
    for before, after in pairwise(pieces):
        assert max(0.0, min(before.end, after.end) - after.start) == pytest.approx(after.overlap, abs=1e-6)
        assert after.overlap <= 1.0
    place = 0
    for pause, length in spans:
        if detector is oracle and pause > SILENCE + 2 * MARGIN + 0.1:
            assert not seen[place : place + round(pause * RATE)].all()
        place += round(pause * RATE) + round(length * RATE)


def test_blocks_do_not_matter_and_pauses_are_where_it_is_cut():
    samples = speech([(1.0, 3.0), (1.5, 2.5), (20.0, 1.0), (0.0, 0.2)])
    pieces = [list(split_audio(blocks(samples, size), oracle, window=6.0)) for size in (1600, 10**7)]
    assert [(p.start, p.end) for p in pieces[0]] == [(p.start, p.end) for p in pieces[1]]
    assert all(piece.overlap == 0 for piece in pieces[0])
    assert [round(piece.start, 1) for piece in pieces[0]] == [0.7, 5.2, 27.7]
    assert [round(piece.end, 1) for piece in pieces[0]] == [4.3, 8.3, 29.2]


def test_uninterrupted_speech_is_cut_with_an_overlap():
    samples = speech([(0.0, 60.0)])
    pieces = list(split_audio(blocks(samples, 16000), energy, window=20.0, overlap=3.0))
    assert [(round(p.start, 2), round(p.end, 2), p.overlap) for p in pieces] == [
        (0.0, 20.0, 0.0),
        (17.0, 37.0, 3.0),
        (34.0, 54.0, 3.0),
        (51.0, 60.0, 3.0),
    ]


def test_a_breath_is_enough():
    samples = speech([(0.0, 17.0), (0.2, 30.0)])
    pieces = list(split_audio(blocks(samples, 16000), oracle, window=20.0))
    assert pieces[0].end == pytest.approx(17.1, abs=0.1)
    assert pieces[1].overlap == 0


def test_silence_gives_nothing():
    assert list(split_audio([np.zeros(RATE * 50, np.float32)], energy, window=5.0)) == []
    assert list(split_audio([], energy)) == []
    assert len(list(split_audio([np.zeros(RATE * 12, np.float32)], None, window=5.0, overlap=1.0))) == 3


def test_memory_is_bounded():
    """An hour in blocks: what the cutter has asked for is never far ahead of what it has given."""
    asked = 0

    def hour():
        nonlocal asked
        block = speech([(0.5, 4.5)])
        for _ in range(720):
            asked += len(block)
            yield block

    for piece in split_audio(hour(), oracle, window=30.0):
        assert asked / RATE - piece.end < 2 * 30 + 10
    assert asked == 3600 * RATE


def test_pieces_hold_their_own_samples_only():
    """An hour in one array, at a low rate: no piece keeps more than itself in memory, and what is copied to find it is
    a few windows."""
    hour = np.random.default_rng(0).normal(size=3600 * 1000).astype(np.float32)
    pieces = split_audio([hour], partial(energy, rate=1000), window=30.0, rate=1000)
    tracemalloc.start()
    try:
        for piece in pieces:
            assert piece.samples.base is None
            assert piece.samples.nbytes <= 30 * 1000 * 4
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < hour.nbytes / 8


def test_the_rate_is_the_models():
    """White noise at half the rate is cut in the same places."""
    samples = speech([(1.0, 3.0), (1.5, 2.5), (20.0, 1.0), (0.0, 0.2)])
    known = list(split_audio([samples], energy, window=6.0))
    found = list(split_audio([samples[::2]], partial(energy, rate=RATE // 2), window=6.0, rate=RATE // 2))
    assert [one.start for one in found] == pytest.approx([one.start for one in known], abs=0.1)
    assert [one.end for one in found] == pytest.approx([one.end for one in known], abs=0.1)


def test_a_quiet_voice_next_to_a_loud_one_is_speech():
    """Speech 30 dB below other speech and 20 dB above the noise is found; the noise is not speech."""
    samples = speech([(1.0, 3.0), (2.0, 3.0), (2.0, 3.0)])
    quiet = slice(round(6.0 * RATE), round(9.0 * RATE))
    random = np.random.default_rng(1)
    samples[quiet] *= 10 ** (-30 / 20)
    samples = (samples + 3e-4 * random.normal(size=len(samples))).astype(np.float32)
    found = energy(samples) > 0.5
    assert found[round(6.1 / FRAME) : round(8.9 / FRAME)].all()
    for start, end in ((0.0, 0.9), (4.1, 5.9), (9.1, 10.9)):
        assert not found[round(start / FRAME) : round(end / FRAME)].any()


def test_energy_follows_the_voice():
    samples = speech([(2.0, 1.0), (2.0, 1.0)])
    found = energy(samples) > 0.5
    expected = np.zeros(len(found), bool)
    for start in (2.0, 5.0):
        expected[round(start / FRAME) : round((start + 1) / FRAME)] = True
    assert (found != expected).mean() < 0.03


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0.0, 8.0), st.floats(0.3, 5.0)), min_size=1, max_size=3),
    st.floats(0.0, 8.0),
    st.sampled_from([oracle, energy, None]),
)
def test_audio_that_fits_the_window_loses_only_long_silence(spans, after, detector):
    """Audio without long silence is one piece, unchanged if its ends have none either."""
    samples = np.r_[speech(spans), 1e-4 * np.random.default_rng(1).normal(size=round(after * RATE))]
    samples = samples.astype(np.float32)
    pieces = trim_silence(samples, detector, window=60.0)
    kept = np.zeros(len(samples), bool)
    for piece in pieces:
        first = round(piece.start * RATE)
        assert np.array_equal(piece.samples, samples[first : first + len(piece.samples)])
        kept[first : first + len(piece.samples)] = True
        assert len(piece.voiced) in (0, -(-len(piece.samples) // round(FRAME * RATE)))
    assert kept[np.abs(samples) > 0.02].all()
    pauses = [*(pause for pause, _ in spans), after]
    if detector is None or max(pauses) < MIN_TRIM:
        assert len(pieces) == 1
        assert kept.all()
    if detector is oracle:
        for silence, edge in ((pauses[0], pieces[0].start), (after, len(samples) / RATE - pieces[-1].end)):
            if silence > MIN_TRIM + MARGIN + 0.1:
                assert edge == pytest.approx(silence - MARGIN, abs=0.1)


def test_the_end_of_the_last_piece_is_not_another_piece():
    """Audio after the last word was decoded with it; as a separate piece, even noise would pass for speech."""
    samples = speech([(0.2, 3.0), (0.5, 2.0)])
    samples = np.r_[samples, 2e-3 * np.random.default_rng(1).normal(size=round(0.5 * RATE))].astype(np.float32)
    for window in (30.0, 4.0):
        assert list(split_audio([samples], energy, window))[-1].end > 5.5
        assert len(list(split_audio([samples], energy, window))) == (1 if window == 30.0 else 2)


def test_places_of_speech_are_returned():
    (piece,) = trim_silence(speech([(6.0, 3.0)]), energy, window=30.0)
    assert piece.start == pytest.approx(6.0 - MARGIN, abs=0.05)
    places = np.flatnonzero(piece.voiced) * FRAME + piece.start
    assert (places[0], places[-1]) == pytest.approx((6.0, 9.0), abs=0.1)
    noise = 0.1 * np.random.default_rng(0).normal(size=5 * RATE)
    (piece,) = trim_silence(noise.astype(np.float32), energy, window=30.0)
    assert not len(piece.voiced)  # all may be speech: nothing is known


@pytest.mark.parametrize("level", [0.0, 1e-5, 1e-4, 1e-3])
def test_silence_and_faint_hiss_are_no_speech(level):
    hiss = (level * np.random.default_rng(0).normal(size=10 * RATE)).astype(np.float32)
    assert trim_silence(hiss, energy, window=30.0) == []
    word = hiss.copy()
    word[6 * RATE : 6 * RATE + 6000] = speech([(0.0, 0.375)])[:6000]
    (piece,) = trim_silence(word, energy, window=30.0)
    assert (piece.start, piece.end) == pytest.approx((6.0 - MARGIN, 6.375 + MARGIN), abs=0.1)
