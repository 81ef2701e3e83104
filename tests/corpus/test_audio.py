"""Audio decoding, on files that soundfile and tarfile wrote."""

import io
import math
import sys
import tarfile

import numpy as np
import pytest
import soundfile

import canter.corpus.audio
from canter.corpus.audio import (
    AudioInfo,
    audio_blocks,
    audio_info,
    audio_seconds,
    decode_utterance,
    load_audio,
    load_utterance,
    stated_seconds,
)
from canter.corpus.containers import Member, member_ref, walk_tar
from canter.corpus.ffmpeg import open_ffmpeg_track
from canter.corpus.utterance import Utterance
from canter.errors import AudioError


def tone(seconds=1.0, rate=16000, hertz=440.0):
    return (0.5 * np.sin(2 * math.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture
def wav(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 16000)
    return tmp_path / "a.wav"


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_samples_come_back(tmp_path, suffix):
    soundfile.write(tmp_path / f"a.{suffix}", tone(), 16000, subtype="PCM_16")
    found = load_audio(tmp_path / f"a.{suffix}")
    assert found.dtype == np.float32
    assert found.shape == (16000,)
    np.testing.assert_allclose(found, tone(), atol=1e-4)
    assert audio_seconds(tmp_path / f"a.{suffix}") == 1.0


def test_other_rates_are_resampled_and_channels_averaged(tmp_path):
    left = tone(rate=44100)
    soundfile.write(tmp_path / "s.wav", np.stack([left, -0.5 * left], 1), 44100)
    found = load_audio(tmp_path / "s.wav")
    assert found.shape == (16000,)
    np.testing.assert_allclose(found[100:-100], 0.25 * tone()[100:-100], atol=2e-3)
    assert load_audio(tmp_path / "s.wav", sample_rate=8000).shape == (8000,)


def test_offset_and_duration_cut_what_slicing_would(wav):
    whole = load_audio(wav)
    np.testing.assert_array_equal(load_audio(wav, offset=0.25, duration=0.5), whole[4000:12000])
    np.testing.assert_array_equal(load_audio(wav, offset=0.25), whole[4000:])


def test_rounded_durations_are_forgiven_and_wrong_ones_not(wav):
    assert len(load_audio(wav, duration=1.01)) == 16000
    with pytest.raises(AudioError, match=r"gives 1\.00 s from 0 s on where the manifest says 2\.00 s"):
        load_audio(wav, duration=2.0)
    with pytest.raises(AudioError, match="holds no sample from 5 s on"):
        load_audio(wav, offset=5.0)


def both(utterance, **options):
    """Return the results of the two ways to read an utterance, which must be equal."""
    whole, *blocks = load_utterance(utterance, **options), *audio_blocks(utterance, seconds=0.3, **options)
    return whole, np.concatenate(blocks)


@pytest.mark.parametrize(
    ("offset", "duration", "start", "stop"),
    [
        (0.0, 0.5, 0, 8000),
        (0.25, 0.5, 4000, 12000),
        (0.0, 0.9, 0, 16000),  # the end of the file, rounded down
        (0.0, 1.1, 0, 16000),
        (None, 0.5, 0, 16000),  # no segment: its duration is wrong
    ],
)
def test_a_row_with_an_offset_is_cut_to_its_duration(wav, offset, duration, start, stop):
    for found in both(Utterance(str(wav), duration, "", offset)):
        np.testing.assert_array_equal(found, load_audio(wav)[start:stop])


@pytest.mark.parametrize(("offset", "duration"), [(0.0, 2.0), (0.5, 1.0), (None, 2.0)])
def test_rows_whose_file_ends_early(wav, offset, duration):
    for read in (load_utterance, lambda row: [*audio_blocks(row)]):
        with pytest.raises(AudioError, match=r"manifest.*: the file is truncated or the duration wrong"):
            read(Utterance(str(wav), duration, "", offset))


def test_blocks_are_resampled_as_one(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(2.0, 44100), 44100)
    whole, blocks = both(Utterance(str(tmp_path / "a.wav"), 2.0, ""))
    assert whole.shape == blocks.shape == (32000,)
    np.testing.assert_allclose(blocks, whole, atol=1e-4)


def test_one_channel_or_the_average(tmp_path):
    path = str(tmp_path / "s.wav")
    soundfile.write(path, np.stack([tone(), np.zeros(16000)], 1), 16000)
    for channel, gain in ((0, 1.0), (1, 0.0), (None, 0.5)):
        for found in both(Utterance(path, 1.0, "", channel_selector=channel)):
            np.testing.assert_allclose(found, gain * tone(), atol=1e-4)
    with pytest.raises(AudioError, match="has no channel 2: it has 2, counted from 0"):
        load_audio(path, channel=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.wav", None, "does not exist; relative paths"),
        ("empty.wav", b"", r"is empty \(0 bytes\)"),
        ("words.wav", b"these are words, not samples" * 9, "is not audio"),
    ],
)
def test_what_is_not_audio(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setitem(sys.modules, "av", None)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for read in (load_audio, audio_seconds):
        with pytest.raises(AudioError, match=message) as caught:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_folders_and_impossible_names(tmp_path):
    with pytest.raises(AudioError, match="is a folder"):
        load_audio(tmp_path)
    with pytest.raises(AudioError, match="cannot be read"):
        load_audio("a\0.wav")
    with pytest.raises(AudioError, match="cannot be read"):
        load_audio("nosuchprotocol://x/a.wav")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_truncated_files_are_found_out(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 32000), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"truncated|no sample"):
        load_audio(path)


def test_an_mp3_that_ends_before_its_header_says(tmp_path, capfd):
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 160_000), 16000)
    assert load_audio(path).shape == (160_000,)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 6 // 10])
    row = Utterance(str(path), audio_seconds(path), "")
    for read in (load_audio, lambda _: load_utterance(row), lambda _: [*audio_blocks(row)]):
        with pytest.raises(AudioError, match=r"its header promises 10\.00 s, \d\.\d\d s are there"):
            read(path)


def test_an_mp3_whose_header_counts_nothing_may_end_where_it_does(tmp_path, capfd):
    loud, still = np.random.default_rng(0).normal(0, 0.2, 160_000), np.zeros(320_000)
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.concatenate([still, loud]), 16000)
    data = path.read_bytes()
    first = data.index(data[:2], 4)  # without the frame that counts, the length is guessed from the next
    path.write_bytes(data[first:])
    guessed = stated_seconds(path)
    assert guessed is not None
    assert guessed > 35
    for found in both(Utterance(str(path), guessed, "")):
        assert len(found) / 16000 == audio_seconds(path)
        assert 29 < len(found) / 16000 < 31


def unstated(path):
    """FLAC as written to a pipe: no number of samples in its header."""
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    return str(path)


def test_flac_of_unstated_length(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(2.0), 16000)
    whole = load_audio(tmp_path / "a.flac")
    path = unstated(tmp_path / "a.flac")
    assert audio_seconds(path) == 2.0
    for offset, duration, start, stop in ((None, 2.0, 0, 32000), (0.0, 0.5, 0, 8000), (0.75, 0.5, 12000, 20000)):
        for found in both(Utterance(path, duration, "", offset)):
            np.testing.assert_array_equal(found, whole[start:stop])
    np.testing.assert_array_equal(load_audio(path, offset=1.5), whole[24000:])
    with pytest.raises(AudioError, match="holds no sample from 3 s on"):
        load_audio(path, offset=3.0)
    with pytest.raises(AudioError, match=r"gives 1\.00 s from 1 s on"):
        load_audio(path, offset=1.0, duration=2.0)


@pytest.mark.parametrize(("rate", "channels"), [(1_000_000, 1), (16000, 33)])
def test_rates_and_channels_that_no_recording_has(tmp_path, rate, channels):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros((100, channels)), rate)
    for read in (load_audio, audio_seconds, lambda path: [*audio_blocks(Utterance(str(path), 1.0, ""))]):
        with pytest.raises(AudioError, match="which no recording has"):
            read(path)


def test_a_block_counts_samples_of_all_channels(wav, monkeypatch):
    monkeypatch.setattr(canter.corpus.audio, "BLOCK_SAMPLES", 1000)
    blocks = [*audio_blocks(Utterance(str(wav), 1.0, ""))]
    assert [len(block) for block in blocks] == [1000] * 16


def test_wav_of_unknown_length_as_pipes_write_it(wav):
    data = bytearray(wav.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    wav.write_bytes(data)
    assert len(load_audio(wav)) == 16000


def test_samples_that_are_not_numbers(tmp_path):
    samples = tone()
    samples[123] = np.nan
    soundfile.write(tmp_path / "n.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match="sample 123 is not a finite number"):
        load_audio(tmp_path / "n.wav")


def test_no_frames(tmp_path):
    soundfile.write(tmp_path / "z.wav", np.zeros(0), 16000)
    with pytest.raises(AudioError, match="holds no sample"):
        load_audio(tmp_path / "z.wav")


@pytest.fixture
def tar(tmp_path, wav):
    with tarfile.open(tmp_path / "t.tar", "w") as file:
        file.add(wav, "sub/a.wav")
        file.add(wav, "../evil.wav")
        absolute = tarfile.TarInfo("/evil.wav")  # what tarfile itself would not write
        absolute.size = wav.stat().st_size
        file.addfile(absolute, io.BytesIO(wav.read_bytes()))
        file.add(wav, "b.wav")
    return tmp_path / "t.tar"


def test_members_of_tars_by_name_and_by_range(tar, wav):
    whole = load_audio(wav)
    np.testing.assert_array_equal(load_audio(f"{tar}::sub/a.wav"), whole)
    member = next(one for one in walk_tar(str(tar)) if isinstance(one, Member) and one.name == "b.wav")
    ref = member_ref(tar, member.name, member.start, member.size)
    np.testing.assert_array_equal(load_audio(ref, offset=0.5, duration=0.25), whole[8000:12000])


def test_members_that_are_not_there(tar):
    with pytest.raises(AudioError, match=r"no '\.\./evil\.wav' among"):
        load_audio(f"{tar}::../evil.wav")
    with pytest.raises(AudioError, match="ends within it"):
        load_audio(member_ref(tar, "a.wav", 0, 10**9))
    with pytest.raises(AudioError, match="does not exist"):
        load_audio(f"{tar}x::a.wav")


def test_unsafe_and_torn_tars_are_reported(tar):
    found = list(walk_tar(str(tar)))
    assert [one.line for one in found if not isinstance(one, Member)] == [2, 3]
    data = tar.read_bytes()
    last = found[-1]
    tar.write_bytes(data[: last.start + 100])
    found = list(walk_tar(str(tar)))
    assert "truncated tar" in found[-1].reason


def m4a(path, samples):
    av = pytest.importorskip("av", reason="the extra 'av' is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for start in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
            frame.rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_formats_of_the_av_extra(tmp_path):
    path = tmp_path / "a.m4a"
    m4a(path, tone(2.0))
    found = load_audio(path)
    assert abs(len(found) - 32000) <= 2048
    assert abs(np.abs(np.fft.rfft(found[:16000])).argmax() - 440) <= 2
    assert len(load_audio(path, offset=0.5, duration=0.5)) == 8000
    (tmp_path / "bad.m4a").write_bytes(b"nothing" * 100)
    with pytest.raises(AudioError, match="is not audio"):
        load_audio(tmp_path / "bad.m4a")


class Watched(io.FileIO):
    """Counts the bytes that are read of it."""

    taken = 0

    def read(self, size=-1):
        data = super().read(size)
        self.taken += len(data)
        return data


def test_only_the_segment_of_a_long_m4a_is_decoded(tmp_path):
    path = tmp_path / "a.m4a"
    phase = np.cumsum(np.linspace(200, 2000, 40 * 16000)) / 16000  # a sweep: no two stretches are alike
    m4a(path, (0.5 * np.sin(2 * math.pi * phase)).astype(np.float32))
    whole = load_audio(path)
    for offset, duration in ((0.3, 1.0), (1.5, 0.5), (20.123, 2.0)):
        found = load_audio(path, offset=offset, duration=duration)
        wanted = whole[round(offset * 16000) :][: len(found)]
        assert len(found) == round(duration * 16000)
        assert np.abs(found - wanted).mean() < 0.05 * np.abs(wanted).mean()
    with Watched(path) as file, open_ffmpeg_track(str(path), file, "") as coded:
        next(coded.read(32 * 16000, 16000))
        assert file.taken < path.stat().st_size / 2
    with pytest.raises(AudioError, match=r"gives 1\.\d+ s from 39 s on where the manifest says 2\.00 s"):
        load_audio(path, offset=39.0, duration=2.0)
    blocks = list(audio_blocks(Utterance(str(path), 40.0, ""), seconds=6.0))
    assert len(blocks) >= 6  # so that a reader may stop
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    (rounded,) = audio_blocks(Utterance(str(path), len(whole) / 16000 - 0.15, "", offset=0.0), seconds=90.0)
    np.testing.assert_array_equal(rounded, whole)


def test_without_the_av_extra_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + b"\0" * 100)
    with pytest.raises(AudioError, match=r"canter\[av\]"):
        load_audio(tmp_path / "a.m4a")


def test_channels_that_cancel_each_other_out(tmp_path):
    path = str(tmp_path / "s.wav")
    soundfile.write(path, np.stack([tone(40.0), -0.9 * tone(40.0)], 1), 16000)
    row = Utterance(path, 40.0, "")
    found = decode_utterance(row)
    np.testing.assert_allclose(found.samples, tone(40.0), atol=1e-4)
    assert found.warnings == ("its channels cancel each other out; the louder one is used",)
    whole, blocks = both(row)
    np.testing.assert_array_equal(whole, blocks)
    np.testing.assert_array_equal(load_audio(path, offset=1.0, duration=2.0), found.samples[16000:48000])
    np.testing.assert_allclose(load_audio(path, channel=1), -0.9 * tone(40.0), atol=1e-4)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, 0.0, 0.0, 0.0, 0.0, 0.0), (1.0, -0.5), (1.0, 0.3)])
def test_other_channels_are_averaged(tmp_path, weights):
    path = str(tmp_path / "s.wav")
    soundfile.write(path, np.stack([weight * tone() for weight in weights], 1), 16000)
    found = decode_utterance(Utterance(path, 1.0, ""))
    np.testing.assert_allclose(found.samples, np.mean(weights) * tone(), atol=1e-4)
    assert not found.warnings


def test_a_rate_that_would_fill_the_memory(tmp_path):
    path = tmp_path / "slow.wav"
    data = bytearray(wav_bytes(tone()))
    data[24:28] = (1).to_bytes(4, "little")
    path.write_bytes(data)
    for read in (load_audio, audio_seconds, audio_info, lambda path: decode_utterance(Utterance(str(path), 1.0, ""))):
        with pytest.raises(AudioError, match="claims 1 channels at 1 Hz, which no recording has"):
            read(path)


def wav_bytes(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="WAV")
    return file.getvalue()


def test_a_small_file_that_unpacks_to_much(tmp_path, monkeypatch):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(20 * 16000), 16000)
    assert len(load_audio(path)) == 320_000
    monkeypatch.setattr(canter.corpus.audio, "LARGE_LOAD", 300_000)
    monkeypatch.setattr(canter.corpus.audio, "MOST_GROWTH", 10)
    with pytest.raises(AudioError, match="bytes unpack to more than 1 MiB of samples"):
        load_audio(path)
    assert sum(map(len, audio_blocks(Utterance(str(path), 20.0, "")))) == 320_000


@pytest.fixture
def damaged_flac(tmp_path):
    """Ten seconds of noise with damage at about the sixth, and then silence from the eighth on."""
    samples = np.random.default_rng(0).normal(0, 0.1, 160_000)
    samples[128_000:] = 0
    path = tmp_path / "a.flac"
    soundfile.write(path, samples, 16000)
    data = bytearray(path.read_bytes())
    place = len(data) * 6 // 8
    data[place : place + 300] = bytes(300)
    path.write_bytes(data)
    return path, samples.astype(np.float32)


@pytest.mark.parametrize("ffmpeg", [True, False])
def test_a_damaged_frame_of_flac_is_silent_and_others_in_place(damaged_flac, monkeypatch, ffmpeg):
    if not ffmpeg:
        monkeypatch.setitem(sys.modules, "av", None)
    path, samples = damaged_flac
    for read in (load_audio, lambda path: [*audio_blocks(Utterance(str(path), 10.0, ""))]):
        with pytest.raises(AudioError, match=r"is damaged or truncated at [56]\.\d\d s"):
            read(path)
    row = Utterance(str(path), 10.0, "")
    found, blocks = decode_utterance(row), audio_blocks(row, seconds=3.0, keep_damaged=True)
    np.testing.assert_array_equal(np.concatenate([*blocks]), found.samples)
    assert len(found.samples) == 160_000
    assert 0.05 < found.lost_seconds < 1
    wrong = np.flatnonzero(np.abs(found.samples - samples) > 1e-4)
    assert wrong[-1] - wrong[0] <= found.lost_seconds * 16000
    assert np.abs(load_audio(path, offset=1.0, duration=2.0) - samples[16000:48000]).max() < 1e-4


def test_transcription_keeps_what_a_truncated_file_has(wav):
    wav.write_bytes(wav.read_bytes()[:-16000])
    row = Utterance(str(wav), 1.0, "")
    found, blocks = decode_utterance(row), audio_blocks(row, seconds=0.2, keep_damaged=True)
    assert sum(map(len, blocks)) == len(found.samples) == 8000
    assert found.lost_seconds == blocks.lost_seconds == 0.5
    assert found.warnings == blocks.warnings == ("0.50 s of its audio are lost, from 0.50 s on: it is truncated",)


def test_standard_input_is_a_file(wav, monkeypatch):
    canter.corpus.audio._standard_input.cache_clear()
    with open(wav, "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert audio_seconds("-") == 1.0
    np.testing.assert_array_equal(load_audio("-"), load_audio(wav))  # which is read once
    canter.corpus.audio._standard_input.cache_clear()


def test_facts_of_a_file(wav, tmp_path):
    assert audio_info(wav) == AudioInfo(16000, 1, 1.0)
    m4a(tmp_path / "a.m4a", tone())
    assert audio_info(tmp_path / "a.m4a") == AudioInfo(16000, 1, None)
