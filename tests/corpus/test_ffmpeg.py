"""Media through FFmpeg: tracks, time stamps, damage, and what it may not open."""

import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile

from canter.corpus.audio import audio_blocks, audio_seconds, decode_utterance, load_audio
from canter.corpus.ffmpeg import Timeline
from canter.corpus.utterance import Utterance
from canter.errors import AudioError

pytest.importorskip("av", reason="the extra 'av' is not installed")
DATA = Path(__file__).parent / "data"
RATE = 16000


def tone(hertz: float, seconds: float = 2.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def pitch(samples: np.ndarray) -> float:
    """Return the loudest frequency of samples, in hertz."""
    return float(np.abs(np.fft.rfft(samples)).argmax()) * RATE / len(samples)


def sounding(samples: np.ndarray) -> tuple[float, float]:
    """Return when sound begins and ends, in seconds."""
    loud = np.flatnonzero(np.abs(samples) > 0.1)
    return loud[0] / RATE, loud[-1] / RATE


def keep(path: Path) -> tuple[np.ndarray, float, tuple[str, ...]]:
    """Return what transcription reads, in blocks as at once, the seconds lost and the warnings."""
    row = Utterance(str(path), 0.0, "")
    found, blocks = decode_utterance(row), audio_blocks(row, seconds=0.3, keep_damaged=True)
    np.testing.assert_allclose(np.concatenate(list(blocks)), found.samples, atol=1e-6)
    assert (blocks.lost_seconds, blocks.warnings) == (found.lost_seconds, found.warnings)
    return found.samples, found.lost_seconds, found.warnings


def test_the_default_track_or_the_one_that_is_asked_for(tmp_path, encode):
    path = tmp_path / "a.mkv"
    path.write_bytes(encode("matroska", tone(500), tone(900, 1.0), default=1))
    for track, hertz, seconds in ((None, 900, 1.0), (0, 500, 2.0), (1, 900, 1.0)):
        found = load_audio(path, track=track)
        assert abs(pitch(found[4000:12000]) - hertz) < 5
        assert abs(len(found) / RATE - seconds) < 0.15
        assert abs(audio_seconds(path, track=track) - seconds) < 0.15
    path.write_bytes(encode("matroska", tone(500), tone(900), default=-1))
    assert abs(pitch(load_audio(path)[4000:12000]) - 500) < 5
    with pytest.raises(AudioError, match="no audio track 2: it has 2 audio tracks, counted from 0"):
        load_audio(path, track=2)


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "aac"), ("mov", "aac"), ("matroska", "aac"), ("mpegts", "mp2")]
)
def test_audio_that_starts_after_the_video(tmp_path, encode, container, codec):
    path = tmp_path / "a"
    path.write_bytes(encode(container, tone(500), codec=codec, starts=[1.5], video=True))
    found = load_audio(path)
    begin, end = sounding(found)
    assert abs(begin - 1.5) < 0.12
    assert abs(end - 3.5) < 0.15
    assert abs(audio_seconds(path) - len(found) / RATE) < 0.1
    part = load_audio(path, offset=1.0, duration=1.0)
    assert len(part) == RATE
    assert abs(sounding(part)[0] - (begin - 1.0)) < 0.01


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_the_clip_that_starts_at_five_seconds(container):
    found = load_audio(DATA / f"clip_audio_starts_at_5s.{container}")
    assert not found[: round(4.9 * RATE)].any()
    assert 5.5 < sounding(found)[0] < 5.7  # 0.6 s after the start of the audio


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_gaps_are_silent(tmp_path, encode, container):
    path = tmp_path / "a"
    path.write_bytes(encode(container, tone(500, 4.0), gaps=[(1.0, 2.5)], codec="aac"))
    found = load_audio(path)
    assert abs(sounding(found)[1] - 4.0) < 0.2
    silent = found[round(1.3 * RATE) : round(2.3 * RATE)]
    assert np.abs(silent).max() < 0.01
    assert abs(audio_seconds(path) - len(found) / RATE) < 0.15
    later = load_audio(path, offset=2.0, duration=1.0)
    wanted = found[2 * RATE : 3 * RATE]
    assert np.abs(later - wanted).mean() < 0.05 * np.abs(wanted).mean()


def test_time_stamps_that_jump_are_no_gap():
    line = Timeline("mpegts", 1000, 5.0)
    assert line.gap(5.0, False) == 0
    line.place = 1000
    assert line.gap(6.05, False) == 0  # jitter
    assert line.gap(6.05, True) == 50  # but not after damage
    assert line.gap(7.0, False) == 1000
    line.place = 2000
    assert line.gap(100.0, False) == 0  # recordings joined
    assert line.gap(100.5, False) == 500
    line = Timeline("matroska,webm", 1000, 0.0)
    assert line.gap(1e9, False) == 0
    assert line.gap(float("nan"), False) == 0


def test_one_damaged_packet_loses_no_more_than_itself():
    path = DATA / "200_damaged_bytes.m4a"
    with pytest.raises(AudioError, match=r"is damaged or truncated at 0\.58 s"):
        load_audio(path)
    samples, lost, warnings = keep(path)
    assert len(samples) == 33792
    assert 0.05 < lost < 0.3
    assert warnings == (
        f"{lost:.2f} s of its audio are lost, from 0.58 s on: FFmpeg: Invalid data found when processing input",
    )


@pytest.mark.parametrize("container", ["matroska", "flv", "mpegts", "mp4"])
def test_a_media_file_that_is_cut_short(tmp_path, encode, container):
    path = tmp_path / "a"
    data = encode(container, tone(500, 6.0))
    path.write_bytes(data[: len(data) * 2 // 3])
    if container == "mp4":  # its table comes last
        for read in (load_audio, keep):
            with pytest.raises(AudioError, match="damaged or truncated: it begins as MP4"):
                read(path)
        return
    samples, lost, warnings = keep(path)
    assert 3 < len(samples) / RATE < 5
    if container != "mpegts":  # which does not say how long it is
        assert abs(lost + len(samples) / RATE - 6.0) < 0.3
        assert warnings
        with pytest.raises(AudioError, match="truncated"):
            load_audio(path)


@pytest.mark.parametrize("kind", ["OGG", "MP3"])
def test_audio_after_damage_keeps_its_place(tmp_path, kind):
    path, data = tmp_path / "a", io.BytesIO()
    samples = np.random.default_rng(0).normal(0, 0.1, 12 * RATE).astype(np.float32)
    samples[10 * RATE :] = 0
    soundfile.write(data, samples, RATE, format=kind)
    whole = data.getvalue()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(3000) + whole[middle + 3000 :])
    with pytest.raises(AudioError, match="is damaged"):
        load_audio(path)
    found, lost, warnings = keep(path)
    assert abs(sounding(found)[1] - 10.0) < 0.3
    assert 0.1 < lost < 2.5
    assert warnings


HOSTILE = {
    "sdp.wav": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {port} RTP/AVP 0\n",
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10.0,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
    "concat.mp4": "ffconcat version 1.0\nfile {file}\nfile tcp://127.0.0.1:{port}\n",
    "dash.mp4": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>http://127.0.0.1:{port}/'
    "</BaseURL></MPD>\n",
    "redirect.asf": "[Reference]\nRef1=http://127.0.0.1:{port}/a.asf\n",
    "stream.rtsp": "rtsp://127.0.0.1:{port}/a\n",
    "webm_chunk.mkv": "<?xml version='1.0'?><smil><audio src='http://127.0.0.1:{port}/a'/></smil>\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_else_is_opened(tmp_path, name):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        soundfile.write(tmp_path / "other.wav", tone(500), RATE)
        path = tmp_path / name
        path.write_text(HOSTILE[name].format(port=server.getsockname()[1], file=tmp_path / "other.wav"))
        before = set(os.listdir("/proc/self/fd"))
        for read in (load_audio, audio_seconds, lambda path: decode_utterance(Utterance(str(path), 0.0, ""))):
            with pytest.raises(AudioError, match="is not audio") as caught:
                read(path)
            assert "\n" not in str(caught.value)
        assert set(os.listdir("/proc/self/fd")) <= before
        with pytest.raises(BlockingIOError):
            server.accept()


def test_whatever_a_decoder_raises_is_the_error_of_its_file(tmp_path, monkeypatch, encode):
    import av

    (tmp_path / "a.m4a").write_bytes(encode("mp4", tone(500)))
    row = Utterance(str(tmp_path / "a.m4a"), 2.0, "")
    for error in (
        AttributeError("'NoneType'"),
        ZeroDivisionError(),
        MemoryError(),
        UnicodeDecodeError("a", b"", 0, 1, "b"),
    ):

        def fails(*arguments, error=error, **options):
            raise error

        for where in ("open", "AudioResampler"):
            with monkeypatch.context() as patch:
                patch.setattr(av, where, fails)
                for read in (load_audio, lambda _: decode_utterance(row), lambda _: list(audio_blocks(row))):
                    with pytest.raises(AudioError, match=r"a\.m4a"):
                        read(tmp_path / "a.m4a")


def test_a_file_of_which_nothing_can_be_decoded(tmp_path, encode):
    data = encode("adts", tone(500))
    frames = data.split(data[:2])
    broken = b"".join(data[:2] + one[:5] + bytes(len(one) - 5) for one in frames if len(one) > 5)
    (tmp_path / "a.aac").write_bytes(broken)
    for read in (load_audio, keep):
        with pytest.raises(AudioError, match=r"damaged|not audio") as caught:
            read(tmp_path / "a.aac")
        assert "\n" not in str(caught.value)


def test_a_codec_that_ffmpeg_does_not_know(tmp_path, encode):
    data = encode("matroska", tone(500))
    (tmp_path / "a.mka").write_bytes(data.replace(b"A_AAC", b"A_XYZ"))
    with pytest.raises(AudioError, match="does not know the codec"):
        load_audio(tmp_path / "a.mka")
