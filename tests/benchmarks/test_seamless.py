"""The benchmark of Seamless, run small."""

import importlib
import json
from pathlib import Path

import pytest


def test_it_runs_small(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    script = importlib.import_module("seamless")
    script.run(script.Options(smoke=True, json=tmp_path / "x"))
    result = json.loads((tmp_path / "x").read_text())
    assert result["log_probability_difference"] < 1e-4
    assert result["rtfx"].keys() == {"canter", "transformers"}
    assert result["faster"]["least"] > 0
