"""The emulator of ranks: against the planner's own figures, against closed forms, and at its smoke size."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from canter.corpus.index import LengthIndex
from canter.planning import Budget, Plan
from canter.planning.budget import Polynomial
from canter.planning.elastic import share_out
from canter.planning.metrics import BatchTable
from canter.planning.strategies import Balanced, Random

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BUDGET = Budget(
    limit_bytes=2e6,
    memory=Polynomial(T=100.0, U=50.0),
    time=Polynomial(T=2e-4, U=1e-4),
    fixed_seconds=0.05,
    frame_seconds=0.08,
)


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("ranks")
    sys.modules.pop("ranks", None)
    sys.modules.pop("ranks_check", None)


@pytest.fixture
def index():
    rng = np.random.default_rng(0)
    seconds = rng.gamma(2.5, 4.0, 3000).clip(0.5, 40).astype(np.float32)
    return LengthIndex(seconds, (3 * seconds + rng.integers(3, 12, 3000)).astype(np.int64))


def equal(steps, ranks):
    """A table of steps with one micro-batch for each rank, all of one shape."""
    ones = np.ones(steps * ranks, np.int64)
    return BatchTable(*[ones] * 7, steps=np.arange(steps + 1) * ranks)


@pytest.mark.parametrize(("micro_batches", "ranks_of"), [(4, 4), (8, 4), (3, 5)])
@pytest.mark.parametrize("strategy", [Random(), Balanced()])
def test_without_noise_the_epoch_is_the_planner_s(ranks, index, micro_batches, ranks_of, strategy):
    plan = Plan(index, BUDGET, strategy, micro_batches_per_step=micro_batches)
    figures = plan.figures(ranks_of)
    epoch = ranks.emulate(plan.table(), BUDGET, ranks.StepTimes(BUDGET), ranks_of, ranks.Cluster())
    assert epoch.seconds == pytest.approx(3600 * figures.hours)
    assert (epoch.steps, epoch.utterances, epoch.exchange) == (figures.steps, figures.utterances, 0)


@pytest.mark.parametrize(("micro_batches", "ranks_of"), [(4, 4), (8, 4), (3, 5)])
def test_a_rank_computes_what_training_gives_it(ranks, index, micro_batches, ranks_of):
    plan = Plan(index, BUDGET, "random", micro_batches_per_step=micro_batches)
    table = plan.table()
    planned = BUDGET.step_seconds(table.size, table.frames, table.tokens)
    actual = np.random.default_rng(1).uniform(1, 2, len(planned))
    loads = ranks.rank_seconds(planned, actual, table.steps, ranks_of)
    for step, (begin, end) in enumerate(zip(table.steps, table.steps[1:])):
        for rank, share in enumerate(share_out(planned[begin:end], ranks_of)):
            assert loads[step, rank] == pytest.approx(sum(actual[begin + b] for b in share))


def test_a_slow_rank_holds_up_the_others(ranks):
    cluster = ranks.Cluster(straggler=1.5)
    epoch = ranks.emulate(equal(10, 4), BUDGET, ranks.StepTimes(BUDGET), 4, cluster)
    assert epoch.seconds == pytest.approx(10 * 1.5 * BUDGET.step_seconds(1, 1, 1))
    assert epoch.waiting == pytest.approx(1 - 4.5 / 6)


def test_noise_costs_the_largest_of_the_ranks_draws(ranks):
    epoch = ranks.emulate(equal(4000, 64), BUDGET, ranks.StepTimes(BUDGET), 64, ranks.Cluster(jitter=0.1))
    largest = np.exp(0.1 * np.random.default_rng(5).standard_normal((4000, 64))).max(1).mean()
    assert epoch.seconds / 4000 == pytest.approx(largest * BUDGET.step_seconds(1, 1, 1), rel=0.005)
    assert ranks.emulate(equal(5, 1), BUDGET, ranks.StepTimes(BUDGET), 1, ranks.Cluster(0.1)).waiting == 0


def test_a_ring_sends_the_gradient_almost_twice(ranks):
    cluster = ranks.Cluster(gradient_bytes=8e9, bandwidth=1e9, latency=0.01)
    assert cluster.exchange_seconds(1) == 0
    assert cluster.exchange_seconds(4) == pytest.approx(2 * 3 * (2.0 + 0.01))
    epoch = ranks.emulate(equal(3, 4), BUDGET, ranks.StepTimes(BUDGET), 4, cluster)
    assert epoch.exchange == pytest.approx(3 * 12.06 / epoch.seconds)


def test_measured_steps_replace_the_fitted_time_near_them(ranks):
    rows = [[4, 100, 20, 0.9], [64, 20, 5, 0.4], [1, 300, 60, 0.2], [16, 100, 30, 0.7]]
    times = ranks.StepTimes.from_table(BUDGET, rows)
    shapes = np.array(rows)[:, :3].T
    assert times(*shapes) == pytest.approx([row[3] for row in rows], rel=1e-3)
    twice = [[*row[:3], 2 * BUDGET.step_seconds(*row[:3])] for row in rows]
    between = tuple(np.array([value]) for value in (9, 140, 25))
    assert ranks.StepTimes.from_table(BUDGET, twice)(*between) == pytest.approx(2 * BUDGET.step_seconds(*between))


def test_the_ranks_needed_are_the_fewest_that_are_fast_enough(ranks, index):
    emulator = ranks.Emulator(index, BUDGET, ranks.StepTimes(BUDGET), ranks.Cluster(jitter=0.05))
    found = emulator.ranks_needed("balanced", "random", 8)
    target = emulator.pace("random", 8)
    assert 1 < found < 8
    assert emulator.pace("balanced", found) <= target < emulator.pace("balanced", found - 1)
    assert emulator.pace("random", 16) > emulator.pace("balanced", 8)
    assert emulator.ranks_needed("random", "balanced", 8) is None


def test_a_small_run_resumes_after_its_finished_parts(ranks, tmp_path, capsys, monkeypatch):
    options = ranks.Options(output=tmp_path / "ranks.json", figure=tmp_path / "ranks.svg", smoke=True)
    ranks.main(options)
    result = json.loads(options.output.read_text())
    parts = result["parts"]
    assert parts["balanced, 4 ranks"]["seconds"] < 0.7 * parts["random, 4 ranks"]["seconds"]
    for name in ranks.STRATEGIES:
        stages = [parts[f"{name}, 4 ranks, {label}"] for label in ("computing only", "jitter", "a slow rank")]
        assert stages[0]["seconds"] < stages[1]["seconds"] < parts[f"{name}, 4 ranks"]["seconds"] < stages[2]["seconds"]
    assert "GPUs for the epoch time of" in capsys.readouterr().out
    assert b"<svg" in options.figure.read_bytes()

    lost = parts.pop("bucket_1d, 2 ranks")
    options.output.write_text(json.dumps(result))
    asked = []
    table = ranks.Emulator.table
    monkeypatch.setattr(ranks.Emulator, "table", lambda self, *what: asked.append(what) or table(self, *what))
    ranks.main(options)
    assert asked == [("bucket_1d", 2)]
    assert json.loads(options.output.read_text())["parts"] == {**parts, "bucket_1d, 2 ranks": lost}


def test_the_steps_of_a_real_run_become_a_table(ranks, index):
    check = importlib.import_module("ranks_check")
    plan = Plan(index, BUDGET, micro_batches_per_step=2)
    steps = [[rows.tolist() for rows in step] for step in plan]
    ours, theirs = check.table_of(steps, index, BUDGET), plan.table()
    assert ours.terms is theirs.terms is None
    for name in set(BatchTable.__slots__) - {"terms"}:
        assert np.allclose(getattr(ours, name), getattr(theirs, name)), name


def test_the_table_of_repeated_steps_holds_medians(ranks):
    check = importlib.import_module("ranks_check")
    steps = [[2, 9, 3, s, 2 * s] for s in (1.0, 1.1, 5.0)] + [[1, 4, 2, s, s] for s in (0.2, 0.2, 0.2)]
    table, spread = check.medians(np.array(steps))
    assert table == [[1, 4, 2, 0.2], [2, 9, 3, 1.1]]
    logs = np.log([1.0 / 1.1, 1, 5.0 / 1.1, 1, 1, 1])
    assert spread["cpu"] == pytest.approx(logs.std(), abs=1e-4)


def test_committed_measurements_give_budgets_and_tables(ranks, monkeypatch):
    results = BENCHMARKS / "results"
    budget = ranks.read_budget(results / "2026-11-26-gpu-training.json")
    rows = ranks.read_table(results / "2026-11-26-gpu-budget.json")
    times = ranks.StepTimes.from_table(budget, rows)
    assert times(*np.array(rows)[:, :3].T) == pytest.approx([row[3] for row in rows], rel=0.02)
    monkeypatch.delenv("CANTER_SHARED", raising=False)
    with pytest.raises(SystemExit, match="CANTER_SHARED"):
        ranks.draw_lengths("real", 10)
    assert len(ranks.draw_lengths("synthetic", 10)) == 10
