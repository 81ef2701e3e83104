import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from canter.cli.main import main
from canter.planning.compare import compare, ladder, markdown

from .conftest import lengths


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    index = lengths(2500)
    path = tmp_path_factory.mktemp("lengths") / "lengths.parquet"
    pq.write_table(pa.table({"duration": index.seconds, "num_tokens": index.tokens}), path)
    return path


def test_speed_and_gpus_are_against_the_first_row(index, budget):
    rows = list(compare(index, budget, ranks=4))
    assert [row.name for row in rows] == [name for name, _, _ in ladder()]
    assert rows[0].speed == 1.0
    assert rows[0].gpus == 4
    for row in rows:
        hours = row.figures.hours / row.figures.utterances, rows[0].figures.hours / rows[0].figures.utterances
        assert row.speed == pytest.approx(hours[1] / hours[0])
        assert row.gpus == math.ceil(4 / row.speed - 1e-9)
    assert markdown(rows).count("\n") == len(rows) + 2


def test_the_command_prints_json_and_a_figure(table, budget, tmp_path, capsys):
    budget.save(tmp_path / "budget.json")
    arguments = ["compare", str(table), "--budget", str(tmp_path / "budget.json"), "--ranks", "2"]
    assert main([*arguments, "--json", "--figure", str(tmp_path / "ladder.png")]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == len(ladder())
    assert rows[-1]["padded_compute"] < rows[0]["padded_compute"]
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("strategy", "padded", "compute", "waiting", "pool", "speed", "GPUs"))


def test_plan_command_emits_every_row(table, tmp_path, capsys):
    out = tmp_path / "plan.parquet"
    assert main(["plan", str(table), "--ranks", "2", "--output", str(out), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["utterances"] == 2500
    assert sorted(pq.read_table(out)["row"].to_pylist()) == list(range(2500))
    assert main(["plan", str(table), "--strategy", "bucket_2d", "--bins"]) == 0
    assert "bucket_batch_size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "none.parquet"], "none.parquet"),
        (["compare", "{table}", "--model", "canary-2b"], "no shape named 'canary-2b'"),
        (["compare", "{table}", "--ranks", "0"], "--ranks is 0"),
        (["plan", "{table}", "--mixing", "2", "--strategy", "random"], "--mixing is an option of 'balanced'"),
        (["plan", "{table}", "--batching-window", "0"], "window is 0"),
        (["plan", "{table}", "--budget", "{table}"], "not JSON"),
    ],
)
def test_what_a_user_can_cause_is_one_message(table, arguments, message, capsys):
    assert main([argument.replace("{table}", str(table)) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
