"""The benchmarks of budgets, run small."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark by name, as when it is run."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_gpu_budget_runs_small_without_a_gpu(script, tmp_path):
    options = [
        "--device",
        "cpu",
        "--tiny",
        "--probes",
        "8",
        "--search-buckets",
        "1",
        "--steps",
        "3",
        "--json",
        str(tmp_path / "x"),
    ]
    script("gpu_budget").main(options)
    result = json.loads((tmp_path / "x").read_text())
    fit, search = result["fit"], result["search"]
    assert fit["out_of_memory"] <= 5
    assert 0 < fit["steps"] <= 12
    assert search["out_of_memory"] >= 1
    assert len(search["sizes"]) == len(fit["sizes"]) == 2
    assert min(*search["sizes"], *fit["sizes"]) > 0
    assert result["extreme_batches"]["steps"] == len(result["rows"]) == 3
    for row in result["rows"]:
        assert 0.6 < row["predicted"] / row["needed"] < 1.6
        assert row["seconds"] > 0
        assert 0 < row["mfu"] < 1
