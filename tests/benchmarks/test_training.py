"""The benchmarks of training speed, run small."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from canter.models.model import SpeechModel
from canter.planning import Budget, Plan
from canter.planning.budget import Polynomial
from canter.training.config import TrainConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark by name; what it shares with others it finds beside it, as when it is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
        spec.loader.exec_module(module)
        return module

    return load


def test_gpu_training_runs_small_without_a_gpu(script, tmp_path):
    gpu_training = script("gpu_training")
    gpu_training.main(
        gpu_training.Options(
            device="cpu", tiny=True, seconds=0.2, probes=8, strategies=("random", "balanced"), json=tmp_path / "x"
        )
    )
    result = json.loads((tmp_path / "x").read_text())
    assert list(result["strategies"]) == ["random", "balanced"]
    for row in result["strategies"].values():
        assert row["out_of_memory"] == 0
        assert row["mean_batch"] >= 1
        assert 0 < row["mfu_without_padding"] <= row["mfu"] < 1
        assert row["audio_hours_per_hour"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile's own
def test_gpu_training_compiles_on_a_grid_with_a_budget_of_a_file(script, tmp_path):
    gpu_training = script("gpu_training")
    options = gpu_training.Options(
        device="cpu", tiny=True, probes=8, strategies=(), budget=tmp_path / "budget.json", json=tmp_path / "x"
    )
    gpu_training.main(options)
    assert not json.loads((tmp_path / "x").read_text())["strategies"]
    budget = Budget.load(tmp_path / "budget.json")
    changed = {"seconds": 0.2, "strategies": ("balanced",), "compile": True, "backend": "eager", "grid": True}
    gpu_training.main(dataclasses.replace(options, **changed))
    assert Budget.load(tmp_path / "budget.json") == budget
    row = json.loads((tmp_path / "x").read_text())["strategies"]["balanced"]
    plan = Plan(gpu_training.lengths(None, True), budget, "balanced", grid=tuple(row["grid"]))
    table = plan.table()
    assert row["grid"] != [1, 1]
    assert row["distinct_shapes"] == len(set(zip(table.size, table.frames, table.tokens))) < len(table.size)
    assert row["steps"] >= 1


def test_a_grid_has_the_fewest_shapes_for_one_percent_more_padding(script):
    index, (a, b) = script("gpu_budget").lengths(None, True), (1e6, 1e5)
    budget = Budget(2e9, Polynomial(T=a, U=b), Polynomial(T=1e-4, U=1e-5), 1e8, fixed_seconds=0.05)
    ladder = script("ladder")

    def looked_at(grid):
        plan = Plan(index, budget, "balanced", grid=grid)
        return ladder.distinct_shapes(plan.table()), plan.figures().padded_compute

    grid = ladder.few_shapes(index, budget, "balanced")
    (shapes, padded), (every, least) = looked_at(grid), looked_at((1, 1))
    assert shapes < every
    assert padded <= least + 0.01
    assert all(
        looked_at((t, u))[0] >= shapes or looked_at((t, u))[1] > least + 0.01
        for t in ladder.FRAME_GRIDS
        for u in ladder.TOKEN_GRIDS
    )


def test_a_batch_on_a_grid_has_the_shape_that_its_plan_counts(script):
    ladder, gpu_budget = script("ladder"), script("gpu_budget")
    index = gpu_budget.lengths(None, True)
    budget = Budget(4e8, Polynomial(T=1e5, U=1e4), Polynomial(T=1e-4, U=1e-5), 1e8, fixed_seconds=0.05)
    seen = []

    class Noted(ladder.Rig):
        def step(self, loaded, number):
            seen.extend(one.batch for one in loaded)
            return 0, 0

    model = SpeechModel(gpu_budget.canary(small=True))
    arm = ladder.Arm("balanced", Noted(TrainConfig(), model, "float32"), index, budget, grid=(8, 16))
    for _ in range(5):
        arm.step()
    shapes = [(len(b.rows), model.encoder_frames(b.audio.shape[1] / 16000), b.tokens.shape[1]) for b in seen]
    assert shapes == arm.shapes
    assert all(frames % 8 == tokens % 16 == 0 for _, frames, tokens in shapes)


def test_operations_are_counted_between_the_lengths_that_were_counted(script):
    gpu_budget = script("gpu_budget")
    config = gpu_budget.canary(small=True)
    flops = gpu_budget.training_flops(config, 0.08)
    cost = gpu_budget.utterance_cost(config, 12.0, 33)
    assert float(flops(cost.frames, cost.tokens)) == pytest.approx(
        3 * (cost.encoder_flops + cost.decoder_flops), rel=5e-3
    )


def test_the_ladder_of_training_speed(script, tmp_path):
    training = script("training")
    rng = np.random.default_rng(0)
    seconds = rng.uniform(0.5, 6, 200).astype(np.float32)
    table = pa.table({"duration": seconds, "tokens": (seconds * 3 + 2).astype(np.int32)})
    parquet.write_table(table, tmp_path / "lengths.parquet")
    training.main(
        training.Options(
            tmp_path / "lengths.parquet",
            minutes=0.002,
            memory=0.1,
            probes=8,
            width=16,
            layers=(1, 1),
            vocabulary=64,
            threads=1,
            turn=1,
            json=tmp_path / "x",
        )
    )
    rows = json.loads((tmp_path / "x").read_text())["strategies"]
    assert list(rows) == ["random", "duration", "bucket_1d", "bucket_2d", "balanced"]
    assert rows["balanced"]["padded_audio"] < rows["random"]["padded_audio"]
    assert all(row["audio_hours_per_hour"] > 0 and row["predicted"] > 0 for row in rows.values())
