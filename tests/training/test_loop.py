"""The loop on real audio, in process: what is learnt, resumed, skipped and refused."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from canter.cli.progress import TrainingProgress
from canter.corpus.index import LengthIndex
from canter.corpus.manifest import write_manifest
from canter.errors import CanterError, ConfigError
from canter.loading import load_model
from canter.planning.budget import Budget, Polynomial
from canter.reporting.run_curves import duration
from canter.reporting.run_report import run_report
from canter.training.config import AugmentConfig
from canter.training.recipe import run_training
from canter.training.schedule import Pace

from .conftest import Messages, Reports, stopping_after


def metrics(config, kind="train"):
    lines = map(json.loads, (config.output / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def losses(config):
    return [line["loss"] for line in metrics(config)]


def weights(config):
    return load_file(sorted((config.output / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def test_a_run_leaves_what_it_promises(config):
    finished = run_training(config)
    assert finished.progress.step == 8
    rows = metrics(config)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0]["loss_attention"] is None  # CTC alone at first
    assert rows[-1]["loss_attention"] > 0
    assert rows[-1]["loss_ctc"] < rows[0]["loss_ctc"]
    assert [row["step"] for row in metrics(config, "valid")] == [4, 8]
    assert sum(row["utterances"] for row in rows) == finished.progress.utterances
    best = json.loads((config.output / "checkpoints" / "best.json").read_text())
    model = load_model(config.output / "checkpoints" / best["checkpoint"])
    assert model.tokenizer.vocab_size == model.config.decoder.vocabulary
    tokens, seconds = finished.prepared.data.index.tokens, finished.prepared.data.index.seconds
    rate = model.generation["tokens_per_frame"]  # at which transcription ends what goes round in circles
    assert max((u - 10) / (s / 0.08 + 1) for u, s in zip(tokens, seconds)) < rate < 2
    assert max(seconds) < model.generation["window_seconds"] <= max(10, 1.1 * max(seconds) + 1)


@pytest.mark.parametrize("strategy", ["balanced", "packed"])
def test_a_decoder_may_be_wider_than_its_encoder(config, strategy):
    shape = dataclasses.replace(config.model, decoder_width=48)
    run_training(dataclasses.replace(config, model=shape, strategy=strategy, steps=4))
    assert metrics(config)[-1]["loss_attention"] > 0
    model = load_model(max((config.output / "checkpoints").glob("step-*")))
    assert (model.config.encoder.width, model.config.decoder.width) == (32, 48)
    assert (model.config.encoder.feedforward, model.config.decoder.feedforward) == (128, 192)
    assert metrics(config, "valid")


def test_the_report_of_a_run_shows_what_was_predicted_and_measured(config, tmp_path):
    budget = Budget(1e6, Polynomial(T=100.0), Polynomial(T=1e-4), 1e5, fixed_seconds=0.02)
    budget.save(tmp_path / "budget.json")
    run_training(config)
    page = run_report(config.output)
    logged = [json.loads(line) for line in (config.output / "utterances.jsonl").read_text().splitlines()]
    frames = budget.frames(LengthIndex.open(config.output / "lengths.arrow").seconds)
    predicted = [
        sum(0.02 + 1e-4 * len(batch) * int(frames[batch].max()) for batch in filter(None, row["rows"]))
        for row in logged
    ]
    rows = metrics(config)
    measured = sum(row["seconds"] for row in rows) / len(rows)
    audio = sum(row["audio_seconds"] for row in rows)
    step = re.search(r"time of a step</td>(.*?)</tr>", page)
    assert step
    *_, told, seen, ratio = re.findall(r">([^<]+)</td>", step[1])
    mean = sum(predicted) / len(predicted)
    assert (told, seen, ratio) == (duration(mean), duration(measured), f"{measured / mean:.2f}")
    assert f">{audio / sum(row['seconds'] for row in rows):,.1f}</td>" in page
    assert re.search(r"speed relative to random</td>.*?×</td>.*?×</td>.*?×</td><td class=\"number\">–</td>", page)


def test_minutes_are_kept_where_the_budget_promised_too_much(config, tmp_path):
    hasty = Budget(limit_bytes=1e9, memory=Polynomial(T=1.0), time=Polynomial(T=1e-6), fixed_seconds=1e-4)
    hasty.save(tmp_path / "hasty.json")
    config = dataclasses.replace(config, budget=tmp_path / "hasty.json", steps=None, minutes=0.02, valid=())
    finished = run_training(config)
    settled = json.loads((config.output / "run.json").read_text())
    assert settled["timed"] >= 1
    assert finished.prepared.schedule.steps > 1000  # as the budget has it
    assert finished.progress.step == settled["steps"] < 1000
    assert metrics(config)[-1]["steps"] == settled["steps"]


def test_steps_may_become_more_when_all_that_there_were_are_loaded(config, monkeypatch):
    monkeypatch.setattr("canter.training.schedule.choose_steps", lambda *_: 22)  # timed after the 20th
    monkeypatch.setattr(Pace, "steps", lambda self, step, steps, seconds: 25)
    more = dataclasses.replace(config, steps=None, minutes=1.0, valid=(), workers=1, track=())
    finished = run_training(more)
    assert finished.progress.step == 25
    assert [row["step"] for row in metrics(config)] == list(range(1, 26))


def test_a_run_whose_steps_were_estimated_again_resumes_to_the_same_bits(config, tmp_path, monkeypatch):
    """A run resumes from an earlier checkpoint with that checkpoint's learning rate, without a jump."""
    monkeypatch.setattr("canter.training.schedule.choose_steps", lambda *_: 40)  # estimated again after the 20th
    monkeypatch.setattr(Pace, "steps", lambda self, step, steps, seconds: 25)
    config = dataclasses.replace(config, steps=None, minutes=1.0, valid=(), track=(), save_every=8)
    run_training(config)
    killed = dataclasses.replace(config, output=tmp_path / "killed")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(killed, stopping_after(23))
    run_training(killed)
    assert losses(killed) == losses(config)
    rates = [row["learning_rate"] for row in metrics(config)]
    assert rates == [row["learning_rate"] for row in metrics(killed)]
    falls = -np.diff(rates[2:])  # of a cosine, spread over 5 steps instead of 20 from the 20th on
    assert falls[-6] < falls[-5] == pytest.approx(4 * falls[-6], rel=0.2)
    assert rates[-1] == pytest.approx(0.01 * 2e-3)


def test_a_mixture_is_drawn_by_its_weights_and_resumes(config, spoken, tmp_path):
    """Two sources of very unequal size, drawn equally often; rows take their source's tags."""
    rows = [json.loads(line) for line in spoken.train_manifest.read_text().splitlines()]
    for row in rows:
        row |= {"audio_filepath": str(spoken.train_manifest.parent / row["audio_filepath"])}
    rows.sort(key=lambda row: row["duration"])
    write_manifest(tmp_path / "few.jsonl", [{k: v for k, v in row.items() if k != "lang"} for row in rows[:5]])
    write_manifest(tmp_path / "many.jsonl", rows[5:])
    (tmp_path / "mix.yaml").write_text(
        "- {path: few.jsonl, weight: 0.5, tags: {lang: en}}\n- {path: many.jsonl, weight: 0.5}\n"
    )
    config = dataclasses.replace(
        config, manifest=(tmp_path / "mix.yaml",), valid=(), steps=None, epochs=2.0, batching_window=20, save_every=1
    )
    finished = run_training(config)
    steps = [json.loads(line) for line in (config.output / "utterances.jsonl").read_text().splitlines()]
    drawn = [row for step in steps for batch in step["rows"] for row in batch]
    index = finished.prepared.data.index
    assert 0.4 < sum(index.source_of[row] == 0 for row in drawn) / len(drawn) < 0.6
    assert len(drawn) == pytest.approx(2 * len(index), rel=0.3)
    assert {index.utterance(row).lang for row in range(len(index)) if index.source_of[row] == 0} == {"en"}
    resumed = dataclasses.replace(config, output=tmp_path / "resumed")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(resumed, stopping_after(3))
    run_training(resumed)
    assert (resumed.output / "utterances.jsonl").read_text() == (config.output / "utterances.jsonl").read_text()
    assert losses(resumed) == losses(config)
    fast = dataclasses.replace(config, output=tmp_path / "fast", augment=AugmentConfig(speed=(0.9, 1.1)))
    with pytest.raises(ConfigError, match=r"mix\.yaml, whose sources have weights"):
        run_training(fast)


def test_every_utterance_once_an_epoch(config):
    seen = []
    trained = run_training(dataclasses.replace(config, steps=None, epochs=1.0))
    plan = trained.prepared.schedule.plan
    for step in plan:
        seen += [row for micro_batch in step for row in micro_batch.tolist()]
    assert sorted(seen) == list(range(40))
    assert trained.progress.utterances == 40


@pytest.mark.parametrize(("micro_batches", "strategy"), [(1, "balanced"), (2, "balanced"), (2, "packed")])
def test_a_stopped_run_resumes_bit_exactly(config, tmp_path, micro_batches, strategy):
    config = dataclasses.replace(
        config,
        strategy=strategy,
        micro_batches_per_step=micro_batches,
        model=dataclasses.replace(config.model, dropout=0.1),
        augment=AugmentConfig(frequency_masks=1, frequency_width=8, time_masks=2),
    )
    run_training(config)
    again = dataclasses.replace(config, output=tmp_path / "again")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(again, stopping_after(5))  # nothing is saved: back to step 4
    resumed = run_training(again)
    assert resumed.progress.step == 8
    assert losses(again) == losses(config)
    ours, theirs = weights(again), weights(config)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_gradients_do_not_depend_on_the_cut_into_micro_batches(config):
    """A step of two micro-batches equals one of their union, without BatchNorm's per-micro-batch statistics."""
    from canter.training.feed.data import Address, collate
    from canter.training.loop import Trainer
    from canter.training.recipe import prepare_training
    from canter.training.step.gradient import Objective, TargetCounts

    prepared = prepare_training(config)
    trainer = Trainer(prepared)
    prepared.subject.model.eval()
    rows = list(range(6))
    examples = [prepared.data.micro_batches.example(prepared.data.index.utterance(row), row) for row in rows]
    pad = prepared.data.tokenizer.pad
    gradients = []
    for parts in ([examples], [examples[:2], examples[2:]]):
        batches = [collate(part, pad) for part in parts]
        objective = Objective(prepared.config.loss, TargetCounts.of(batches))
        for batch in batches:
            trainer.gradient.backward(batch, objective, epoch=0)
        gradients.append({n: p.grad.clone() for n, p in prepared.subject.model.named_parameters()})
        prepared.subject.model.zero_grad()
    for name, one in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], one, rtol=1e-3, atol=1e-6, msg=name)
    assert isinstance(Address(0, 0, True, rows).last, bool)


def test_augmentation_is_the_utterance_s_own(config):
    """Drawn from (seed, epoch, row): the same beside other batch-mates, another in the next epoch."""
    from canter.training.feed.data import collate
    from canter.training.loop import Trainer
    from canter.training.recipe import prepare_training

    config = dataclasses.replace(config, augment=AugmentConfig(frequency_masks=1, frequency_width=20))
    made = prepare_training(config)
    trainer = Trainer(made)
    one, two = (made.data.micro_batches.example(made.data.index.utterance(row), row) for row in (3, 4))
    alone, frames = trainer.gradient.features(collate([one], made.data.tokenizer.pad), epoch=0)
    together, _ = trainer.gradient.features(collate([two, one], made.data.tokenizer.pad), epoch=0)
    later, _ = trainer.gradient.features(collate([one], made.data.tokenizer.pad), epoch=1)
    size = int(frames[0])
    torch.testing.assert_close(together[1, :size], alone[0, :size], rtol=0, atol=1e-4)
    assert not torch.equal(later, alone)


def test_unusable_audio_is_skipped_and_named(config, spoken, tmp_path):
    rows = [json.loads(line) for line in spoken.train_manifest.read_text().splitlines()]
    for row in rows:
        row["audio_filepath"] = str(spoken.train_manifest.parent / row["audio_filepath"])
    (tmp_path / "noise.flac").write_bytes(b"this is not audio")
    soundfile.write(tmp_path / "short.wav", [0.0] * 800, 16000)
    for row, path in zip(rows, ("noise.flac", "missing.wav", "short.wav")):
        row["audio_filepath"], row["duration"] = str(tmp_path / path), 2.0
    write_manifest(tmp_path / "train.jsonl", rows)
    config = dataclasses.replace(config, manifest=(tmp_path / "train.jsonl",), steps=None, epochs=1.0)
    finished = run_training(config)
    assert finished.progress.utterances == 37
    skipped = [json.loads(line) for line in (config.output / "skipped.jsonl").read_text().splitlines()]
    assert {row["file"].split("/")[-1] for row in skipped} == {"noise.flac", "missing.wav", "short.wav"}
    reason = next(row["reason"] for row in skipped if row["file"].endswith("short.wav"))
    assert "2 s in the manifest" in reason


def test_a_run_whose_audio_cannot_be_read_ends_with_the_reason(config, spoken, tmp_path):
    """Progress is shown of its steps too; no model is saved, and the run fails again when it is resumed."""
    rows = [json.loads(line) for line in spoken.train_manifest.read_text().splitlines()[:4]]
    rows = [row | {"audio_filepath": str(tmp_path / "missing.wav")} for row in rows]
    write_manifest(tmp_path / "missing.jsonl", [{**row, "id": str(n)} for n, row in enumerate(rows)])
    lines = []

    config = dataclasses.replace(config, manifest=(tmp_path / "missing.jsonl",), valid=(), steps=2)
    show = Reports(lambda report: lines.append(TrainingProgress.describe([report])))
    for _ in range(2):
        with pytest.raises(CanterError, match=r"^4 of 4 utterances could not be used .* 4 x does not exist; "):
            run_training(config, show)
    assert len(lines) == 2
    assert "padding 0.0%" in lines[0]
    assert not any((config.output / "checkpoints").glob("step-*"))


def test_steps_of_a_run_that_was_killed_before_it_saved_are_forgotten(config, tmp_path):
    quiet = dataclasses.replace(config, valid=(), steps=3)
    run_training(quiet)
    killed = dataclasses.replace(quiet, output=tmp_path / "killed")
    run_training(killed)
    shutil.rmtree(killed.output / "checkpoints" / "step-000003")
    with (killed.output / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    run_training(killed)
    assert losses(killed) == losses(quiet)
    for one in ("utterances.jsonl", "skipped.jsonl"):
        files = [run.output / one for run in (killed, quiet)]
        assert len({file.read_text() if file.exists() else "" for file in files}) == 1


def test_rows_that_the_plan_leaves_out_are_reported_and_listed(config, tmp_path):
    Budget.from_batch_seconds(3.0).save(tmp_path / "small.json")
    config = dataclasses.replace(config, budget=tmp_path / "small.json", batch_seconds=None, valid=(), steps=2)
    said = []
    finished = run_training(config, Messages(said))
    listed = [json.loads(line) for line in (config.output / "left_out.jsonl").read_text().splitlines()]
    seconds = finished.prepared.data.index.seconds
    assert [row["line"] for row in listed] == [n for n, s in enumerate(seconds) if s > 3]
    assert 0 < len(listed) < len(seconds)
    assert all(row["reason"].startswith("over the budget by itself: ") for row in listed)
    assert any(f"{len(listed)} of {len(seconds)} utterances are in no batch" in line for line in said)


def test_memory_filled_is_a_share_of_the_memory_there_is(config, tmp_path):
    """Though the plan fills twelve seconds."""
    Budget.from_batch_seconds(1200.0).save(tmp_path / "large.json")
    run_training(dataclasses.replace(config, budget=tmp_path / "large.json", valid=(), steps=2))
    for row in metrics(config):
        assert row["memory_filled"] == pytest.approx(row["batch"] * row["frames_max"] * 0.08 / 1200, rel=0.05)


def test_too_much_unusable_audio_ends_the_run(config, spoken, tmp_path):
    rows = [json.loads(line) for line in spoken.train_manifest.read_text().splitlines()]
    for row in rows:
        row["audio_filepath"] = "nowhere.wav"
    write_manifest(tmp_path / "train.jsonl", rows)
    with pytest.raises(CanterError, match="could not be used"):
        run_training(dataclasses.replace(config, manifest=(tmp_path / "train.jsonl",), steps=None, epochs=1.0))


def test_another_configuration_or_content_is_refused(config, tmp_path):
    run_training(dataclasses.replace(config, steps=1))
    with pytest.raises(ConfigError, match="seed: 0 -> 3"):
        run_training(dataclasses.replace(config, steps=1, seed=3))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not a run"):
        run_training(dataclasses.replace(config, output=tmp_path / "full"))
    with pytest.raises(ConfigError, match="no training data"):
        run_training(dataclasses.replace(config, manifest=()))
