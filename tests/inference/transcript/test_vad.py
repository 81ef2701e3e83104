"""Options of voice activity detection: what each of them changes, for both detectors, and what the defaults give."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from canter.errors import ConfigError
from canter.inference.recording import TranscribeConfig
from canter.inference.transcript.chunks import Chunk, split_audio, trim_silence
from canter.inference.transcript.vad import FRAME, RATE, USUAL_VAD, VadOptions, energy, loudness, silero

CLIPS = Path(__file__).parents[2] / "docs" / "clips"
PAUSES = (0.4, 6.5, 1.0, 2.0, 7.0, 3.5)  # seconds after each clip


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """Three clips of speech, twice, after 3 s of silence and with PAUSES between them."""
    clips = [soundfile.read(path, dtype="float32")[0] for path in sorted(CLIPS.glob("*.flac"))]
    parts = [np.zeros(3 * RATE, np.float32)]
    for clip, pause in zip(clips * 2, PAUSES):
        parts += [clip, np.zeros(round(pause * RATE), np.float32)]
    return np.concatenate(parts)


@pytest.fixture(params=[energy, silero], ids=["energy", "silero"])
def detector(request):
    if request.param is silero:
        pytest.importorskip("silero_vad", reason="the extra 'vad' is not installed")
    return request.param


def frames(chunks) -> list[tuple[int, int, int]]:
    """First and last frame of each chunk, and its number of frames with speech."""
    return [(round(one.start / FRAME), round(one.end / FRAME), int(one.voiced.sum())) for one in chunks]


def test_the_defaults_give_the_chunks_that_they_gave_before_there_were_options(speech, detector):
    """The numbers are those of the version without options."""
    split, trimmed = {
        "energy": (
            [(133, 494, 316), (784, 984, 170), (999, 1268, 162), (1268, 1665, 154), (1755, 1955, 170)],
            [(133, 494, 316), (784, 1440, 486), (1755, 1955, 170)],
        ),
        "silero": (
            [(136, 484, 255), (801, 1187, 270), (1272, 1669, 125), (1762, 1939, 139)],
            [(136, 484, 255), (801, 1431, 393), (1772, 1939, 137)],
        ),
    }[detector.__name__]
    for options in ((), (RATE, VadOptions()), (RATE, VadOptions(0.5, 0.0, None, 0.3))):
        found = list(split_audio([speech], detector, 8.0, 3.0, *options))
        assert frames(found) == split
        for one in found:
            first = round(one.start * RATE)
            assert np.array_equal(one.samples, speech[first : first + len(one.samples)])
        assert frames(trim_silence(speech, detector, 60.0, *options)) == trimmed


def test_shorter_silence_is_left_out_on_request(speech, detector):
    usual = trim_silence(speech, detector, 60.0)
    found = trim_silence(speech, detector, 60.0, options=VadOptions(min_silence_seconds=0.9))
    assert len(found) > len(usual)
    assert sum(one.seconds for one in found) < sum(one.seconds for one in usual)
    (all_of_it,) = trim_silence(speech, detector, 60.0, options=VadOptions(min_silence_seconds=20.0))
    assert all_of_it.seconds == len(speech) / RATE


def test_padding_is_kept_around_speech(speech, detector):
    narrow, wide = (
        trim_silence(speech, detector, 60.0, options=VadOptions(padding_seconds=seconds)) for seconds in (0.0, 0.5)
    )
    assert wide[0].start == pytest.approx(narrow[0].start - 0.5, abs=0.03)
    assert wide[0].end == pytest.approx(narrow[0].end + 0.5, abs=0.03)


def test_a_higher_threshold_finds_less(speech, detector):
    noisy = (speech + 1e-3 * np.random.default_rng(0).normal(size=len(speech))).astype(np.float32)
    counts = [
        sum(one.voiced.sum() for one in trim_silence(noisy, detector, 60.0, options=VadOptions(threshold=threshold)))
        for threshold in (0.1, 0.5, 0.9)
    ]
    assert counts[0] > counts[1] > counts[2] > 0


def test_a_cough_is_shorter_than_speech():
    """A burst of 0.1 s among words of a second, with pauses long enough to divide them."""
    random = np.random.default_rng(0)
    burst, word = (0.1 * random.normal(size=round(RATE * seconds)) for seconds in (0.1, 1.0))
    silence = 1e-4 * random.normal(size=round(1.5 * RATE))
    samples = np.concatenate([silence, burst, silence, word, silence, burst, silence, word, silence]).astype(np.float32)
    options = VadOptions(min_silence_seconds=1.0)
    assert len(trim_silence(samples, energy, 60.0, options=options)) == 4
    options = VadOptions(min_silence_seconds=1.0, min_speech_seconds=0.5)
    places = [3.1, 7.2]
    for chunks in (
        trim_silence(samples, energy, 60.0, options=options),
        list(split_audio(np.array_split(samples, 50), energy, 5.0, options=options)),
    ):
        assert [one.start for one in chunks] == pytest.approx([place - 0.3 for place in places], abs=0.1)


def oracle(samples: np.ndarray) -> np.ndarray:
    return (loudness(samples) > -50).astype(float)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0.0, 4.0), st.floats(0.3, 9.0)), min_size=1, max_size=5),
    st.builds(
        VadOptions,
        threshold=st.floats(0.01, 0.99),
        min_silence_seconds=st.none() | st.floats(0.0, 8.0),
        padding_seconds=st.floats(0.0, 10.0),
        min_speech_seconds=st.floats(0.0, 0.2),
    ),
    st.sampled_from([1.0, 5.0]),
)
def test_no_speech_is_lost_with_any_options(spans, options, window):
    """All speech longer than the minimum is in a chunk, and none is in more than two."""
    random = np.random.default_rng(0)
    parts = [
        scale * random.normal(size=round(seconds * RATE))
        for pause, length in spans
        for scale, seconds in ((1e-4, pause), (0.1, length))
    ]
    samples = np.concatenate(parts).astype(np.float32)

    def check(chunks: list[Chunk]) -> None:
        seen = np.zeros(len(samples), dtype=int)
        for one in chunks:
            start = round(one.start * RATE)
            assert np.array_equal(one.samples, samples[start : start + len(one.samples)])
            seen[start : start + len(one.samples)] += 1
        assert seen[np.abs(samples) > 0.02].min() >= 1
        assert seen.max() <= 2

    check(list(split_audio(np.array_split(samples, 7), oracle, window, 0.3, options=options)))
    check(trim_silence(samples, oracle, 60.0, options=options))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 0.0}, "VAD threshold is 0; it must lie between 0 and 1"),
        ({"threshold": 1.0}, "threshold is 1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"min_speech_seconds": -1.0}, "min_speech_seconds is -1; it must be from 0 to 10 seconds"),
        ({"min_silence_seconds": float("inf")}, "min_silence_seconds is inf; it must be 0 or more seconds"),
        ({"min_silence_seconds": float("nan")}, "min_silence_seconds is nan"),
        ({"padding_seconds": 11.0}, "padding_seconds is 11; it must be from 0 to 10 seconds"),
    ],
)
def test_values_without_meaning_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        VadOptions(**values)


def test_options_need_a_detector():
    with pytest.raises(ConfigError, match="mean nothing without a detector"):
        TranscribeConfig(vad="none", vad_options=VadOptions(threshold=0.4))
    assert TranscribeConfig(vad="none").vad_options == USUAL_VAD


def test_the_threshold_of_energy_is_a_level():
    """Noise in steps of 3 dB above a floor: 16 dB times the threshold are speech."""
    steps = np.repeat(10 ** (np.r_[0, np.arange(0, 36, 3)] / 20), RATE)
    samples = (1e-3 * steps * np.random.default_rng(0).normal(size=len(steps))).astype(np.float32)
    found = [float((energy(samples) > threshold).mean()) for threshold in (0.3, 0.6, 0.9)]
    assert found == pytest.approx([10 / 13, 8 / 13, 7 / 13], abs=0.03)
    assert partial(energy, rate=RATE)(samples).max() == 1.0
