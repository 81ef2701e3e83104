"""Headers of sound files that state less, more or nothing of what is in them."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from canter.corpus.audio import audio_seconds, decode_utterance, load_audio
from canter.corpus.headers import Header, check_header
from canter.corpus.utterance import Utterance
from canter.errors import AudioError

RATE = 16000
NOISE = np.random.default_rng(0).normal(0, 0.1, 2 * RATE).astype(np.float32)


def encoded(kind: str, samples: np.ndarray = NOISE, rate: int = RATE, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **options)
    return file.getvalue()


def patched(data: bytes, *changes: tuple[int, bytes]) -> bytes:
    changed = bytearray(data)
    for place, wanted in changes:
        changed[place : place + len(wanted)] = wanted
    return bytes(changed)


def unfinalised(kind: str, size: bytes | None = None) -> bytes:
    """Return a file whose recorder died before it wrote the size of its samples."""
    if kind == "WAV":
        data = encoded("WAV", subtype="PCM_16")
        return patched(data, (4, size or bytes(4)), (data.index(b"data") + 4, size or bytes(4)))
    if kind == "RF64":
        data = encoded("RF64", subtype="PCM_16")
        return patched(data, (data.index(b"ds64") + 8, bytes(24)), (data.index(b"data") + 4, b"\xff" * 4))
    if kind == "AIFF":
        data = encoded("AIFF", subtype="PCM_16")
        return patched(data, (data.index(b"COMM") + 10, bytes(4)), (data.index(b"SSND") + 4, size or bytes(4)))
    if kind == "AU":
        return patched(encoded("AU", subtype="PCM_16"), (8, size or bytes(4)))
    if kind == "CAF":
        data = encoded("CAF", subtype="PCM_16")
        return patched(data, (data.index(b"data") + 4, 2 * size if size else bytes(8)))
    data = encoded("W64", subtype="PCM_16")
    return patched(data, (data.index(b"data\xf3") + 16, 2 * size if size else bytes(8)))


@pytest.mark.parametrize("kind", ["WAV", "RF64", "AIFF", "AU", "CAF", "W64"])
@pytest.mark.parametrize("size", [None, b"\xff\xff\xff\xff"])
def test_a_recording_without_a_size_is_read_to_its_end(tmp_path, kind, size):
    path = tmp_path / "a.wav"
    path.write_bytes(unfinalised(kind, size))
    whole = tmp_path / "b.wav"
    whole.write_bytes(encoded(kind, subtype="PCM_16"))
    found, wanted = load_audio(path), load_audio(whole)
    assert len(wanted) == len(NOISE)
    np.testing.assert_array_equal(found[: len(wanted)], wanted)
    assert len(found) - len(wanted) <= 32  # what CAF and others write after the samples
    assert audio_seconds(path) == len(found) / RATE


def test_an_empty_recording_with_a_chunk_after_it_stays_empty(tmp_path):
    data = encoded("WAV", NOISE[:0], subtype="PCM_16")
    (tmp_path / "a.wav").write_bytes(data + b"LIST" + struct.pack("<I", 4000) + bytes(4000))
    with pytest.raises(AudioError, match="holds no sample"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("kind", ["WAV", "RF64", "AIFF", "AU", "CAF", "W64", "FLAC"])
def test_a_file_that_ends_before_its_header_says(tmp_path, kind):
    path, data = tmp_path / "a", encoded(kind, subtype="PCM_16")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match="truncated"):
        load_audio(path)


def test_a_few_missing_samples_are_forgiven(tmp_path):
    path, data = tmp_path / "a.wav", encoded("WAV", subtype="PCM_16")
    path.write_bytes(data[:-44])
    assert len(load_audio(path)) == len(NOISE) - 22
    path.write_bytes(data[: -2 * round(0.25 * RATE)])
    with pytest.raises(AudioError, match=r"its header promises 2\.00 s, 1\.75 s are there"):
        load_audio(path)


def without_tag(data: bytes) -> bytes:
    """Return an MP3 without the frame that counts the others."""
    return data[data.index(data[:2], 4) :]


@pytest.fixture(scope="module")
def mp3() -> bytes:
    """Two seconds whose first frames are silent, so that a guess from their bit rate is far too long or short."""
    loud = np.concatenate([np.zeros(RATE, np.float32), NOISE[:RATE]])
    return encoded("MP3", loud, bitrate_mode="VARIABLE")


def test_frames_of_an_mp3_are_counted_where_no_tag_counts_them(tmp_path, mp3):
    path = tmp_path / "a.mp3"
    path.write_bytes(without_tag(mp3))
    found = load_audio(path)
    assert 2.0 <= len(found) / RATE < 2.1 + 1152 / RATE
    assert audio_seconds(path) == len(found) / RATE
    for offset in (0.5, 1.2345):
        start = round(offset * RATE)
        wanted = found[start : start + RATE // 2]
        np.testing.assert_allclose(load_audio(path, offset=offset, duration=0.5), wanted, atol=1e-5)


def test_an_mp3_of_speech_without_a_tag_is_read_as_ffmpeg_reads_it():
    av = pytest.importorskip("av", reason="the extra 'av' is not installed")
    path = Path(__file__).parent / "data" / "vbr_without_xing.mp3"
    with av.open(str(path)) as container:
        wanted = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    found = load_audio(path, sample_rate=22050)
    assert len(found) == len(wanted) == 127_872  # 5.75 s of speech and a codec's delay
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert audio_seconds(path) == 127_872 / 22050
    part = load_audio(path, sample_rate=22050, offset=4.0, duration=1.0)  # beyond the 2.63 s that were guessed
    np.testing.assert_allclose(part, wanted[4 * 22050 : 5 * 22050], atol=1e-5)


@pytest.mark.parametrize("before", [b"", bytes(500), b"\xff\xfb\x90" + bytes(70), b"ID3\4\0\0\0\0\1\0" + bytes(428)])
def test_an_mp3_may_begin_with_something_else(tmp_path, mp3, before):
    path, whole = tmp_path / "a.mp3", without_tag(mp3)
    path.write_bytes(whole)
    wanted = load_audio(path)
    path.write_bytes(before + whole)
    np.testing.assert_array_equal(load_audio(path), wanted)
    assert audio_seconds(path) == len(wanted) / RATE


def test_mp3_files_joined_into_one_are_read_to_the_end(tmp_path, mp3):
    path = tmp_path / "a.mp3"
    for data in (mp3 + mp3, mp3 + b"TAG" + bytes(125) + mp3, mp3 + b"ID3\4\0\0\0\0\1\0" + bytes(128) + mp3):
        path.write_bytes(data)
        assert 4.0 <= audio_seconds(path) == len(load_audio(path)) / RATE < 4.4


def test_an_mp3_with_a_tag_that_promises_more(tmp_path, mp3, capfd):
    path = tmp_path / "a.mp3"
    path.write_bytes(mp3[: len(mp3) * 2 // 3])
    with pytest.raises(AudioError, match=r"its header promises 2\.00 s, 1\.\d\d s are there"):
        load_audio(path)
    assert 1.0 < audio_seconds(path) < 1.8  # what is there
    found = decode_utterance(Utterance(str(path), 2.0, ""))
    assert abs(len(found.samples) / RATE - audio_seconds(path)) < 0.1
    assert abs(len(found.samples) / RATE + found.lost_seconds - 2.0) < 0.01


def test_damage_between_frames_of_an_mp3(mp3):
    middle = len(mp3) * 3 // 4
    (loss,) = check_header(io.BytesIO(mp3[:middle] + bytes(3000) + mp3[middle:])).losses
    assert 1 < loss.at < 2
    assert loss.seconds
    assert 0.1 < loss.seconds < 2


@pytest.fixture(scope="module", params=["VORBIS", "OPUS"])
def ogg(request) -> bytes:
    return encoded("OGG", np.tile(NOISE, 4), subtype=request.param)


def test_damage_to_an_ogg_page(ogg):
    assert check_header(io.BytesIO(ogg)).losses == ()
    middle = ogg.index(b"OggS", len(ogg) // 2) + 200
    for data in (
        patched(ogg, (middle, bytes(20))),
        ogg[: ogg.rindex(b"OggS", 0, middle)] + ogg[ogg.index(b"OggS", middle) :],
    ):
        (loss,) = check_header(io.BytesIO(data)).losses
        assert 2 < loss.at < 7
        assert "page" in loss.reason
    (loss,) = check_header(io.BytesIO(ogg[:-50])).losses
    assert "last page" in loss.reason


def test_damage_to_a_matroska_cluster(tmp_path, encode):
    data = encode("matroska", np.tile(NOISE, 8), codec="libopus", rate=48000, video=True)
    assert check_header(io.BytesIO(data)).losses == ()
    middle = len(data) // 2
    broken = data[:middle] + bytes(400) + data[middle + 400 :]
    (loss,) = check_header(io.BytesIO(broken)).losses
    assert 0 <= loss.at < 3
    (tmp_path / "a.mkv").write_bytes(broken)
    with pytest.raises(AudioError, match=r"is damaged .*cluster of the Matroska file"):
        load_audio(tmp_path / "a.mkv")


@given(st.data())
def test_a_header_of_any_bytes_is_checked_in_time(data):
    """Whatever the bytes are, the check ends, and a view of the file reads."""
    whole = SAMPLES[data.draw(st.sampled_from(sorted(SAMPLES)))]
    changed = bytearray(whole)
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, min(300, len(whole) - 1)), st.integers(0, 255)), max_size=8)
    ):
        changed[place] = byte
    file = io.BytesIO(bytes(changed[: data.draw(st.integers(0, len(changed)))]))
    header = check_header(file)
    assert file.tell() == 0
    assert isinstance(header, Header)
    view = header.view(file)
    assert len(view.read(200)) <= 200


SAMPLES = {kind: encoded(kind, NOISE[:4000]) for kind in ("WAV", "AIFF", "AU", "CAF", "W64", "FLAC", "MP3", "OGG")} | {
    "MKV": (Path(__file__).parent / "data" / "clip_audio_starts_at_5s.mkv").read_bytes()[:4000]
}
