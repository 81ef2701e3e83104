"""`canter plan` and `canter compare`: what they print, what they keep, and what a user can get wrong."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from canter.cli import compare as command
from canter.cli.main import main
from canter.corpus.index import LengthIndex
from canter.planning import Plan, analytic_budget
from canter.planning.compare import COLUMNS, compare, ladder


def write_lengths(path, seconds, tokens):
    pq.write_table(pa.table({"duration": np.asarray(seconds, float), "num_tokens": np.asarray(tokens)}), path)
    return path


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    seconds = rng.uniform(1, 20, 1500)
    return write_lengths(
        tmp_path / "set.parquet", seconds, (seconds * 3 + rng.integers(5, 30, 1500)).astype(int)
    )


@pytest.fixture(scope="module")
def rungs():
    rng = np.random.default_rng(0)
    index = LengthIndex(rng.uniform(1, 20, 1500), rng.integers(5, 80, 1500))
    return list(compare(index, analytic_budget(), ranks=2))


def lines_of(text):
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()]


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 150])
def test_a_strategy_is_one_line_however_narrow_the_terminal(rungs, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    command.show(rungs, "a title")
    lines = lines_of(capsys.readouterr().out)
    assert all(len(line) <= columns for line in lines)
    for name, _, _ in ladder():
        assert len([line for line in lines if line.startswith(f" {name}  ")]) == 1
    head = " ".join(lines[:4])
    assert {"compute", "speed"} <= set(head.split())
    missing = [name for name in COLUMNS if name.split()[-1] not in head.split()]
    note = " ".join(lines[-5:])
    assert bool(missing) == (columns < 120)
    assert all(name in note for name in missing)


def test_a_pipe_gets_all_columns(rungs, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    command.show(rungs, "a title", caption=None)
    lines = lines_of(capsys.readouterr().out)
    assert lines[0] == "a title"
    assert all(word in " ".join(lines) for name in COLUMNS for word in name.split())
    row = next(line for line in lines if line.startswith(" balanced"))
    assert len(row.split()) == len(COLUMNS) + 1


def test_plan_keeps_its_table_of_steps_beside_the_index(tmp_path, capsys):
    rng = np.random.default_rng(1)
    index = LengthIndex(rng.uniform(1, 20, 3000), rng.integers(5, 80, 3000))
    index.save(tmp_path / "lengths.arrow")
    arguments = ["plan", str(tmp_path / "lengths.arrow"), "--window", "1000", "--ranks", "2", "--json"]
    assert main(arguments) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    (kept,) = (tmp_path / "lengths.steps").iterdir()
    assert np.load(kept).tolist()[-1] == steps
    plan = Plan(LengthIndex.open(tmp_path / "lengths.arrow"), analytic_budget(), window=1000,
                micro_batches_per_step=2, cache=tmp_path / "lengths.steps")  # fmt: skip
    plan.cut = None  # type: ignore[assignment]
    assert len(plan) == steps
