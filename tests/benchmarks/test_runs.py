"""`make bench`: what it runs is there and listed, and what it cannot run it says."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def bench(*names, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "CANTER_SHARED"}
    return subprocess.run(
        [sys.executable, FOLDER, *names], capture_output=True, text=True, env={**clean, **environment}
    )


def test_what_is_run_is_there_and_in_the_table():
    listed = bench("--list").stdout.splitlines()
    table = (FOLDER / "README.md").read_text()
    assert len(listed) > 10
    for line in listed:
        script = line.split()[1]
        assert script.startswith("$shared") or ((FOLDER / script).is_file() and f"`{script}`" in table)


def test_without_data_a_line_says_so():
    done = bench("planning", "serving")
    assert done.returncode == 0
    assert (
        done.stdout.count("passed over: it takes real lengths or speech from the folder that CANTER_SHARED names") == 2
    )
    assert bench("nothing").returncode == 2


def test_a_benchmark_that_fails_is_named(tmp_path):
    done = bench("planning_real", CANTER_SHARED=str(tmp_path))
    assert done.returncode == 1
    assert "failed: planning_real" in done.stderr
