"""Noise of the benchmark: it has the SNR that the figures name, is drawn once, and runs are not made twice."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from canter.corpus.audio import load_audio
from canter.corpus.manifest import write_manifest
from canter.errors import ManifestError
from canter.training.feed.waveform import mean_power

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import augmentation

    yield augmentation
    sys.modules.pop("augmentation", None)


@pytest.fixture
def speech(tmp_path):
    """A manifest of two clips of each of eight speakers, for training and for testing."""
    draw, rows = np.random.default_rng(0), []
    for number in range(32):
        name = f"{number}.wav"
        soundfile.write(tmp_path / name, 0.1 * draw.standard_normal(8000 + 100 * number), 16000)
        split, speaker = "train" if number < 16 else "test", f"s{number // 2}"
        row = {"audio_filepath": name, "duration": 0.5, "text": "a", "speaker": speaker, "split": split}
        rows.append(row)
    write_manifest(tmp_path / "speech.jsonl", rows)
    return tmp_path / "speech.jsonl"


def test_test_noise_has_its_snr_and_is_drawn_once(bench, speech, tmp_path):
    options = bench.Options("wer", tmp_path, speech, tmp_path / "out", snrs=(10.0, 0.0), test_clips=4)
    manifests = bench.write_tests(options, bench.rows_of(speech, "test"))
    assert list(manifests) == ["clean", "babble 10 dB", "babble 0 dB", "coloured 10 dB", "coloured 0 dB"]
    rows = {name: list(map(json.loads, path.read_text().splitlines())) for name, path in manifests.items()}
    assert {len(one) for one in rows.values()} == {4}
    for number, row in enumerate(rows["clean"]):
        clean = load_audio(row["audio_filepath"]).astype(np.float64)
        noises = {}
        for name in list(manifests)[1:]:
            noise = load_audio(rows[name][number]["audio_filepath"]) - clean
            noises[name] = noise / np.sqrt(mean_power(noise))
            snr = 10 * np.log10(mean_power(clean) / mean_power(noise))
            assert snr == pytest.approx(float(name.split()[1]), abs=0.1)
        np.testing.assert_allclose(noises["babble 10 dB"], noises["babble 0 dB"], atol=0.01)
    written = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.flac")}
    for path in manifests.values():
        path.unlink()
    bench.write_tests(options, bench.rows_of(speech, "test"))
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.flac")} == written


def test_a_speaker_is_not_in_the_babble_over_their_own_speech(bench, speech):
    rows = bench.rows_of(speech, "test")
    seven = [row for row in rows if row["speaker"] != "s15"]
    for speaker in ("s8", "s9"):
        without = bench.babble(seven, 4000, np.random.default_rng(1), without=speaker)
        others = [row for row in seven if row["speaker"] != speaker]
        np.testing.assert_array_equal(without, bench.babble(others, 4000, np.random.default_rng(1)))


def test_coloured_noise_falls_with_its_exponent(bench):
    for exponent in (0.0, 1.0, 2.0):
        power = np.abs(np.fft.rfft(bench.coloured(1 << 18, exponent, np.random.default_rng(0)))) ** 2
        hertz = np.fft.rfftfreq(1 << 18, 1 / 16000)
        low, high = (power[(hertz > at) & (hertz < 1.2 * at)].mean() for at in (200, 3200))
        assert np.log2(low / high) == pytest.approx(4 * exponent, abs=0.2)


def test_a_manifest_without_speakers_is_refused(bench, speech):
    with pytest.raises(ManifestError, match=r"the split 'valid' needs more than 6 speakers; name another one"):
        bench.rows_of(speech, "valid")


def test_finished_work_is_not_done_again(bench, tmp_path):
    assert bench.kept(tmp_path / "scores.json", lambda: {"wer": 0.5}) == {"wer": 0.5}
    assert bench.kept(tmp_path / "scores.json", lambda: pytest.fail("made again")) == {"wer": 0.5}
