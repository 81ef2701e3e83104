"""The report of complete, partial and damaged run folders."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from canter.corpus.index import LengthIndex
from canter.errors import ConfigError
from canter.planning.budget import Budget, Polynomial
from canter.reporting.gain import gain
from canter.reporting.run_curves import changed_totals, curves, duration
from canter.reporting.run_folder import read_run
from canter.reporting.run_report import run_report, word_errors


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


def test_everything_is_shown(folder: Path):
    page = run_report(folder)
    for told in (
        "Run an4", "60 steps", "WER in validation", "Loss", "Error rates in validation", "Learning rate",
        "Batch shapes", "Audio hours per wall hour", "Padded audio", "Waiting for data", "Step time", "Transcripts",
        "seed: 17", "step-000060", "canter-budget/1", "audio missing", "train.jsonl",
    ):  # fmt: skip
        assert told in page, told
    assert '<div class="value">1.7%</div>' in page  # the best WER, 1/60
    assert '<div class="value">40</div>' in page  # 20 s of audio in 0.5 s
    assert "3 s in all" in page  # 0.05 s a step waiting
    assert '<div class="value">20.0%</div>' in page  # padding
    assert '<mark title="for: cat">&lt;b&gt;bat&lt;/b&gt;</mark>' in page
    assert "What the batches gained" not in page  # neither lengths nor a budget
    assert 'class="missing"' not in page


def test_translations_have_their_bleu_drawn(folder: Path):
    assert "BLEU" not in run_report(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (40, 60):
            row = {"kind": "valid", "step": step, "wer": 0.9, "bleu": 15.0, "bleu_de": 20.0, "bleu_fr": 10.0}
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
    rows = [{"kind": "train", "step": 1}, {"kind": "train", "step": 2, "loss": None}, {"kind": "valid", "step": 2}]
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
    assert run.missing == ["10 steps were repeated after a resume; the last time counts."]


def test_padding_is_weighted_by_audio(folder: Path):
    rows = [
        {"kind": "train", "step": 1, "audio_seconds": 50.0, "padding": 0.5},  # 50 of 100 s
        {"kind": "train", "step": 2, "audio_seconds": 300.0, "padding": 0.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(folder).padded_fraction == pytest.approx(50 / 400)


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


def test_folders_that_are_not_runs_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="neither metrics"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        read_run(tmp_path / "none")


def test_duration():
    assert [duration(seconds) for seconds in (0.5, 42.2, 125, 11520)] == ["0.5 s", "42 s", "2 min 5 s", "3 h 12 min"]


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
        "Problems",
        "out of memory",
        "parts 2",
    ):
        assert told in page, told


@pytest.fixture
def trained(folder: Path) -> Path:
    """The folder with lengths, a budget and the batches of its steps: pairs of neighbours in length."""
    seconds = np.random.default_rng(0).uniform(1, 9, 120).astype(np.float32)
    LengthIndex(seconds, np.full(120, 10)).save(folder / "lengths.arrow")
    Budget(1e9, Polynomial(T=1e5), Polynomial(T=1e-3), 1e7, fixed_seconds=0.1).save(folder / "budget.json")
    pairs = np.argsort(seconds).reshape(60, 2).tolist()
    lines = [{"step": step, "epoch": 0, "rows": [pair]} for step, pair in enumerate(pairs, 1)]
    (folder / "utterances.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text('{"micro_batches_per_step": 1, "precision": "float32"}')
    return folder


def test_the_gain_over_random_batches_is_the_planners(trained: Path):
    found = gain(read_run(trained))
    assert found is not None
    assert not found.fills_memory
    random, bucket = found.others
    assert (random.name, bucket.name) == ("random", "bucket_2d")
    assert random.figures.mean_batch == 2  # as many utterances a batch as the run has, so as many updates
    assert bucket.figures.mean_batch == pytest.approx(2, rel=0.3)
    assert (found.own.updates, random.updates) == (60, 60)
    index = LengthIndex.open(trained / "lengths.arrow")
    order = np.sort(np.ceil(np.asarray(index.seconds, float) / 0.08)).reshape(60, 2)
    assert found.own.figures.padded_audio == pytest.approx(1 - order.sum() / (2 * order[:, 1].sum()))
    assert found.own.figures.padded_compute < 0.05 < 0.15 < random.figures.padded_compute
    hours = (60 * 0.1 + 1e-3 * 2 * order[:, 1].sum()) / 3600
    assert found.own.figures.hours == pytest.approx(hours)
    assert found.speedup == pytest.approx(random.figures.hours / hours)
    page = run_report(trained)
    assert page.count("predicted</span>") >= 5
    assert "The number of updates an epoch limits" in page
    sizes = {"utterances": 2.0, "limited_by": "the size of the data; --min-steps changes it"}
    (trained / "run.json").write_text(json.dumps({"steps": 60, "batches": sizes, "batch_limits": {}}))
    assert "batches are limited by the size of the data; --min-steps changes it." in run_report(trained)
    for told in ("random, predicted", "What the batches gained", "A batch of this run", f"{found.speedup:.1f}×"):
        assert told in page, told


def test_a_packed_run_is_not_said_to_be_padded(trained: Path):
    padded = gain(read_run(trained))
    (trained / "config.yaml").write_text("strategy: packed\n")
    found = gain(read_run(trained))
    assert padded is not None
    assert found is not None
    assert (padded.packed, found.packed) == (False, True)
    assert found.own.figures.padded_audio == 0 < padded.own.figures.padded_audio
    page = run_report(trained)
    assert "stand one after the other" in page
    assert "A batch of this run: packed" in page
    assert "Every utterance of a batch is padded" not in page


def table_of(page: str) -> dict[str, list[str]]:
    """Return the rows of the table of predicted and measured figures by name; "" is its header."""
    text = page.split("What the batches gained")[1].split("</table>")[0]
    rows = re.findall(r"<tr.*?>(.*?)</tr>", text, re.DOTALL)
    cells = [[re.sub(r"<.*?>", " ", cell).split() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]
    return {" ".join(name): [" ".join(one) for one in others] for name, *others in cells}


def test_what_is_predicted_is_beside_what_was_measured(trained: Path, metrics):
    found = gain(read_run(trained))
    assert found is not None
    random, bucket, own = (row.figures for row in (*found.others, found.own))
    table = table_of(run_report(trained))
    assert table[""] == [
        "random predicted", "bucket_2d predicted", "this run predicted", "this run measured", "measured / predicted"
    ]  # fmt: skip
    faster = [f"{random.hours / one.hours:.2f}×" for one in (random, bucket, own)]
    assert table["speed relative to random"] == [*faster, "–", "–"]  # no other strategy was trained
    step = 3600 * own.hours / 60  # two utterances each, all of an epoch
    assert found.own.step_seconds == pytest.approx(step)
    assert table["time of a step"][2:] == [duration(step), "0.5 s", f"{0.5 / step:.2f}"]
    audio = float(np.sum(LengthIndex.open(trained / "lengths.arrow").seconds))
    assert found.own.audio_rate == pytest.approx(audio / 60 / step, rel=1e-5)
    assert table["audio hours per hour"][3:] == ["40.0", f"{40 / found.own.audio_rate:.2f}"]  # 20 s in 0.5 s
    assert table["time of an epoch"][3] == duration(audio / 40)
    assert table["padded audio"][2:4] == [f"{own.padded_audio:.1%}", "20.0%"]
    assert table["time spent waiting for data"] == ["–", "–", "–", "10.0%", "–"]
    assert table["memory budget filled by a micro-batch"][3] == "–"
    assert "peak memory of the device" not in table  # a CPU's is not measured
    rows = [row | {"rank_seconds": [0.5, 0.3], "waiting": 1.25, "memory_peak": 0.81} for row in metrics]
    (trained / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = run_report(trained)
    table = table_of(page)
    assert table["time of the slowest rank over the mean"][3] == "1.250"
    assert table["peak memory of the device"][3] == "81.0%"
    assert "for the same budget and 2 ranks" in page


def test_the_rates_of_the_others_do_not_depend_on_how_much_was_trained(trained: Path):
    whole = gain(read_run(trained))
    lines = (trained / "utterances.jsonl").read_text().splitlines(keepends=True)
    (trained / "utterances.jsonl").write_text("".join(lines[:20]))  # the shortest utterances
    part = gain(read_run(trained))
    assert whole is not None
    assert part is not None
    assert part.others[0].audio_rate == pytest.approx(whole.others[0].audio_rate)
    index = LengthIndex.open(trained / "lengths.arrow")
    shortest = np.sort(np.asarray(index.seconds, float))[:40]
    frames = np.ceil(shortest / 0.08).reshape(20, 2).max(1)
    seconds = float((0.1 + 2e-3 * frames).sum())
    assert part.own.step_seconds == pytest.approx(seconds / 20)
    assert part.own.audio_rate == pytest.approx(shortest.sum() / seconds, rel=1e-5)


def test_a_run_that_fills_the_memory_is_compared_at_the_same_memory(trained: Path):
    Budget(3.2e7, Polynomial(T=1e5), Polynomial(T=1e-3), 1e7).save(trained / "budget.json")
    found = gain(read_run(trained))
    assert found is not None
    assert found.fills_memory
    assert max(row.figures.over for row in found.others) == 0
    assert "The memory budget limits the batches" in run_report(trained)


def test_an_epoch_is_scaled_from_the_batches_that_were_taken(trained: Path):
    whole = gain(read_run(trained))
    lines = (trained / "utterances.jsonl").read_text().splitlines(keepends=True)
    (trained / "utterances.jsonl").write_text("".join(lines[::2]))
    half = gain(read_run(trained))
    assert whole is not None
    assert half is not None
    assert (half.taken, half.own.updates) == (60, 60)
    assert half.own.figures.hours == pytest.approx(whole.own.figures.hours, rel=0.03)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "epoch": 0, "rows": [[120]]}',
        '{"step": 1, "epoch": 0, "rows": [[1, [2]], [3]]}',
        '{"step": 1, "epoch": 0, "rows": [["one", 2]]}',
        '{"step": 1, "epoch": 0, "rows": [1]}',
        '{"step": 1, "epoch": "first", "rows": [[1]]}',
        "[" * 100_000,
    ],
    ids=["beyond", "nested", "text", "flat", "epoch", "deep"],
)
def test_rows_that_are_not_the_indexs_are_not_compared(trained: Path, line: str):
    (trained / "utterances.jsonl").write_text(line + "\n")
    assert gain(read_run(trained)) is None
    (trained / "utterances.jsonl").unlink()
    assert gain(read_run(trained)) is None
    assert "What the batches gained" not in run_report(trained)


def test_validation_transcripts_are_those_of_the_best_with_every_kind_of_error(folder: Path):
    (folder / "validation").mkdir()
    for step, heard in ((40, "one to five"), (60, "one two tree more")):
        rows = [{"audio_filepath": "/a/first.wav", "duration": 2.0, "text": "one two three", "pred_text": heard}]
        rows += [{"audio_filepath": f"{n}.wav", "duration": 1.0, "text": "yes", "pred_text": "yes"} for n in range(9)]
        path = folder / "validation" / f"step-{step:06d}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = run_report(folder)
    assert "at step 60, 10 held-out utterances" in page  # WER 1/60
    assert '<mark title="for: three">' in page
    assert '<ins title="not in the reference">' in page
    assert "first.wav · 2.0 s" in page
    assert "Most errors" in page
    assert page.count('<p class="hypothesis">yes</p>') == 6
    assert "90%" in page  # without an error
    assert "validation by validation" not in page  # as many errors as before
    rows[0]["pred_text"] = "one two three"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = run_report(folder)
    assert "Most errors" not in page
    assert '<mark title="for: two">to</mark> <mark title="for: three">five</mark>' in page.split("by validation")[1]


def test_curves_of_one_point_are_left_out(metrics):
    drawn = curves(metrics[:1], [row for row in metrics if row["kind"] == "valid"][:1])
    assert list(drawn) == []


def test_new_estimates_of_steps_are_marked_in_the_learning_rate(metrics):
    rows = [row | {"steps": 60 if row["step"] < 30 else 80} for row in metrics if row["kind"] == "train"]
    assert changed_totals(rows) == {"80 steps": 30}
    assert "estimated again" in list(curves(rows, []))[-1]
    assert "estimated again" not in list(curves([row | {"steps": 60} for row in rows], []))[-1]


def test_the_page_of_a_long_run_is_small(folder: Path, metrics):
    row = next(row for row in metrics if row["kind"] == "train")
    rows = (row | {"step": step, "loss": 3 + step % 7, "seconds": 0.5 + step % 3} for step in range(1, 20_001))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    page = run_report(folder)
    assert "20,000 steps" in page
    assert len(page) < 1_000_000


def test_nothing_wrong_is_said_too(folder: Path):
    (folder / "skipped.jsonl").unlink()
    assert "every utterance was used" in run_report(folder)
    (folder / "left_out.jsonl").write_text('{"file": "a.jsonl", "line": 9, "reason": "too long: 99 s"}\n')
    page = run_report(folder)
    assert "Utterances that fit in no batch" in page
    assert "every utterance was used" not in page


@pytest.mark.parametrize("value", [{"a": 1}, [1], None, float("nan"), 5])
def test_a_field_of_another_type_ends_no_report(value):
    row = {"audio_filepath": value, "offset": value, "text": "one two", "pred_text": "one"}
    assert list(word_errors([row]).values()) == [1]
