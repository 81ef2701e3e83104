"""Two source trees are measured in turns over the public API."""

import importlib
import json
from pathlib import Path

import pytest

import canter

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_a_tree_beside_itself(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    paired = importlib.import_module("paired")
    source = str(Path(canter.__file__).parents[1])
    sizes = ["--rounds", "2", "--utterances", "2000", "--clips", "2", "--seconds", "2", "--steps", "4", "--width", "16"]
    paired.main([source, source, *sizes, "-o", str(tmp_path / "x.json")])
    found = json.loads((tmp_path / "x.json").read_text())["parts"]
    assert list(found) == ["planning", "engine", "training"]
    for row in found.values():
        assert row["same_results"]
        assert row["before_seconds"] > 0
        assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
    assert capsys.readouterr().out.count("yes") == 3


def test_a_tree_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    paired = importlib.import_module("paired")
    (tmp_path / "canter").mkdir()
    (tmp_path / "canter" / "__init__.py").write_text("raise ImportError('broken')")
    with pytest.raises(SystemExit, match=r"the measurement failed[\s\S]*broken"):
        paired.main([str(tmp_path), str(tmp_path), "--parts", "planning", "--rounds", "1"])
