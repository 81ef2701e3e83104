"""Default batch sizes of a run and the messages about them, through the preparation of a run."""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from canter.cli.main import main
from canter.cli.train import parse
from canter.corpus.index import LengthIndex
from canter.corpus.manifest import write_manifest
from canter.errors import ConfigError
from canter.planning.bins import outlier_limits
from canter.planning.budget import Budget, Polynomial
from canter.planning.lengths import sample
from canter.planning.plan import FIRST_VERSION, VERSION, Plan
from canter.planning.shapes import analytic_budget
from canter.text import train_tokenizer
from canter.training.config import (
    RENAMED,
    LossConfig,
    ModelShape,
    TrainConfig,
    dump_config,
    load_config,
    load_run_config,
)
from canter.training.defaults import print_config
from canter.training.recipe import prepare_training, run_training
from canter.training.schedule import batch_limit, choose_limits, limited, probe_bounds

from .conftest import Messages, stopping_after

SHARED = os.environ.get("CANTER_SHARED")
needs_shared = pytest.mark.skipif(not SHARED, reason="CANTER_SHARED names no folder with speech and whisper-tiny.en")
HOURS = 3600.0


@pytest.fixture(scope="module")
def read_speech(tmp_path_factory):
    """``read_speech(hours)``: a manifest of LibriSpeech-like lengths, whose audio is never opened."""
    folder = tmp_path_factory.mktemp("read")

    def write(hours: float) -> Path:
        path = folder / f"{hours:g}.jsonl"
        random = np.random.default_rng(1)
        seconds = np.clip(random.gamma(6, 2.1, int(hours * HOURS / 12.4)), 1.3, 35).round(2)
        rows = [
            {"audio_filepath": f"{n}.wav", "duration": float(s), "text": "a bc " * max(1, round(float(s)))}
            for n, s in enumerate(seconds)
        ]
        write_manifest(path, rows)
        return path

    return write


@pytest.fixture
def plain(config, tmp_path_factory):
    """A configuration that leaves the batches open, with the budget of canary-1b on 80 GB."""
    folder = tmp_path_factory.mktemp("given")
    dataclasses.replace(analytic_budget("canary-1b", 80.0), measured_on={}).save(folder / "budget.json")
    train_tokenizer(["a bc"] * 10, [], 19, folder / "tokenizer")
    return dataclasses.replace(
        config,
        valid=(),
        steps=None,
        batch_seconds="auto",
        budget=folder / "budget.json",
        tokenizer=folder / "tokenizer",
    )


def prepared(config):
    """Return the result of ``prepare`` for a configuration, the figures of its batches, and its message about them."""
    said = []
    made = prepare_training(config, Messages(said))
    batches = json.loads((config.output / "run.json").read_text())["batches"]
    (line,) = [line for line in said if line.startswith("batches: ")]
    return made, batches, line


def test_a_large_set_fills_the_memory(plain, read_speech):
    made, batches, line = prepared(dataclasses.replace(plain, manifest=(read_speech(30),)))
    assert batches["memory_filled"] >= 0.95
    assert batches["steps"] == len(made.schedule.plan) > 50
    assert "limited by memory; --budget or --batch-seconds changes it" in line
    assert f"{batches['memory_filled']:.1%} of the memory budget" in line


@pytest.mark.parametrize("ranks", [1, 8])
def test_three_hours_have_fifty_updates_an_epoch(plain, read_speech, ranks):
    config = dataclasses.replace(plain, manifest=(read_speech(3),), micro_batches_per_step=ranks)
    made, batches, line = prepared(config)
    assert len(made.schedule.plan) == batches["steps"] >= 50
    assert batches["memory_filled"] < 0.5
    assert "limited by the size of the data: an epoch has at least 50 updates; --min-steps changes it" in line
    assert made.schedule.plan.figures().padded_audio < 0.1
    assert made.schedule.steps == 20 * batches["steps"]


def test_none_fills_the_memory_whatever_the_set(plain, read_speech):
    config = dataclasses.replace(plain, manifest=(read_speech(3),), batch_seconds=None)
    _, batches, line = prepared(config)
    assert batches["steps"] < 20
    assert batches["memory_filled"] > 0.7
    assert "limited by memory" in line


def test_seconds_are_a_cap(plain, read_speech):
    config = dataclasses.replace(plain, manifest=(read_speech(3),), batch_seconds=48.0)
    _, batches, line = prepared(config)
    assert 40 < batches["seconds"] <= 48
    assert "limited by --batch-seconds 48" in line
    _, _, line = prepared(dataclasses.replace(config, batch_seconds=1e4, output=config.output.with_name("more")))
    assert "limited by memory" in line


def test_a_least_number_of_steps_is_obeyed(plain, read_speech):
    config = dataclasses.replace(plain, manifest=(read_speech(3),), min_steps=120)
    made, batches, line = prepared(config)
    assert 120 <= len(made.schedule.plan) == batches["steps"] < 130
    assert "limited by --min-steps 120" in line


def test_few_utterances_cannot_make_fifty_updates(plain, spoken):
    few = dataclasses.replace(plain, manifest=(spoken.train_manifest,), tokenizer=None)
    _, batches, line = prepared(few)
    assert batches["steps"] < 50
    assert "limited by the number of utterances: batches of one make fewer than 50 updates" in line
    made, batches, line = prepared(dataclasses.replace(few, min_steps=100, output=plain.output.with_name("least")))
    assert batches["steps"] == len(made.data.index) == 40
    assert "limited by the number of utterances: batches of one make fewer than 100 updates" in line


@needs_shared
def test_an4_at_its_own_lengths(plain):
    manifest = Path(SHARED or "") / "data/speech/an4/manifest.jsonl"
    _, batches, line = prepared(dataclasses.replace(plain, manifest=(manifest,), tokenizer=None))
    assert 50 <= batches["steps"] < 60
    assert "an epoch has at least 50 updates" in line


@needs_shared
def test_a_padded_whisper_gets_more_than_one_utterance(plain):
    manifest = Path(SHARED or "") / "data/speech/an4/manifest.jsonl"
    Budget(limit_bytes=8e9, fixed_bytes=6e8, memory=Polynomial(T=3e8, U=1e6), frame_seconds=30.0).save(plain.budget)
    config = dataclasses.replace(
        plain,
        manifest=(manifest,),
        init=Path(SHARED or "") / "models/whisper-tiny.en",
        tokenizer=None,
        model=ModelShape(),
        loss=LossConfig(),
        vocab_size=TrainConfig.vocab_size,
    )
    made, batches, _ = prepared(config)
    assert made.schedule.budget.frame_seconds == 30
    assert batches["utterances"] > 5
    assert batches["steps"] >= 50


INDEX = LengthIndex(np.full(4000, 10.0, np.float32), np.full(4000, 40))
BUDGET = Budget(
    limit_bytes=1e11, memory=Polynomial(T=1e6), time=Polynomial(T=8e-4), fixed_seconds=0.03, frame_seconds=0.08
)


def test_short_runs_get_more_updates_an_epoch(tmp_path):
    def least(**settings):
        return choose_limits(TrainConfig(**settings), INDEX, BUDGET, 1, 1, on_cpu=False).min_steps

    assert least() == least(steps=5) == 50
    assert least(epochs=2) == 500
    assert least(epochs=2, init=tmp_path) == 100
    # 400 s of work and 1000 updates of 30 ms fit 10 minutes: an epoch of n updates takes 400 + 0.03 n seconds
    steps = least(minutes=10.0)
    assert 600 / (400 / steps + 0.03) == pytest.approx(1000, rel=0.01)
    assert least(minutes=0.5) == len(INDEX)  # there is no time for that many: an utterance each
    some = LengthIndex(np.full(4000, 1.0, np.float32), np.full(4000, 4))
    held = choose_limits(TrainConfig(epochs=0.1), some, BUDGET, 1, 1, on_cpu=False)
    assert held.min_steps == 4000 / 4
    assert "a step has at least 4 s of audio" in batch_limit(held, 1000, enough=False, by_seconds=False, single=False)


def test_on_a_cpu_batches_end_where_larger_ones_are_hardly_faster(tmp_path):
    def seconds(budget=BUDGET, **settings):
        return choose_limits(TrainConfig(**settings), INDEX, budget, 1, 1, on_cpu=True).seconds

    # 10 ms for a second of audio: of 48 s and 120 ms beside, the 120 ms are a fifth
    assert seconds(budget=dataclasses.replace(BUDGET, fixed_seconds=0.12)) == pytest.approx(48)
    assert seconds() == 24
    assert seconds(budget=dataclasses.replace(BUDGET, fixed_seconds=0.0)) == 24
    assert seconds(budget=dataclasses.replace(BUDGET, fixed_seconds=1.0)) == 120
    assert seconds(batch_seconds=None) is seconds(budget=BUDGET, **{"batch_seconds": None}) is None
    assert choose_limits(TrainConfig(), INDEX, BUDGET, 1, 1, on_cpu=False).seconds is None
    assert seconds(BUDGET, **{"batch_seconds": 240.0}) == 240
    given = TrainConfig(budget=tmp_path / "b.json")
    assert choose_limits(given, INDEX, BUDGET, 1, 1, on_cpu=True).seconds is None


def test_what_is_measured_covers_the_batches_that_are_used():
    def frames(on_cpu=False, **settings):
        return probe_bounds(TrainConfig(**settings), INDEX, 0.08, 1, on_cpu)[0]

    assert frames(batch_seconds=None) is None  # up to the memory
    assert frames(batch_seconds=24.0) == 300
    assert frames(batch_seconds=4.0) == 125  # one utterance
    assert frames() == 1.5 * 4000 * 125 / 50
    assert frames(min_steps=10) == 1.5 * 4000 * 125 / 10
    assert frames(on_cpu=True) == 1500
    assert probe_bounds(TrainConfig(), INDEX, 0.08, 1, True)[1] == 6
    assert probe_bounds(TrainConfig(), INDEX, 0.08, 1, False)[1] is None
    held = choose_limits(TrainConfig(), INDEX, BUDGET, 1, 1, on_cpu=True).seconds or 0.0
    assert 0 < held <= 1500 * 0.08
    assert limited(BUDGET, held, INDEX).limit_bytes * 0.08 <= held


def test_a_run_keeps_what_was_chosen(plain, read_speech):
    """Though the rule would choose otherwise now."""
    config = dataclasses.replace(plain, manifest=(read_speech(3),))
    made, batches, _ = prepared(config)
    settled = json.loads((config.output / "run.json").read_text())
    settled["batch_limits"]["min_steps"] = 70
    del settled["checksum"]  # as an older Canter wrote it
    (config.output / "run.json").write_text(json.dumps(settled))
    _, batches, _ = prepared(config)
    assert batches["steps"] >= 70 > len(made.schedule.plan)
    changed, batches, _ = prepared(dataclasses.replace(config, min_steps=60, allow_changes=True))
    assert 60 <= batches["steps"] < 70
    assert changed.schedule.plan.version == made.schedule.plan.version == VERSION


def test_a_run_keeps_its_accumulation_on_other_numbers_of_ranks(plain, read_speech):
    config = dataclasses.replace(plain, manifest=(read_speech(3),), mix_steps=True, micro_batches_per_step=4)
    made, _, _ = prepared(config)
    assert made.schedule.plan.batching.accumulation == 4
    settled = json.loads((config.output / "run.json").read_text())
    assert settled["accumulation"] == 4
    settled["accumulation"] = 2  # as a run that began on two ranks wrote it
    del settled["checksum"]
    (config.output / "run.json").write_text(json.dumps(settled))
    again, _, _ = prepared(config)
    assert again.schedule.plan.batching.accumulation == 2
    del settled["accumulation"]  # of a run that began before this setting
    (config.output / "run.json").write_text(json.dumps(settled))
    older, _, _ = prepared(config)
    assert older.schedule.plan.batching.accumulation == 1


@pytest.mark.parametrize(
    ("cap", "fingerprint", "steps", "rows"),
    [(24.0, "ab360423357efdd9", 96, "7c85d7c9e2605246"), (None, "9e7477c06a32356f", 17, "f0769d0123a50fa1")],
)
def test_plans_of_the_first_version_are_what_they_were(cap, fingerprint, steps, rows):
    """Batches are those of Canter 0.1, so that positions in its checkpoints hold."""
    seconds = np.random.default_rng(0).integers(4, 120, 400).astype(np.float32) / 8
    index = LengthIndex(seconds, (3 + 3 * seconds).astype(np.int64))
    budget = Budget(limit_bytes=1e8, fixed_bytes=1e6, memory=Polynomial(T=5e4, TT=100.0, U=1e4, TU=50.0))
    plan = Plan(
        index, limited(budget, cap, index), micro_batches_per_step=2, window=400, min_steps=1, version=FIRST_VERSION
    )
    found = [[batch.tolist() for batch in step] for step in plan]
    assert (plan.fingerprint, len(plan)) == (fingerprint, steps)
    assert hashlib.sha256(repr(found).encode()).hexdigest()[:16] == rows


@pytest.mark.parametrize("cap", [24.0, None])
def test_runs_of_the_first_version_are_resumed_to_the_same_steps(config, cap, tmp_path, monkeypatch):
    """The command that began these runs left --batch-seconds at its default of 24, or gave None."""
    config = dataclasses.replace(config, valid=(), batch_seconds=cap, save_every=2, track=())
    monkeypatch.setattr("canter.training.schedule.VERSION", FIRST_VERSION)
    run_training(config)
    began = dataclasses.replace(config, output=tmp_path / "began")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(began, stopping_after(5))
    monkeypatch.undo()
    settings = yaml.safe_load((began.output / "config.yaml").read_text())
    for name in ("min_steps", "max_tokens_per_second"):
        del settings[name]
    for old, new in RENAMED.items():
        group, _, name = old.rpartition(".")
        inside = settings[group] if group else settings
        inside[name] = inside.pop(new.rpartition(".")[2])
    settings["short_first"] = False
    settings["optimizer"]["matrix_every"] = 2
    (began.output / "config.yaml").write_text(yaml.safe_dump(settings))
    settled = json.loads((began.output / "run.json").read_text())
    kept = ("precision", "threads", "steps", "micro_batches_per_step")
    (began.output / "run.json").write_text(json.dumps({name: settled[name] for name in kept}))
    said = []
    plain = dataclasses.replace(began, batch_seconds="auto")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_training(plain, stopping_after(7, said))
    assert any("continuing at step 4 of 8" in line for line in said)
    assert any("with which the run began under Canter 0.1" in line for line in said)
    run_training(plain)  # and once more
    for one in ("utterances.jsonl", "skipped.jsonl"):
        files = [run.output / one for run in (began, config)]
        assert len({file.read_text() if file.exists() else "" for file in files}) == 1
    assert rates_and_losses(began) == rates_and_losses(config)


def rates_and_losses(config):
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    return [(row["learning_rate"], row["loss"]) for row in lines if row["kind"] == "train"]


def test_what_is_printed_trains_alike(config, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(dump_config(dataclasses.replace(config, valid=(), batch_seconds="auto")))
    assert main(["train", str(tmp_path / "a.yaml"), "--optimizer.warmup", "0.5", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "batch_seconds: auto  # the memory budget, less where a run has few updates" in printed
    assert "min_steps: null  # 50, more with minutes" in printed
    assert "learning_rate: 0.002" in printed
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.yaml").write_text(printed)
    first = dataclasses.replace(load_config(tmp_path / "a.yaml"), output=tmp_path / "first")
    first = dataclasses.replace(first, optimizer=dataclasses.replace(first.optimizer, warmup=0.5))
    second = load_config(tmp_path / "elsewhere" / "x.yaml")
    assert second.output == config.output
    run_training(first)
    run_training(second)
    assert rates_and_losses(first) == rates_and_losses(second)
    again = print_config(second, "cpu")
    assert again == printed


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("none", None), ("None", None), ("null", None), ("24", 24.0), ("2.5e1", 25.0)]
)
def test_batch_seconds_in_a_file(tmp_path, text, value):
    (tmp_path / "c.yaml").write_text(f"batch_seconds: {text}\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.batch_seconds == value
    (tmp_path / "d.yaml").write_text(dump_config(config))
    assert load_run_config(tmp_path / "d.yaml") == config


@pytest.mark.parametrize(
    ("words", "value"), [("auto", "auto"), ("none", None), ("None", None), ("24", 24.0), ("1e2", 100.0)]
)
def test_batch_seconds_as_a_flag(words, value):
    config = parse(["--batch-seconds", words])
    assert config is not None
    assert config.batch_seconds == value


@pytest.mark.parametrize("text", ["many", "-3", "0", "true"])
def test_what_batch_seconds_cannot_be(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"batch_seconds: {text}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml.*batch.seconds"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("yaml_text", "flags", "value"),
    [
        ("25", ["25"], 25.0),
        ("[10:30, 20:25]", ["10:30", "20:25"], ((10.0, 30.0), (20.0, 25.0))),
        ("10:30", ["10:30"], ((10.0, 30.0),)),  # 630 to YAML 1.1
        ("[[10, 30], [20, 25]]", ["20:25", "10:30"], ((10.0, 30.0), (20.0, 25.0))),
        ("none", ["none"], None),
        ("auto", ["auto"], "auto"),
    ],
)
def test_limits_on_tokens_a_second_in_a_file_and_as_flags(tmp_path, yaml_text, flags, value):
    (tmp_path / "c.yaml").write_text(f"max_tokens_per_second: {yaml_text}\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.max_tokens_per_second == value
    given = parse(["--max-tokens-per-second", *flags])
    assert given is not None
    assert given.max_tokens_per_second == value
    (tmp_path / "d.yaml").write_text(dump_config(config))
    assert load_run_config(tmp_path / "d.yaml") == config


def test_a_limit_that_cannot_be(tmp_path):
    (tmp_path / "c.yaml").write_text("max_tokens_per_second: [3, 4]\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: --max-tokens-per-second: "):
        load_config(tmp_path / "c.yaml")


def test_utterances_over_a_limit_are_listed(config):
    config = dataclasses.replace(config, valid=(), steps=1, track=())
    everything = run_training(config).prepared
    rate = everything.data.index.tokens / everything.data.index.seconds
    middle = float(np.median(everything.data.index.seconds))
    short, long = (float(np.quantile(rate[some], 0.7)) for some in _halves(everything.data.index.seconds, middle))
    limits = ((middle, short), (1e3, long))
    said = []
    held = dataclasses.replace(config, max_tokens_per_second=limits, output=config.output.with_name("held"))
    made = run_training(held, Messages(said)).prepared
    listed = [json.loads(line) for line in (held.output / "left_out.jsonl").read_text().splitlines()]
    over = [n for n, s in enumerate(made.data.index.seconds) if rate[n] > (short if s <= middle else long)]
    assert [row["line"] for row in listed] == over
    assert 4 < len(over) < 20
    assert {row["reason"].split(":")[0] for row in listed} == {"over the tokens-per-second bound"}
    assert all(re.search(r"\d tokens, [\d.]+ a second, at most [\d.]+$", row["reason"]) for row in listed)
    assert any(f"{len(over)} of {len(rate)} utterances are in no batch" in line for line in said)


def test_automatic_limits_are_said_and_name_what_they_leave_out(config):
    config = dataclasses.replace(config, valid=(), steps=1, track=(), max_tokens_per_second="auto")
    said = []
    made = run_training(config, Messages(said)).prepared
    index = made.data.index
    limits = made.schedule.plan.rate_limits
    assert limits == outlier_limits(sample(index, made.schedule.budget))
    assert any(line.startswith("--max-tokens-per-second auto: ") for line in said)
    left_out = [json.loads(line) for line in (config.output / "left_out.jsonl").read_text().splitlines()]
    assert [row["line"] for row in left_out] == [row for row, _ in made.schedule.plan.left_out()]


def _halves(seconds, middle):
    return seconds <= middle, seconds > middle
