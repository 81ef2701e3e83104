"""``canter train`` as a user types it: what it says of mistakes, and that Ctrl-C loses nothing."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from canter.cli.main import main
from canter.demo.synthesis import synthesise
from canter.planning.budget import Budget

SMALL = shlex.split("""
    --model.encoder-layers 1 --model.decoder-layers 1 --model.width 32 --model.heads 2 --model.subsampling-channels 8
    --model.mels 40 --batch-seconds 12 --threads 1 --precision float32 --vocab-size 100
""")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    return synthesise(tmp_path_factory.mktemp("spoken"), utterances=40, test_utterances=6, workers=1)


def arguments(spoken, output: Path, *more: str) -> list[str]:
    budget = output.parent / "budget.json"
    Budget.from_batch_seconds(60.0).save(budget)
    files = ["--manifest", str(spoken.train_manifest), "--output", str(output), "--budget", str(budget)]
    return ["train", *files, *SMALL, "--workers", "0", *more]


def test_train_transcribe_score_report(spoken, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments(spoken, run, "--steps", "3", "--valid", str(spoken.test_manifest))) == 0
    result = tmp_path / "result.jsonl"
    assert main(["transcribe", str(run), str(spoken.test_manifest), "--output", str(result)]) == 0
    rows = [json.loads(line) for line in result.read_text().splitlines()]
    assert len(rows) == 6
    assert all("pred_text" in row for row in rows)
    capsys.readouterr()
    assert main(["score", str(result), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["wer"] > 0
    assert main(["report", str(run)]) == 0
    assert "<svg" in (run / "report.html").read_text()


def test_a_file_and_flags_over_it(spoken, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"manifest: {spoken.train_manifest}\nsteps: 7\nseed: 5\n")
    assert main(["train", str(tmp_path / "c.yaml"), "--seed", "6", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 7" in printed
    assert "seed: 6" in printed


def test_a_run_resumes_wherever_it_is(spoken, tmp_path, capsys, monkeypatch):
    """Its paths were given relative to another folder."""
    home, away = tmp_path / "home", tmp_path / "away"
    shutil.copytree(spoken.train_manifest.parent, home)
    away.mkdir()
    monkeypatch.chdir(home)
    files = ["--valid", spoken.test_manifest.name, "--save-every", "1"]
    local = dataclasses.replace(spoken, train_manifest=Path(spoken.train_manifest.name))
    assert main(arguments(local, Path("run"), "--steps", "2", *files)) == 0
    assert main(["train", "run", "--steps", "3", "--allow-changes"]) == 0
    monkeypatch.chdir(away)
    (home / "run").rename(away / "moved")
    capsys.readouterr()
    assert main(["train", "moved", "--steps", "4", "--allow-changes"]) == 0
    assert "continuing at step 3 of 4" in capsys.readouterr().err
    assert [path.name for path in away.iterdir()] == ["moved"]
    home.rename(tmp_path / "elsewhere")
    assert main(["train", "moved"]) == 1
    manifest = spoken.train_manifest.name
    said = " ".join(capsys.readouterr().err.split())
    assert f"{home / manifest}: no such file, the --manifest of moved" in said
    named = ["--manifest", str(tmp_path / "elsewhere" / manifest), "--allow-changes"]
    assert "canter train moved --manifest FILE --allow-changes" in said
    named += ["--valid", str(tmp_path / "elsewhere" / spoken.test_manifest.name), "--steps", "5"]
    assert main(["train", "moved", *named]) == 0
    assert "continuing at step 4 of 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--manifest", "nowhere.jsonl"], "nowhere.jsonl"),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        ([], "no training data"),
        (["--manifest", "{tmp}/broken.jsonl"], "broken.jsonl"),
        (["--manifest", "{tmp}/empty.jsonl"], "empty.jsonl"),
        (["--manifest", "{train}", "--tokenizer", "{tmp}"], "no tokenizer"),
        (["--manifest", "{train}", "--output", "{tmp}/file.txt/run"], "cannot write there"),
        (["--manifest", "{train}", "--output", "{tmp}"], "is not a run"),
        (["--manifest", "{train}", "--device", "cuda:7"], "no GPU is available"),
        (["--manifest", "{train}", "--strategy", "alphabetical"], "alphabetical"),
        (["--manifest", "{train}", "--budget", "{tmp}/broken.jsonl"], "broken.jsonl"),
    ],
)
def test_mistakes_take_one_line(spoken, tmp_path, capsys, more, says):
    (tmp_path / "broken.jsonl").write_text('{"audio_filepath": "a.wav", "duration": -1, "text": "x"}\nnot json\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "file.txt").write_text("")
    filled = [part.format(tmp=tmp_path, train=spoken.train_manifest) for part in more]
    if "--output" not in filled:
        filled += ["--output", str(tmp_path / "run")]
    assert main(["train", *filled, *SMALL, "--steps", "1"]) == 1
    printed = capsys.readouterr().err
    assert says in printed
    assert "Traceback" not in printed


def test_a_mistake_does_not_hold_the_folder(spoken, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--manifest", "nowhere.jsonl", "--output", str(run), *SMALL]) == 1
    assert main(arguments(spoken, run, "--steps", "1")) == 0


def test_ctrl_c_saves_and_the_same_command_resumes(spoken, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "canter", *arguments(spoken, run, "--steps", "4000", "--workers", "1")]
    metrics = run / "metrics.jsonl"

    def interrupted(number: int, after: int) -> str:
        """Return the output of the command that gets a signal once ``after`` steps are logged."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            while process.poll() is None:  # it ends by itself, if late
                if metrics.exists() and len(metrics.read_text().splitlines()) >= after:
                    os.killpg(process.pid, number)  # as a terminal does: the data worker gets it too
                    break
                time.sleep(0.05)
            said = process.communicate(timeout=1800)[1]
        assert process.returncode == 130, said
        assert said.strip().endswith("canter: interrupted; what was finished is kept")
        assert "Traceback" not in said
        return said

    interrupted(signal.SIGINT, 3)
    taken = len(metrics.read_text().splitlines())
    state = json.loads(next(run.glob("checkpoints/step-*/training/state.json")).read_text())
    assert state["step"] == taken < 4000
    assert f"continuing at step {taken} of 4000" in interrupted(signal.SIGTERM, taken + 2)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
