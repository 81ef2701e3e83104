"""The benchmarks of training speed, run small."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

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
