"""`canter transcribe` as a user meets it: broken inputs among good ones, several ranks, what goes where."""

import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from canter.cli.main import main
from canter.cli.transcribe import Options, destination, identity, style_of, timestamps_of
from canter.inference.recording import Transcription
from canter.loading import load_model
from canter.models.decoder import DecoderConfig
from canter.models.fastconformer import FastConformerConfig
from canter.models.features import FeatureConfig
from canter.models.formats.checkpoint import save_model
from canter.models.model import ModelConfig, SpeechModel
from canter.text import Characters, train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a small Canary, which needs the language of the audio."""
    tokenizer = train_tokenizer(["one two three four five"] * 20, languages=["en", "de"], vocab_size=40)
    config = ModelConfig(
        features=FeatureConfig(mels=16),
        encoder=FastConformerConfig(layers=1, width=16, heads=2, feedforward=32, subsampling_channels=4, mels=16),
        decoder=DecoderConfig(layers=1, width=16, heads=2, feedforward=32, vocabulary=40, positions=48),
    )
    return str(save_model(SpeechModel(config), tmp_path_factory.mktemp("model") / "m", tokenizer))


def sound(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=max(1, round(seconds * rate))) * 0.1


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Every kind of file that a user may have, by name; ``bad-`` ones are not to be transcribed."""
    root = tmp_path_factory.mktemp("clips")
    soundfile.write(root / "good.wav", sound(1.0), 16000)
    soundfile.write(root / "stereo.wav", np.stack([sound(1.0), sound(1.0, seed=1)], 1), 16000)
    soundfile.write(root / "8khz.wav", sound(1.0, 8000), 8000)
    soundfile.write(root / "96khz.flac", sound(0.5, 96000), 96000)
    soundfile.write(root / "one-sample.wav", sound(0), 16000)
    soundfile.write(root / "silence.wav", np.zeros(8000), 16000)
    (root / "bad-text.wav").write_text("this is no audio at all")
    (root / "bad-empty.wav").write_bytes(b"")
    (root / "bad-header.wav").write_bytes((root / "good.wav").read_bytes()[:44])
    (root / "truncated.wav").write_bytes((root / "good.wav").read_bytes()[:20000])
    soundfile.write(root / "truncated.flac", sound(3.0), 16000)
    os.truncate(root / "truncated.flac", 30000)
    nan = sound(0.5)
    nan[4000:4100] = np.nan
    soundfile.write(root / "bad-nan.wav", nan, 16000, subtype="FLOAT")
    return root


def rows_of(path: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {Path(row["audio_filepath"]).name: row for row in rows}


def test_broken_files_are_named_and_others_continue(model, clips, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    (tmp_path / "nothing").mkdir()
    inputs = [str(tmp_path / "nothing"), str(clips), str(clips / "absent.wav")]
    assert main(["transcribe", model, *inputs, "--language", "en", "-o", str(out), "--json"]) == 1
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    rows = rows_of(out)
    bad = {name for name, row in rows.items() if "error" in row}
    expected = {path.name for path in clips.iterdir() if path.name.startswith("bad-")}
    assert bad == expected | {"nothing", "absent.wav"}
    assert all(isinstance(row["pred_text"], str) for name, row in rows.items() if name not in bad)
    assert summary["transcribed"] == len(rows) - len(bad)
    assert f"{len(bad)} failed" in captured.err
    assert "Traceback" not in captured.err
    for name in bad:
        assert name in rows[name]["error"]
        assert rows[name]["error"].splitlines()[0] in captured.err
    for name, reason in [
        ("bad-text.wav", "not audio"),
        ("bad-empty.wav", "empty"),
        ("bad-nan.wav", "not a finite number"),
        ("nothing", "holds nothing"),
        ("absent.wav", "does not exist"),
    ]:
        assert reason in rows[name]["error"], name
    for name in ("truncated.wav", "truncated.flac"):
        assert rows[name]["lost_seconds"] > 0.3
        (warning,) = rows[name]["warnings"]
        assert f"{rows[name]['audio_filepath']}: {warning}" in captured.err
    assert len(summary["warnings"]) == 2


def test_without_a_language_each_item_says_so(model, clips, tmp_path):
    out = tmp_path / "out.jsonl"
    manifest = tmp_path / "m.jsonl"
    lines = [{"audio_filepath": str(clips / "good.wav"), "lang": lang} for lang in ("en", None, "xx")]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["transcribe", model, str(manifest), "-o", str(out)]) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["error" in row for row in rows] == [False, True, True]
    assert "good.wav names no language, and the model knows de, en" in rows[1]["error"]
    assert "xx" in rows[2]["error"]
    assert "good.wav" in rows[2]["error"]


@pytest.mark.parametrize(("suffix", "start"), [(".srt", "1\n00:00:00,000 --> 00:00:01,000\n"),
                                               (".vtt", "WEBVTT\n\n00:00.000 --> 00:01.000\n"),
                                               (".tsv", "start\tend\ttext\n0\t1000\t")])  # fmt: skip
def test_the_suffix_decides(model, clips, tmp_path, monkeypatch, suffix, start):
    import canter.inference.bulk as module

    def heard(engine, tokenizer, utterances, *given, **named):
        yield from ((number, Transcription("hello")) for number, _ in enumerate(utterances))

    monkeypatch.setattr(module, "transcribe_events", heard)
    out = tmp_path / f"x{suffix}"
    assert main(["transcribe", model, str(clips / "good.wav"), "--language", "en", "-o", str(out)]) == 0
    assert out.read_text().startswith(start + "hello\n")


def test_a_log_gets_lines_with_the_speed_so_far(model, clips, monkeypatch, capsys):
    monkeypatch.setattr("canter.cli.progress.TranscriptionProgress.EVERY_SECONDS", 0.0)
    monkeypatch.setattr("canter.inference.engine.engine.EVENT_SECONDS", 0.0)
    files = [str(clips / name) for name in ("good.wav", "silence.wav", "bad-nan.wav")]
    assert main(["transcribe", model, *files, "--language", "en"]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("transcribing: ")]
    share = re.compile(r"transcribing: ([\d.]+) of 2 s of audio \((\d+)%\), (\d) of 3 finished  RTFx [\d.]+  ")
    seen = [match for line in lines if (match := share.match(line))]
    assert len(seen) == len(lines) > 6
    percents = [int(match[2]) for match in seen]
    assert percents == sorted(percents)
    assert len(set(percents)) > 4  # while both are decoded together
    assert [int(match[3]) for match in seen] == sorted(int(match[3]) for match in seen)
    assert lines[-1].startswith("transcribing: 2 of 2 s of audio (100%), 3 of 3 finished")
    assert lines[-1].endswith("0:00 left  1 failed")
    assert len(captured.out.splitlines()) == 3


def test_a_file_of_one_utterance_refuses_two_before_any_work(model, clips, tmp_path, capsys):
    files = [str(clips / "good.wav"), str(clips / "silence.wav")]
    assert main(["transcribe", model, *files, "--language", "en", "-o", str(tmp_path / "x.srt")]) == 1
    assert "there are 2: name a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_asked_for_reaches_the_engine(model, clips, tmp_path, monkeypatch):
    import canter.inference.bulk as module

    seen = []

    def heard(engine, tokenizer, utterances, longest, asked):
        seen.append((engine.config, utterances, longest, asked))
        yield from ((number, Transcription("hello")) for number, _ in enumerate(utterances))

    monkeypatch.setattr(module, "transcribe_events", heard)
    given = ["--language", "de", "--beam-size", "3", "--length-penalty", "0.5", "--timestamps", "word", "--vad", "none",
             "--task", "translate", "--no-fallback", "--batch-size", "7", "--chunk-seconds", "9"]  # fmt: skip
    out = tmp_path / "x.jsonl"
    assert main(["transcribe", model, str(clips / "good.wav"), *given, "-o", str(out)]) == 0
    ((config, (utterance,), longest, asked),) = seen
    assert (config.beams, config.length_penalty, config.rows) == (3, 0.5, 7)
    assert (utterance.source_lang, utterance.target_lang, utterance.taskname) == ("de", "en", "translate")
    assert longest == float("inf")
    assert (asked.timestamps, asked.vad, asked.chunk_seconds, asked.fallback) == ("word", "none", 9.0, None)
    assert json.loads(out.read_text())["segments"] == [{"start": 0.0, "end": 1.0, "text": "hello"}]


def test_joint_decoding_needs_a_ctc_head_and_its_alphabet(model, clips, tmp_path, capsys):
    given = [str(clips / "good.wav"), "--language", "en", "--ctc-weight", "0.4", "-o", str(tmp_path / "x.jsonl")]
    assert main(["transcribe", model, *given]) == 1
    assert "no CTC head" in capsys.readouterr().err
    loaded = load_model(model)
    alphabet = Characters.of(["one two three four five"])
    joint = SpeechModel(replace(loaded.config, ctc_vocabulary=alphabet.size))
    joint.characters = alphabet
    folder = str(save_model(joint, tmp_path / "joint", loaded.tokenizer))
    assert main(["transcribe", folder, *given[:3], "--ctc-weight", "1.4"]) == 1
    assert "between 0" in capsys.readouterr().err
    assert main(["transcribe", folder, *given]) == 0
    assert "pred_text" in json.loads((tmp_path / "x.jsonl").read_text())
    (tmp_path / "joint" / "characters.json").unlink()
    assert main(["transcribe", folder, *given]) == 1
    assert "not known how" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("srt", {}, "word"),
        ("srt", {"cues": "whisper"}, "segment"),
        ("vtt", {"max_line_width": 42}, "word"),
        ("srt", {"timestamps": "segment"}, "segment"),
        ("tsv", {}, "segment"),
        ("txt", {}, "none"),
        ("txt", {"timestamps": "word"}, "word"),
        ("all", {}, "word"),
    ],
)
def test_formats_ask_for_the_times_they_need(tmp_path, kind, given, expected):
    options = Options(Path("m"), (), output=tmp_path, format=kind, **given)
    kinds = destination(options)[1]
    assert timestamps_of(options, kinds, style_of(options, kinds)) == expected


def test_what_failed_writes_no_file_of_its_own(model, clips, tmp_path):
    bad = str(clips / "bad-empty.wav")
    assert main(["transcribe", model, bad, "-o", str(tmp_path / "x.txt"), "--language", "en"]) == 1
    folder = tmp_path / "all"
    good = str(clips / "good.wav")
    assert main(["transcribe", model, bad, good, "--language", "en", "-o", str(folder), "--format", "all"]) == 1
    stems = {path.stem for path in folder.iterdir()}
    assert stems == {"good", "transcripts"}
    assert [path.name for path in tmp_path.iterdir()] == ["all"]


@pytest.fixture
def videos(clips, tmp_path) -> Path:
    """A folder of recordings in folders, with files that are not taken."""
    root = tmp_path / "videos"
    (root / "sub").mkdir(parents=True)
    good = (clips / "good.wav").read_bytes()
    for name in ("a.wav", "a.flac", "sub/a.wav", "b.unknown"):
        (root / name).write_bytes(good)
    for name in ("sub/c.txt", "sub/c.html", "README.md"):
        (root / name).write_text("no recording")
    return root


def test_subtitles_of_a_folder(model, videos, tmp_path, capsys, monkeypatch):
    """They are named after the recordings, none is silently left out, and each is there once it is transcribed."""
    import canter.inference.bulk as module

    out = tmp_path / "subtitles"
    seen = []

    def heard(engine, tokenizer, utterances, longest, asked):
        for number, _ in enumerate(utterances):
            seen.append(len([*out.rglob("*.srt")]))
            yield number, Transcription("One two. Three.")

    monkeypatch.setattr(module, "transcribe_events", heard)
    arguments = ["transcribe", model, str(videos), "--language", "en", "--format", "srt", "-o", str(out)]
    assert main(arguments) == 0
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert names == ["a.flac.srt", "a.wav.srt", "b.srt", "sub/a.srt"]
    assert seen == [0, 1, 2, 3]
    errors = capsys.readouterr().err
    assert f"{videos}: 2 files are not taken, no audio or video (the first: {videos / 'README.md'})" in errors

    (videos / "new.wav").write_bytes((videos / "a.wav").read_bytes())
    (out / "a.wav.srt").write_text("corrected by hand")
    assert main([*arguments, "--skip-existing"]) == 0
    assert "4 left out, whose files exist: a.flac, a.wav, b.unknown" in capsys.readouterr().err
    assert (out / "a.wav.srt").read_text() == "corrected by hand"
    assert (out / "new.srt").exists()
    assert main([*arguments, "--skip-existing"]) == 0
    assert "5 left out" in capsys.readouterr().err


def test_one_file_goes_to_stdout(model, clips, capsys, monkeypatch):
    import canter.inference.bulk as module

    def heard(engine, tokenizer, utterances, longest, asked):
        yield 0, Transcription("One two. Three.")

    monkeypatch.setattr(module, "transcribe_events", heard)
    arguments = ["transcribe", model, str(clips / "good.wav"), "--language", "en"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "One two. Three.\n"
    assert main([*arguments, "--format", "srt"]) == 0
    assert capsys.readouterr().out == "1\n00:00:00,000 --> 00:00:01,000\nOne two. Three.\n\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--max-line-width", "0"], "max line width 0: at least 1"),
        (["--max-line-width", "30"], "--max-line-width: for subtitles, and the format is txt"),
        (["--cues", "sentence", "--format", "tsv"], "--cues: for subtitles, and the format is tsv"),
        (["--highlight-words", "--format", "srt", "--timestamps", "segment"], "leave out --timestamps segment"),
        (["--skip-existing", "--format", "srt"], "name a folder"),
        (["--skip-existing", "-o", "folder"], "add --format srt"),
    ],
)
def test_options_of_subtitles_that_do_not_go_together(model, clips, capsys, given, message):
    assert main(["transcribe", model, str(clips / "good.wav"), "--language", "en", *given]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_a_model_without_times_of_words(model, clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("canter.inference.engine.engine.Engine.aligns", False)
    out = tmp_path / "x.srt"
    arguments = ["transcribe", model, str(clips / "good.wav"), "--language", "en", "-o", str(out)]
    assert main(arguments) == 0
    assert "in proportion to their characters" in capsys.readouterr().err
    assert out.exists()
    assert main([*arguments, "--max-line-width", "30", "--cues", "sentence"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--max-line-width", "30"]) == 1
    assert "cannot compute times of words" in capsys.readouterr().err


def test_an_option_without_effect_says_so(model, clips, tmp_path, capsys):
    given = ["--language", "en", "-o", str(tmp_path / "x.srt"), "--max-line-count", "1"]
    assert main(["transcribe", model, str(clips / "good.wav"), *given]) == 0
    assert "max-line-count has no effect" in capsys.readouterr().err


def test_once_what_failed_is_mended_the_others_are_not_decoded_again(model, clips, tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    for name in ("good.wav", "stereo.wav"):
        (tmp_path / "clips" / name).write_bytes((clips / name).read_bytes())
    late = tmp_path / "clips" / "late.wav"
    late.write_bytes(b"")
    out = tmp_path / "out.jsonl"
    arguments = ["transcribe", model, str(tmp_path / "clips"), "--language", "en", "-o", str(out), "--json"]
    assert main(arguments) == 1
    assert "out.jsonl.partial; fix the failures" in capsys.readouterr().err
    late.write_bytes((clips / "good.wav").read_bytes())
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["resumed"], summary["transcribed"], summary["counters"]["utterances"]) == (2, 3, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "out.jsonl"]


def test_two_ranks_share_a_manifest_and_resume_from_one(model, clips, tmp_path, free_port):
    """Both transcribe, rank 0 writes it all, and what one rank had done before stays done."""
    lines = [
        {"audio_filepath": str(clips / name), "lang": "en", "id": f"{name}{offset}", "offset": offset, "duration": 0.1}
        for name in ("good.wav", "stereo.wav", "8khz.wav")
        for offset in (0.0, 0.1, 0.2, 0.3)
    ]
    lines.append({"audio_filepath": str(clips / "bad-nan.wav"), "duration": 0.5, "lang": "en"})
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone, out = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    arguments = ["transcribe", model, str(manifest), "--batch-size", "4", "-o"]
    assert main([*arguments, str(alone)]) == 1

    from canter.inference.inputs import read_items
    from canter.inference.resume import Partial

    done = [item.utterance for item in read_items([manifest])][:3]
    partial = Partial(tmp_path / "out.jsonl.partial", identity(Path(model), Options(Path(model), ()), "none"))
    for utterance in done:
        assert utterance
        partial.add(utterance, Transcription("kept"))
    partial.close()
    with free_port() as port:
        together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "canter", *arguments, str(out), "--json"],
                env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        (said, errors), (silent, other) = [rank.communicate(timeout=1800) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], errors + other
    assert silent == ""
    summary = json.loads(said)
    assert (summary["ranks"], summary["resumed"], summary["transcribed"]) == (2, 3, 12)
    assert summary["counters"]["utterances"] == 9
    assert "bad-nan.wav" in summary["failed"][0]["audio_filepath"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [json.loads(line) for line in alone.read_text().splitlines()]
    assert [row.get("pred_text") for row in rows[:3]] == ["kept"] * 3
    assert rows[3:] == expected[3:]
    kept = ["alone.jsonl.partial", "out.jsonl.partial", "out.jsonl.partial-1"]  # for when bad-nan.wav is mended
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(["alone.jsonl", "m.jsonl", "out.jsonl", *kept])


def test_a_lost_rank_ends_the_others_with_a_message(model, clips, tmp_path, free_port):
    """Finished rows are kept, so that the same command resumes."""
    good = str(clips / "good.wav")
    lines = [
        {"audio_filepath": good, "lang": "en", "id": str(n), "offset": n / 10_000, "duration": 0.1} for n in range(2000)
    ]
    manifest, out = tmp_path / "m.jsonl", tmp_path / "out.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "canter", "transcribe", model, str(manifest), "--batch-size", "1", "-o", str(out)]
    with free_port() as port:
        together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        first, second = [
            subprocess.Popen(
                command,
                env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        theirs = tmp_path / "out.jsonl.partial-1"
        while not (theirs.exists() and theirs.read_text().count("\n") > 1):
            assert second.poll() is None
            time.sleep(0.01)
        second.kill()
        _, errors = first.communicate(timeout=1800)
        second.communicate()
    assert first.returncode == 1
    # On a busy machine the silence of the other rank may be noticed before its closed connection.
    lost = r"canter: rank (0 of 2: another rank was lost|1 of 2 gave no sign of life).*the same command resumes"
    assert re.search(lost, errors)
    assert "Traceback" not in errors
    assert not out.exists()
    assert theirs.exists()


def test_media_on_standard_input(model, clips, tmp_path, monkeypatch):
    import canter.corpus.audio as audio

    audio._standard_input.cache_clear()
    with open(clips / "good.wav", "rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
        arguments = ["transcribe", model, "-", "--language", "en", "--format", "txt", "-o", str(tmp_path / "out")]
        assert main(arguments) == 0
    assert (tmp_path / "out" / "stdin.txt").exists()
    audio._standard_input.cache_clear()


def test_an_audio_track_that_is_not_there(model, clips, tmp_path, capsys):
    arguments = ["transcribe", model, str(clips / "good.wav"), "--language", "en", "--audio-track"]
    assert main([*arguments, "1", "-o", str(tmp_path / "out.jsonl")]) == 1
    assert "has no audio track 1: it has one, counted from 0" in capsys.readouterr().err
    assert main([*arguments, "-1", "-o", str(tmp_path / "out.jsonl")]) == 1
