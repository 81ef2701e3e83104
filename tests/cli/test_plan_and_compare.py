"""`canter plan` and `canter compare`: what they print, what they keep, and what a user can get wrong."""

import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from canter.cli import compare as command
from canter.cli.main import main
from canter.corpus.index import LengthIndex
from canter.planning import Plan, analytic_budget
from canter.planning.compare import compare, ladder


def write_lengths(path, seconds, tokens):
    pq.write_table(pa.table({"duration": np.asarray(seconds, float), "num_tokens": np.asarray(tokens)}), path)
    return path


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    seconds = rng.uniform(1, 20, 1500)
    return write_lengths(tmp_path / "set.parquet", seconds, (seconds * 3 + rng.integers(5, 30, 1500)).astype(int))


@pytest.fixture(scope="module")
def rungs():
    rng = np.random.default_rng(0)
    index = LengthIndex(rng.uniform(1, 20, 1500), rng.integers(5, 80, 1500))
    return list(compare(index, analytic_budget(), ranks=2))


def lines_of(text):
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()]


@pytest.mark.parametrize("columns", [60, 80, 100, 127, 150])
def test_a_strategy_is_one_line_however_narrow_the_terminal(rungs, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    command.print_comparison(rungs, "a title")
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if any(rung.name in line for rung in rungs)]
    assert [line for line in rows if "\x1b[1m" in line] == [line for line in rows if "balanced" in line]  # the default
    lines = lines_of(printed)
    assert all(len(line) <= columns for line in lines)
    for name, _, _ in ladder():
        assert len([line for line in lines if line.startswith(f" {name}  ")]) == 1
    head = " ".join(lines[:4])
    assert {"compute", "speed"} <= set(head.split())
    missing = [name for name in rungs[0].cells() if name.split()[-1] not in head.split()]
    note = " ".join(lines[-5:])
    assert bool(missing) == (columns < 128)
    assert all(name in note for name in missing)


def test_a_pipe_gets_all_columns(rungs, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    command.print_comparison(rungs, "a title", caption=None)
    lines = lines_of(capsys.readouterr().out)
    assert lines[0] == "a title"
    assert all(word in " ".join(lines) for name in rungs[0].cells() for word in name.split())
    row = next(line for line in lines if line.startswith(" balanced"))
    assert len(row.split()) == len(rungs[0].cells()) + 1


def test_compare_needs_nothing_but_lengths(table, tmp_path, capsys):
    """The table says which budget was taken: an analytic one, or a file."""
    assert main(["compare", str(table), "--ranks", "1"]) == 0
    assert "set.parquet: 1,500 utterances, analytic canary-1b on 80 GB, 1 ranks" in capsys.readouterr().out
    analytic_budget("canary-180m-flash", 16).save(tmp_path / "budget.json")
    assert main(["compare", str(table), "--ranks", "1", "--budget", str(tmp_path / "budget.json")]) == 0
    assert "1,500 utterances, budget.json, 1 ranks" in capsys.readouterr().out


def test_plan_keeps_its_table_of_steps_beside_the_index(tmp_path, capsys):
    rng = np.random.default_rng(1)
    index = LengthIndex(rng.uniform(1, 20, 3000), rng.integers(5, 80, 3000))
    index.save(tmp_path / "lengths.arrow")
    arguments = ["plan", str(tmp_path / "lengths.arrow"), "--batching-window", "1000", "--ranks", "2", "--json"]
    assert main(arguments) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    (kept,) = (tmp_path / "lengths.steps").iterdir()
    assert np.load(kept).tolist()[-1] == steps
    plan = Plan(LengthIndex.open(tmp_path / "lengths.arrow"), analytic_budget(), window=1000,
                micro_batches_per_step=2, cache=tmp_path / "lengths.steps")  # fmt: skip
    object.__setattr__(plan, "cut", None)  # the table is enough
    assert len(plan) == steps


def test_min_steps_and_limits_in_tokens_per_second(tmp_path, capsys):
    path = write_lengths(tmp_path / "set.parquet", [5.0] * 300 + [20.0] * 100, [20] * 299 + [101] + [300] * 100)
    options = [str(path), "--ranks", "2", "--json", "--min-steps", "30", "--max-tokens-per-second", "10:20", "30:14"]
    assert main(["plan", *options]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["steps"] == 30
    assert value["left_out"] == {"over the tokens-per-second bound": 101}
    assert main(["compare", *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(30 <= row["steps"] <= 40 for row in rows)
    assert {row["left_out"] for row in rows} == {101}


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """60 rows without num_tokens, one of them broken, and a cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "train.jsonl"
    rows = [
        {"audio_filepath": f"{n}.wav", "duration": 2.0 + n % 7, "text": "nine letters" if n % 2 else "日本語"}
        for n in range(59)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n", encoding="utf-8")
    return path


def test_a_manifest_is_compared_planned_and_inspected_in_one_command(manifest, capsys):
    """Tokens are estimated, 4 of "nine letters" and 3 of the Japanese, and the output says so."""
    assert main(["compare", str(manifest), "--ranks", "1"]) == 0
    captured = capsys.readouterr()
    assert "train.jsonl: 59 utterances, tokens estimated, analytic canary-1b" in captured.out
    assert "tokens are estimated from the characters" in captured.err
    assert "left out of" in captured.err
    assert f"{manifest}:60: invalid JSON" in captured.err
    assert main(["inspect", str(manifest), "--prompt-tokens", "2", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["tokens_estimated"]
    assert value["tokens"] == 29 * (4 + 3) + 30 * (3 + 3)
    assert main(["plan", str(manifest), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["utterances"] == 59
    assert value["tokens_estimated"]
    assert main(["plan", str(manifest), "--tokenizer", "chars", "--json"]) == 0
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["tokens_estimated"]
    assert "estimated" not in captured.err


def test_a_manifest_is_read_again_only_where_it_changed(manifest, tmp_path, capsys):
    assert main(["plan", str(manifest), "--json"]) == 0
    (parts,) = (tmp_path / "cache" / "canter" / "lengths").glob("*.parts")
    before = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert main(["plan", str(manifest), "--json"]) == 0
    assert {path: path.stat().st_mtime_ns for path in parts.iterdir()} == before
    with manifest.open("a") as file:
        file.write('\n{"audio_filepath": "z.wav", "duration": 1.0, "text": "z"}\n')
    capsys.readouterr()
    assert main(["plan", str(manifest), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["utterances"] == 60


def test_the_planning_commands_import_no_torch(manifest):
    code = (
        "import sys; from canter.cli.main import main; "
        f"codes = [main([name, {str(manifest)!r}, '--json']) for name in ('plan', 'inspect')]; "
        "sys.exit(any(codes) or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_plan_says_what_limits_the_batches(table, capsys):
    assert main(["plan", str(table), "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"batches: \d+\.\d% of the memory filled .* 50 steps an epoch; limited by --min-steps 50", out)
    assert main(["plan", str(table), "--ranks", "2", "--min-steps", "1", "--json"]) == 0
    limits = json.loads(capsys.readouterr().out)["limits"]
    assert limits["by"] == "memory"
    assert limits["memory_filled"] > 0.8


def refused(arguments, capsys):
    """The one line of standard error with which a command refuses."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("canter: ")
    assert captured.out == ""
    return line


@pytest.mark.parametrize("command", ["plan", "compare"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2000"], "--ranks is 2000 and there are only 1500 utterances"),
        (["--ranks", "0"], "--ranks is 0"),
        (["--micro-batches-per-step", "0"], "micro_batches_per_step is 0"),
        (["--batching-window", "0"], "window is 0"),
        (["--mixing", "nan"], "mixing is nan"),
        (["--min-steps", "0"], "min_steps is 0"),
        (["--prompt-tokens", "-1"], "--prompt-tokens is -1"),
        (["--memory", "nan"], "--memory is 'nan'; give a size such as 80GiB"),
        (["--memory", "10GiB"], "10.7374 GB leave no room for a batch"),
        (["--memory", "10"], "10 GB leave no room for a batch"),
        (["--budget", "none.json"], "none.json: no such budget; make one with 'canter tune'"),
    ],
)
def test_settings_that_cannot_be(table, command, arguments, message, capsys):
    assert message in refused([command, table, *arguments], capsys)


@pytest.mark.parametrize("command", ["plan", "compare"])
@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("fast", "max_tokens_per_second has 'fast'; give one limit such as 25"),
        ("10:0", "max_tokens_per_second is 10:0; durations and limits must be positive"),
    ],
)
def test_limits_in_tokens_per_second_that_cannot_be(table, command, limit, message, capsys):
    """They are read as those of `canter train`: an invalid one is an error of usage."""
    with pytest.raises(SystemExit):
        main([command, str(table), "--max-tokens-per-second", limit])
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["plan", "compare", "inspect"])
def test_what_can_be_read_neither_as_manifest_nor_as_index(table, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "junk.txt").write_text("hello\n")
    line = refused([command, tmp_path / "junk.txt"], capsys)
    assert f"{tmp_path}/junk.txt:1: invalid JSON" in line
    assert "canter index" in line
    assert "--tokenizer counts the tokens of a manifest" in refused([command, table, "--tokenizer", "chars"], capsys)


def test_a_plan_that_has_nowhere_to_go(table, capsys):
    assert "there is no folder nowhere" in refused(["plan", table, "--output", "nowhere/plan.parquet"], capsys)


def test_a_plan_for_more_ranks_than_batches(table, capsys):
    line = refused(["plan", table, "--strategy", "random", "--ranks", "200", "--min-steps", "1"], capsys)
    assert re.search(r"--ranks is 200 and there are only \d+ micro-batches: the others would only wait", line)


@pytest.mark.parametrize("command", ["plan", "compare"])
def test_a_budget_of_another_model_is_refused(table, command, tmp_path, capsys):
    budget = tmp_path / "budget.json"
    analytic_budget("canary-180m-flash", 16).save(budget)
    arguments = [command, table, "--budget", budget]
    line = refused([*arguments, "--model", "canary-1b"], capsys)
    assert f"{budget}: the budget is of canary-180m-flash, not of canary-1b" in line
    assert "--memory is for the analytic budget" in refused([*arguments, "--memory", "16"], capsys)
    assert main([str(a) for a in [*arguments, "--model", "canary-180m-flash", "--json"]]) == 0
    capsys.readouterr()
    text = json.loads(budget.read_text())
    text["measured_on"] = {"model": "canter 17/4 x 512"}
    budget.write_text(json.dumps(text))
    line = refused([*arguments, "--model", "whisper-base"], capsys)
    assert "counts frames of 0.08 s and whisper-base has frames of 0.02 s" in line


def test_an_utterance_over_the_budget_by_itself_is_listed(tmp_path, capsys):
    path = write_lengths(tmp_path / "set.parquet", [5.0] * 40 + [9000.0, 8000.0], [20] * 42)
    assert main(["plan", str(path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"left out: over the budget by itself\W+2\b", out)
    assert "row 40: over the budget by itself row 41: over the budget by itself" in out
    assert main(["plan", str(path), "--json", "--output", str(tmp_path / "plan.parquet")]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["left_out"] == {"over the budget by itself": 2}
    assert value["left_out_rows"] == [40, 41]
    assert sorted(pq.read_table(tmp_path / "plan.parquet")["row"].to_pylist()) == list(range(40))
    assert main(["compare", str(path), "--ranks", "1", "--json"]) == 0
    assert {row["left_out"] for row in json.loads(capsys.readouterr().out)["rows"]} == {2}


@pytest.mark.parametrize("command", ["plan", "compare"])
def test_nothing_fits(tmp_path, command, capsys):
    path = write_lengths(tmp_path / "set.parquet", [9000.0] * 3, [20] * 3)
    line = refused([command, path, "--ranks", "1"], capsys)
    assert "none of the 3 utterances can be used with this budget" in line


@pytest.mark.parametrize("command", ["plan", "compare"])
def test_impossible_lengths_are_counted_and_listed(tmp_path, command, capsys):
    seconds = [5.0, float("nan"), -1.0, 0.0, float("inf"), *[4.0] * 20]
    path = write_lengths(tmp_path / "set.parquet", seconds, [20] * 25)
    assert main([command, str(path), "--ranks", "1", "--json"]) == 0
    captured = capsys.readouterr()
    value = json.loads(captured.out)
    assert (value["rows"][-1] if command == "compare" else value)["utterances"] == 21
    assert "left out of the table, 4: duration is not a positive number of seconds" in captured.err
    assert f"{path}:2: duration is not a positive number of seconds: nan" in captured.err
    assert f"{path}:3: duration is not a positive number of seconds: -1.0" in captured.err


@pytest.mark.parametrize("command", ["plan", "compare"])
def test_tables_without_a_usable_row(tmp_path, command, capsys):
    empty = write_lengths(tmp_path / "empty.parquet", [], np.array([], int))
    assert "no row can be used" in refused([command, empty], capsys)
    bad = write_lengths(tmp_path / "bad.parquet", [-1.0, float("nan")], [3, 3])
    line = refused([command, bad], capsys)
    assert "no row can be used" in line
    assert "duration is not a positive number of seconds: -1.0" in line
    pq.write_table(pa.table({"duration": [1.0]}), tmp_path / "half.parquet")
    assert "needs the columns duration (seconds) and num_tokens" in refused(
        [command, tmp_path / "half.parquet"], capsys
    )


@pytest.mark.parametrize("weight", ["0", "-1", ".nan"])
def test_a_source_of_weight_0(tmp_path, table, weight, capsys):
    (tmp_path / "mix.yaml").write_text(
        f"- {{path: set.parquet, weight: 1}}\n- {{path: set.parquet, name: again, weight: {weight}}}\n"
    )
    line = refused(["index", tmp_path / "mix.yaml", "-o", tmp_path / "l.arrow"], capsys)
    assert "again" in line
    assert "weight" in line
    assert not (tmp_path / "l.arrow").exists()
