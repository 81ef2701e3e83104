"""Audio decoding, on files that soundfile and tarfile wrote."""

import io
import math
import sys
import tarfile

import numpy as np
import pytest
import soundfile

from canter.corpus.audio import audio_seconds, container_of, load_audio, member_ref
from canter.corpus.tar import Member, walk_tar
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
    assert container_of(ref) == str(tar)
    assert container_of(str(wav)) == str(wav)


def test_members_that_are_not_there(tar):
    with pytest.raises(AudioError, match=r"no '\.\./evil\.wav' among"):
        load_audio(f"{tar}::../evil.wav")
    with pytest.raises(AudioError, match="ends within it"):
        load_audio(member_ref(tar, "a.wav", 0, 10**9))
    with pytest.raises(AudioError, match="does not exist"):
        load_audio(f"{tar}x::a.wav")


def test_unsafe_and_torn_tars_are_told(tar):
    found = list(walk_tar(str(tar)))
    assert [one.line for one in found if not isinstance(one, Member)] == [2, 3]
    data = tar.read_bytes()
    last = found[-1]
    tar.write_bytes(data[: last.start + 100])
    found = list(walk_tar(str(tar)))
    assert "truncated tar" in found[-1].reason


def test_formats_of_the_av_extra(tmp_path):
    av = pytest.importorskip("av", reason="the extra 'av' is not installed")
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        samples = tone(2.0)
        for start in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(
                samples[None, start : start + 1024], format="fltp", layout="mono"
            )
            frame.rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = load_audio(path)
    assert abs(len(found) - 32000) <= 2048
    assert abs(np.abs(np.fft.rfft(found[:16000])).argmax() - 440) <= 2
    assert len(load_audio(path, offset=0.5, duration=0.5)) == 8000
    (tmp_path / "bad.m4a").write_bytes(b"nothing" * 100)
    with pytest.raises(AudioError, match="is not audio"):
        load_audio(tmp_path / "bad.m4a")


def test_without_the_av_extra_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + b"\0" * 100)
    with pytest.raises(AudioError, match=r"canter\[av\]"):
        load_audio(tmp_path / "a.m4a")
