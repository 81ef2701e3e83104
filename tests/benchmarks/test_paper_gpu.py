"""`make paper-gpu`: parts in processes of their own, their records, and the summary, at toy size on a CPU."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from canter.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "paper_gpu.py"
PATIENCE = 300.0  # seconds, until an event that never comes fails the test
# A part that never ends: it writes what it measured first, as a benchmark does
ENDLESS = """
import json, os, sys, time
from canter.files import write_text
write_text(sys.argv[sys.argv.index("--json") + 1], json.dumps({"pid": os.getpid()}))
time.sleep(100_000)
"""


@pytest.fixture
def paper_gpu(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("paper_gpu")


@pytest.fixture
def endless(tmp_path) -> Path:
    (tmp_path / "endless.py").write_text(ENDLESS)
    return tmp_path / "endless.py"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}


def command(folder: Path, *arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), "--output", str(folder), *map(str, arguments)]


def wait_until(happened) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
    except FileNotFoundError:
        return True


def record(folder: Path, part: str) -> dict:
    return json.loads((folder / f"{part}.json").read_text())


@pytest.mark.slow
def test_a_second_call_continues_after_a_kill(tmp_path):
    smoke = command(tmp_path, "--smoke", "--parts", "budget", "decoder_shift")
    first = subprocess.Popen(smoke, env=environment(), stdout=subprocess.DEVNULL)
    wait_until((tmp_path / "decoder_shift.log").exists)  # the second part has begun
    first.kill()
    first.wait()
    before = (tmp_path / "budget.json").stat().st_mtime_ns
    assert "| budget | complete |" in (tmp_path / "summary.md").read_text()
    done = subprocess.run(smoke, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "== budget" not in done.stdout
    assert (tmp_path / "budget.json").stat().st_mtime_ns == before
    assert record(tmp_path, "budget")["result"]["budget"]["format"] == "canter-budget/1"
    assert [row["shape"] for row in record(tmp_path, "decoder_shift")["result"]["rows"]] == ["2/2"] * 2 + ["3/1"] * 2
    summary = (tmp_path / "summary.md").read_text()
    assert "| budget | complete |" in summary
    assert "| decoder_shift | complete |" in summary
    assert "| random | not run yet |" in summary
    assert "Toy sizes on a CPU" in summary
    assert "| 3/1 | engine |" in summary
    again = subprocess.run(smoke, env=environment(), capture_output=True, text=True)
    assert "== " not in again.stdout
    other = subprocess.run([*smoke, "--seconds", "3"], env=environment(), capture_output=True, text=True)
    assert other.returncode == 1
    assert "holds figures for seconds 60.0, here it is 3.0" in other.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_kill_ends_the_part_and_keeps_what_it_had_written(tmp_path, endless, number, status):
    """SIGTERM leaves a record; after SIGKILL there is none, and the part's process ends all the same."""
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import paper_gpu
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
part = paper_gpu.Part("endless", {str(endless)!r}, (), 100_000, 0)
paper_gpu.run(part, part.limit, Path({str(tmp_path)!r}), os.environ)
"""
    driver = subprocess.Popen([sys.executable, "-c", code], env=environment())
    raw = tmp_path / "raw" / "endless.json"
    wait_until(raw.exists)
    pid = json.loads(raw.read_text())["pid"]
    assert not ended(pid)
    driver.send_signal(number)
    assert driver.wait(PATIENCE) == status
    wait_until(lambda: ended(pid))
    assert (tmp_path / "endless.json").exists() == (number == signal.SIGTERM)
    if number == signal.SIGTERM:
        found = record(tmp_path, "endless")
        assert found["result"] == {"pid": pid}
        assert found["said"] == f"stopped after {found['seconds']:.0f} s"


def test_a_part_is_stopped_at_its_limit_and_loses_no_earlier_result(tmp_path, endless, paper_gpu):
    part = paper_gpu.Part("endless", str(endless), (), 0.0, 0.0)
    paper_gpu.run(part, 0.0, tmp_path, environment())
    first = record(tmp_path, "endless")
    assert (first["ended"], first["said"], first["result"]) == ("stopped", "stopped after 0 s", None)
    kept = first | {"result": {"rows": [1]}}
    (tmp_path / "endless.json").write_text(json.dumps(kept))
    paper_gpu.run(part, 0.0, tmp_path, environment())
    assert record(tmp_path, "endless") == kept


def test_a_part_that_fails_is_told_with_its_last_line(tmp_path, paper_gpu):
    (tmp_path / "broken.py").write_text("raise ValueError('no such shape')\n")
    part = paper_gpu.Part("broken", str(tmp_path / "broken.py"), (), 100.0, 0.0)
    paper_gpu.run(part, PATIENCE, tmp_path, environment())
    found = record(tmp_path, "broken")
    assert found["said"] == "failed with status 1: ValueError: no such shape"
    assert not part.done(found)


@pytest.mark.parametrize(
    ("ended", "seconds", "result", "done"),
    [
        ("complete", 3.0, {"rows": []}, True),
        ("stopped", 90.0, {"rows": []}, True),  # by its own limit: another call measures no more
        ("stopped", 90.0, None, False),
        ("stopped", 20.0, {"rows": []}, False),  # it had too little time
        ("failed", 90.0, {"rows": []}, False),
    ],
)
def test_parts_that_are_measured_again(paper_gpu, ended, seconds, result, done):
    part = paper_gpu.Part("one", "one.py", (), 90.0, 30.0)
    assert part.done({"ended": ended, "seconds": seconds, "result": result}) is done
    assert not part.done(None)


def training(hours: float, mfu: float, **others) -> dict:
    row = {"audio_hours_per_hour": hours, "mfu": mfu, "mfu_without_padding": mfu / 2, "memory_filled": 0.9,
           "out_of_memory": 0, "mean_batch": 50.0, "padded_audio": 0.1, "distinct_shapes": 30,
           "micro_batches_an_epoch": 90, "grid": [1, 1], "seconds": 60.0, **others}  # fmt: skip
    return {"ended": "complete", "said": "complete", "seconds": 80.0, "result": {"strategies": {"any": row}}}


def test_the_summary_compares_figures_with_their_goals(paper_gpu):
    engines = [{"model": "canary", "engine": "canter", "rtfx": 900.0}]
    partly = {"ended": "stopped", "said": "stopped after 9 s", "seconds": 9.0, "result": {"engines": engines}}
    whole = {**partly, "result": {"engines": [*engines, {"model": "canary", "engine": "transformers", "rtfx": 250.0}]}}
    found = {
        "tests": {"said": "complete", "seconds": 9.0, "result": {"passed": 36, "failed": 0, "skipped": 1}},
        "random": training(600.0, 0.2),
        "balanced": training(1560.0, 0.44),
        "compiled_grid": training(1600.0, 0.46, grid=[2, 8]),
        "inference_canary": whole,
        "inference_cohere": partly,
    }
    machine = {"smoke": False, "device": "H200", "torch": "2.11", "date": "2026-11-30", "lengths": "drawn"}
    text = "\n".join(paper_gpu.summary(found, [*found, "decoder_shift"], machine))
    for line in (
        "| tests on the GPU | none fails | 36 passed, 0 failed, 1 skipped | yes |",
        "| audio hours per hour, `balanced` over `random` | at least 2.50x | 2.60x | yes |",
        "| MFU of `balanced`, of the measured matrix rate | at least 45.0% | 44.0% | no |",
        "| the same with compiled layers, the better | at least 45.0% | 46.0% | yes |",
        "| RTFx of Canary flash's shape over transformers | at least 3.00x | 3.60x | yes |",
        "| RTFx of Cohere's shape over transformers | at least 3.00x | not measured |  |",
        "| compiled_grid | 1,600 | 2.67x | 46.0% | 23.0% | 90.0% | 0 | 50.0 | 10.0% | 30 of 90, grid 2 x 8 | 60 s |",
        "| inference_cohere | stopped after 9 s | 9 s |",
        "| decoder_shift | not run yet |  |",
    ):
        assert line in text.splitlines(), line
    toy = "\n".join(paper_gpu.summary(found, list(found), machine | {"smoke": True}))
    assert "at least" not in toy


def test_without_a_gpu_one_line_names_the_smoke_run(tmp_path):
    done = subprocess.run(command(tmp_path), env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "paper_gpu: torch finds no GPU; --smoke runs the same parts at toy size on a CPU\n"
    assert not list(tmp_path.iterdir())


def test_unknown_parts_and_missing_lengths_are_refused(tmp_path, paper_gpu):
    with pytest.raises(ConfigError, match=r"gone.parquet: no such file"):
        paper_gpu.main(paper_gpu.Options(tmp_path, lengths=tmp_path / "gone.parquet"))
    with pytest.raises(ConfigError, match="no part 'training'; there are tests, budget, random"):
        paper_gpu.main(paper_gpu.Options(tmp_path, parts=("training",)))


def test_outcomes_of_tests_are_counted(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_one(): pass\ndef test_two(): assert 0\n@pytest.mark.skip\ndef test_three(): pass\n"
    )
    script = [sys.executable, str(SCRIPT.with_name("gpu_tests.py")), str(tmp_path / "test_some.py")]
    done = subprocess.run([*script, "--json", str(tmp_path / "x")], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    counts = json.loads((tmp_path / "x").read_text())
    assert {name: counts[name] for name in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 1, "skipped": 1}
    assert [name.split("::")[-1] for name in counts["failed_tests"]] == ["test_two"]
