"""The report of whole, partial and damaged run folders."""

import json
from pathlib import Path

import numpy as np
import pytest

from canter.corpus.index import LengthIndex
from canter.errors import ConfigError
from canter.planning.budget import Budget, Polynomial
from canter.reporting.run_report import duration, read_run, run_report, weighted_padding


@pytest.fixture
def folder(tmp_path: Path, metrics) -> Path:
    run = tmp_path / "an4"
    (run / "checkpoints" / "step-000060").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 17\n")
    (run / "budget.json").write_text('{"format": "canter-budget/1"}')
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    skipped = {"file": "train.jsonl", "line": 3, "reason": "audio missing: a.wav"}
    (run / "skipped.jsonl").write_text(json.dumps(skipped) + "\n")
    return run


def test_everything_is_told(folder: Path):
    page = run_report(folder)
    for told in (
        "Run an4", "60 steps", "best WER", "Loss", "Error rates in validation", "Learning rate",
        "Batch shapes", "Audio hours per wall hour", "Padded audio", "Waiting for data", "Step time",
        "seed: 17", "step-000060", "canter-budget/1", "audio missing", "train.jsonl",
    ):  # fmt: skip
        assert told in page, told
    assert '<div class="value">1.7%</div>' in page  # the best WER, 1/60
    assert '<div class="value">40</div>' in page  # 20 s of audio in 0.5 s
    assert '<div class="value">10.0%</div>' in page  # 0.05 s of 0.5 s waiting
    assert '<div class="value">20.0%</div>' in page  # padding
    assert "&lt;b&gt;" not in page.split("Transcripts")[0]
    assert 'class="missing"' not in page


def test_translations_have_their_bleu_drawn(folder: Path):
    assert "BLEU" not in run_report(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        row = {"kind": "valid", "step": 60, "wer": 0.9, "bleu": 15.0, "bleu_de": 20.0, "bleu_fr": 10.0}
        file.write(json.dumps(row) + "\n")
    assert "BLEU in validation, into de, fr" in run_report(folder)


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("config.yaml", "No config.yaml."),
        ("budget.json", "No budget.json."),
        ("metrics.jsonl", "the run has not reached its first step"),
        ("checkpoints/step-000060", "No checkpoint yet."),
    ],
)
def test_what_is_missing_is_named(folder: Path, gone: str, named: str):
    path = folder / gone
    path.rmdir() if path.is_dir() else path.unlink()
    assert any(named in sentence for sentence in read_run(folder).missing)


def test_a_run_cut_off_anywhere_can_be_reported(folder: Path):
    whole = (folder / "metrics.jsonl").read_bytes()
    for size in range(0, len(whole), 97):
        (folder / "metrics.jsonl").write_bytes(whole[:size])
        run = read_run(folder)
        assert len(run.train) + len(run.valid) in (whole[:size].count(b"\n"), whole[:size].count(b"\n") + 1)
    (folder / "metrics.jsonl").write_bytes(whole[:-10])
    assert "1 unreadable lines, the first is line 63" in run_report(folder)


def test_rows_that_lack_metrics_are_used_as_far_as_they_go(folder: Path):
    rows = [
        {"kind": "train", "step": 1},
        {"kind": "train", "step": 2, "loss": None},
        {"kind": "valid", "step": 2},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = run_report(folder)
    assert "2 steps" in page
    assert "Batch shapes" not in page


def test_steps_done_again_after_a_resume_count_once(folder: Path, metrics):
    again = [{**row, "loss": 7.0} for row in metrics if row["kind"] == "train" and row["step"] > 50]
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in again)
    run = read_run(folder)
    assert list(run.column("step")) == list(range(1, 61))
    assert list(run.column("loss")[-10:]) == [7.0] * 10
    assert run.missing == ["10 steps were done again after a resume; the last time counts."]


def test_padding_is_weighted_by_audio(folder: Path):
    rows = [
        {"kind": "train", "step": 1, "audio_seconds": 50.0, "padding": 0.5},  # 50 of 100 s
        {"kind": "train", "step": 2, "audio_seconds": 300.0, "padding": 0.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert weighted_padding(read_run(folder)) == pytest.approx(50 / 400)


def test_the_budget_is_drawn_with_the_lengths_it_is_for(folder: Path):
    assert "Largest batch" not in run_report(folder)  # neither lengths nor a whole budget
    budget = Budget(1e9, Polynomial(T=1e5, U=1e4), Polynomial(T=1e-4), 1e7, measured_on={"device": "cpu"})
    budget.save(folder / "budget.json")
    LengthIndex(np.linspace(1, 9, 50, dtype=np.float32), np.arange(3, 53)).save(folder / "lengths.arrow")
    page = run_report(folder)
    assert "Largest batch" in page
    assert "measured before the run" not in page
    row = {"format": "canter-probes/1", "measured_on": {"device": "cpu"}, "frames": 50, "tokens": 20}
    rows = [row | {"batch": b, "bytes": 2e7 * b, "seconds": 0.1 * b} for b in (1, 4, 16)]
    rows += [row | {"batch": 999, "bytes": 2e9, "seconds": None, "fits": False}]
    rows += [row | {"measured_on": {"device": "H100"}, "batch": 9, "bytes": 1e8, "seconds": 0.1}]
    (folder / "budget.probes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    page = run_report(folder)
    assert "Left, 3 steps measured before the run" in page
    (folder / "budget.probes.jsonl").write_text("{")
    assert "Largest batch" not in run_report(folder)


def test_what_is_no_run_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match="neither metrics"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        read_run(tmp_path / "none")


def test_duration():
    assert [duration(seconds) for seconds in (0.5, 42.2, 125, 11520)] == [
        "0.5 s",
        "42 s",
        "2 min 5 s",
        "3 h 12 min",
    ]


def test_ranks_memory_and_events_are_shown(folder: Path, metrics):
    rows = [
        row | {"rank_seconds": [0.4, 0.3], "memory_filled": 0.97, "memory_peak": 0.0}
        for row in metrics
        if row["kind"] == "train"
    ]
    rows += [{"kind": "event", "step": 7, "what": "out of memory", "number": 1, "parts": 2, "limit": 5.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = run_report(folder)
    for told in (
        "Ranks",
        "waiting for the slowest rank in grey",
        "Memory filled",
        "Events",
        "out of memory",
        "parts 2",
    ):
        assert told in page, told
