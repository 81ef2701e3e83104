"""The table of defaults, made of small sets."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_table_of_defaults(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("training_defaults", BENCHMARKS / "training_defaults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    seconds = np.random.default_rng(0).uniform(1, 20, 2000).astype(np.float32)
    table = pa.table({"duration": seconds, "num_tokens": (3 * seconds + 5).astype(np.int32)})
    parquet.write_table(table, tmp_path / "lengths.parquet")
    module.main(module.Options(*[tmp_path / "lengths.parquet"] * 3, json=tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row["steps"] >= 50 for row in rows.values())
    printed = capsys.readouterr().out
    assert all(row["line"] in printed for row in rows.values())
    padded = [row for name, row in rows.items() if "padded to 30 s" in name]
    assert all(row["utterances"] > 10 for row in padded)
