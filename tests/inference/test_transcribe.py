"""Files, folders and manifests give rows in order; bad ones are named and never stop the others."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from canter import load
from canter.cli.main import main
from canter.errors import CheckpointError, ConfigError, ManifestError
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig
from canter.inference.inputs import read_items
from canter.inference.recording import TranscribeConfig, Transcriber
from canter.inference.transcribe import Decoded, transcribe, transcribe_events
from canter.models.formats.checkpoint import save_model
from canter.models.hub import checkpoint_of
from canter.text import train_tokenizer

from .conftest import noises, small_model

FILES = ("txt", "srt", "vtt", "tsv", "json")
SENTENCES = ["one two three", "four five six seven", "eight nine ten", "three one two", "the end of it all"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run folder with a model and a tokenizer that belong together, clips, and a manifest."""
    root = tmp_path_factory.mktemp("transcribe")
    tokenizer = train_tokenizer(SENTENCES * 20, languages=["en", "de"], vocab_size=40)
    model = small_model(vocabulary=tokenizer.vocab_size, seed=30)  # which writes text
    for step in ("step-000001", "step-000002"):
        save_model(model, root / "run" / "checkpoints" / step, tokenizer)
    (root / "clips").mkdir()
    rows = []
    for number, clip in enumerate(noises(12)):
        soundfile.write(root / "clips" / f"{number:02d}.wav", clip, 16000)
        row = {"speaker": number, "audio_filepath": f"clips/{number:02d}.wav", "duration": len(clip) / 16000}
        rows.append({**row, "text": "one two", "lang": "en"})
    (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_manifest_keeps_fields_and_order(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    assert main(["transcribe", str(folder / "run"), str(folder / "manifest.jsonl"), "-o", str(out)]) == 0
    rows = rows_of(out)
    originals = rows_of(folder / "manifest.jsonl")
    assert [{key: value for key, value in row.items() if key != "pred_text"} for row in rows] == originals
    assert all(isinstance(row["pred_text"], str) for row in rows)
    assert len({row["pred_text"] for row in rows}) > 3
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("batch_size", ["1", "5"])
def test_batch_size_changes_nothing(folder, tmp_path, batch_size):
    results = []
    for extra in ([], ["--batch-size", batch_size]):
        out = tmp_path / f"{len(extra)}.jsonl"
        main(["transcribe", str(folder / "run"), str(folder / "manifest.jsonl"), "-o", str(out), *extra])
        results.append(out.read_text())
    assert results[0] == results[1]


def test_bad_items_are_named_and_others_continue(folder, tmp_path, capsys):
    (tmp_path / "noise.wav").write_bytes(b"this is no sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "stereo.wav", np.stack([noises(1)[0]] * 2, 1), 8000)
    soundfile.write(tmp_path / "one.wav", np.zeros(1), 16000)
    manifest = tmp_path / "m.jsonl"
    lines = [
        {"audio_filepath": "noise.wav", "duration": 1.0, "lang": "en"},
        {"audio_filepath": "stereo.wav", "lang": "de", "text": ""},
        {"audio_filepath": "absent.wav", "duration": 2.0, "lang": "en"},
        {"audio_filepath": "one.wav", "duration": 0.1, "lang": "en"},
        {"audio_filepath": "stereo.wav", "duration": 1.0, "lang": "xx"},
        {"duration": 1.0},
        {"audio_filepath": "stereo.wav", "duration": 0.5, "_skipme": True},
        {"audio_filepath": "stereo.wav", "lang": "de", "text": ""},
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{torn\n")
    out = tmp_path / "out.jsonl"
    assert main(["transcribe", str(folder / "run"), str(manifest), "-o", str(out), "--json"]) == 1
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["utterances"], summary["transcribed"], len(summary["failed"])) == (8, 3, 5)
    rows = rows_of(out)
    assert ["pred_text" in row for row in rows] == [False, True, False, True, False, False, True, False]
    assert rows[1]["pred_text"] == rows[6]["pred_text"]
    for row, reason in [(0, "noise.wav"), (2, "absent.wav"), (4, "xx"), (5, "m.jsonl:6"), (7, "m.jsonl:9")]:
        assert reason in rows[row]["error"]
        assert rows[row]["error"] in captured.err
    assert main(["transcribe", str(folder / "run"), str(tmp_path / "empty.wav")]) == 1


def test_a_batch_of_only_bad_files(folder, tmp_path):
    """The queue does not end where an encoder batch comes to nothing."""
    manifest = tmp_path / "m.jsonl"
    rows = [{"audio_filepath": f"absent{number}.wav", "duration": 9.0, "lang": "en"} for number in range(30)]
    rows += [{"audio_filepath": str(folder / "clips" / "00.wav"), "duration": 1.0, "lang": "en"}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    assert main(["transcribe", str(folder / "run"), str(manifest), "-o", str(out), "--batch-size", "2"]) == 1
    assert ["error" in row for row in rows_of(out)] == [True] * 30 + [False]


def test_languages_of_rows_are_reported(folder, tmp_path, capsys):
    clip = str(folder / "clips" / "03.wav")
    manifest = tmp_path / "one.jsonl"
    rows = [{"audio_filepath": clip, "lang": "en"}, {"audio_filepath": clip}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = str(tmp_path / "out.jsonl")
    assert main(["transcribe", str(folder / "run"), str(manifest), "--language", "de", "-o", out]) == 0
    assert "--language de is for rows that name none; 1 name another language (en)" in capsys.readouterr().err
    assert main(["transcribe", str(folder / "run"), str(manifest), "--language", "en", "-o", out]) == 0
    assert "name their own" not in capsys.readouterr().err


def test_folder_and_formats(folder, tmp_path, capsys):
    clips = str(folder / "clips")
    assert main(["transcribe", str(folder / "run"), clips, "--language", "en", "-o", str(tmp_path / "all"),
                 "--format", "all"]) == 0  # fmt: skip
    names = {path.name for path in (tmp_path / "all").iterdir()}
    assert names == {f"{n:02d}.{kind}" for n in range(12) for kind in FILES} | {"transcripts.jsonl"}
    rows = rows_of(tmp_path / "all" / "transcripts.jsonl")
    value = json.loads((tmp_path / "all" / "03.json").read_text())
    assert value["text"] == rows[3]["pred_text"] == (tmp_path / "all" / "03.txt").read_text().strip()
    assert value["language"] == "en"
    assert value["segments"][0]["end"] == pytest.approx(rows[3]["duration"], abs=0.1)
    capsys.readouterr()
    assert main(["transcribe", str(folder / "run"), f"{clips}/03.wav", "--language", "en"]) == 0
    assert capsys.readouterr().out.strip() == value["text"]


def test_same_stems_get_numbers(folder, tmp_path):
    clip = str(folder / "clips" / "01.wav")
    main(["transcribe", str(folder / "run"), clip, clip, "--language", "en", "-o", str(tmp_path / "x"),
          "--format", "txt"])  # fmt: skip
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"01.txt", "01-2.txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "absent.wav"], "absent.wav does not exist"),
        (["RUN", "absent/"], "absent/ does not exist"),
        (["RUN"], "nothing to transcribe"),
        (["absent", "CLIP"], "absent does not exist"),
        (["RUN", "CLIP", "--format", "all"], "name a folder"),
        (["RUN", "CLIP", "--format", "all", "-o", "a.txt"], "name a folder"),
        (["RUN", "CLIP", "--json"], "--output"),
        (["RUN", "CLIP", "-o", "a.jsonl.gz"], "not compressed"),
        (["RUN", "CLIP", "--batch-size", "0"], "at least 1"),
        (["RUN", "CLIP", "--max-repeats", "-1"], "0, no limit, or more"),
        (["RUN", "CLIP", "--device", "cuda"], "no GPU is available"),
        (["RUN", "CLIP", "--language", "en", "--prompt", "Dr. Quilter"], "takes no text before"),
    ],
)
def test_misuse_is_one_line(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    names = {"RUN": "run", "CLIP": "clips/00.wav"}
    assert main(["transcribe", *(names.get(argument, argument) for argument in arguments)]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_stopped_transcription_resumes(folder, tmp_path, monkeypatch, capsys):
    """Stopped by Ctrl-C after some results: these are kept, the others added, and the result is the same."""
    import canter.inference.bulk as module

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    arguments = ["transcribe", str(folder / "run"), str(folder / "manifest.jsonl"), "-o"]
    main([*arguments, str(whole)])

    def stopped(*given):
        done = 0
        for event in transcribe_events(*given):
            if done == 5:
                raise KeyboardInterrupt
            done += not isinstance(event, Decoded)
            yield event

    monkeypatch.setattr(module, "transcribe_events", stopped)
    assert main([*arguments, str(out)]) == 130
    assert not out.exists()
    partial = tmp_path / "out.jsonl.partial"
    with open(partial, "a") as file:
        file.write('{"item": 3, "te')  # torn
    monkeypatch.setattr(module, "transcribe_events", transcribe_events)
    capsys.readouterr()
    assert main([*arguments, str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"5 kept from an earlier start: (\d\d\.wav, ){4}\d\d\.wav\n", captured.err)
    summary = json.loads(captured.out)
    assert summary["resumed"] == 5
    assert summary["counters"]["utterances"] == 7
    assert out.read_text() == whole.read_text()
    assert not partial.exists()


def test_run_folder_stands_for_its_best_checkpoint(folder, tmp_path):
    run = folder / "run"
    assert checkpoint_of(run).name == "step-000002"
    best = run / "checkpoints" / "best.json"
    best.write_text('{"checkpoint": "step-000001", "wer": 0.1}')
    assert checkpoint_of(run).name == "step-000001"
    best.write_text("{")
    with pytest.raises(CheckpointError, match=r"best\.json is damaged"):
        checkpoint_of(run)
    best.unlink()
    assert checkpoint_of(tmp_path) == tmp_path
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        checkpoint_of(tmp_path)


def test_too_long_and_empty_folder(folder, tmp_path):
    with pytest.raises(ManifestError):
        read_items([tmp_path])
    from canter import load_model

    model = load_model(checkpoint_of(folder / "run"))
    items = read_items([folder / "manifest.jsonl"])
    utterances = [item.utterance for item in items if item.utterance]
    found = transcribe(Engine(model, model.tokenizer.end, EngineConfig()), model.tokenizer, utterances, 1.0)
    for utterance, transcription in zip(utterances, found):
        assert (transcription.error is not None) == (utterance.duration > 1.0)


def test_a_model_says_what_long_audio_is_cut_into(folder, tmp_path):
    """Its own windows where it tells, unless asked for others."""
    from canter import load_model

    model = load_model(checkpoint_of(folder / "run"))
    windows = {}
    for told, asked in ((None, None), (12.0, None), (12.0, 20.0)):
        model.generation = {} if told is None else {"window_seconds": told}
        save_model(model, tmp_path / f"{told}", model.tokenizer)
        engine = Engine(load_model(tmp_path / f"{told}"), model.tokenizer.end)
        listener = Transcriber(engine, model.tokenizer, TranscribeConfig(chunk_seconds=asked, vad="none"))
        pieces = list(listener.chunks([np.zeros(16000 * 50, np.float32)]))
        windows[told, asked] = max(len(piece.samples) for piece in pieces) / 16000
    assert windows == {(None, None): 40.0, (12.0, None): 12.0, (12.0, 20.0): 20.0}


def test_owsm_writes_long_audio_in_segments_whatever_the_batch():
    """More than two windows of audio: language detection, timestamps, times of words, translation."""
    shared = Path(os.environ.get("CANTER_SHARED", "absent"))
    if not shared.is_dir():
        pytest.skip("CANTER_SHARED names no folder with OWSM fixtures")
    model, audio = load(shared / "fixtures" / "owsm" / "v31"), shared / "cases" / "inference" / "german_65s.opus"
    found = model.transcribe(audio, timestamps="segment")
    assert found.language in ("en", "de", "fr")
    assert 0 < found.language_probability <= 1
    assert len(found.segments) > 2
    times = [time for segment in found.segments for time in (segment.start, segment.end)]
    assert times == sorted(times)
    assert times[-1] <= found.duration + 0.02
    assert times[-1] > 30, "the second window is missing"
    assert "<" not in found.text.replace("<unk>", "")
    for size in (1, 8):
        others = [*model.transcribe([audio, audio], timestamps="segment", batch_size=size)]
        for other in others:
            assert [(s.start, s.end, s.tokens) for s in other.segments] == [
                (s.start, s.end, s.tokens) for s in found.segments
            ]
    translated = model.transcribe(audio, language="German", task="translate", timestamps="word")
    assert translated.words
    assert all(word.start <= word.end for word in translated.words)
    with pytest.raises(ConfigError, match="French"):
        model.transcribe(audio, task="translate", target_language="fr")
    with pytest.raises(ConfigError, match="Japanese"):
        model.transcribe(audio, language="ja")
