"""The page of the paper's claims has the tables of the committed results, and its parts run and continue."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/paper.py"


@pytest.fixture
def paper(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import paper

    yield paper
    for name in ("paper", "ranks", "time_to_wer", "convergence", "ladder"):
        sys.modules.pop(name, None)


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "CANTER_SHARED"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_the_page_has_the_tables_of_the_committed_results(paper):
    page = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    assert set(paper.TABLE_NAMES.findall(page)) <= set(paper.TABLES)
    assert paper.with_tables(page) == page, "run: python benchmarks/paper.py --publish"


def test_a_table_between_marks_is_replaced_by_that_of_the_newest_result(paper, monkeypatch, tmp_path):
    monkeypatch.setattr(paper, "RESULTS", tmp_path)
    row = {"name": "random", "padded_audio": 0.5, "padded_compute": 0.6, "mean_batch": 17.2, "memory_filled": 0.5,
           "waiting": 1.1, "speed": 1.0}  # fmt: skip
    for day, padded in (("2026-01-01", 0.1), ("2026-02-01", 0.2)):
        result = {"rows": [row | {"padded_audio": padded}]}
        (tmp_path / f"{day}-paper-padding.json").write_text(json.dumps(result), encoding="utf-8")
    page = "before\n<!-- table: padding -->\nold\n<!-- end -->\nafter <!-- table: depth -->\n<!-- end -->\n"
    made = paper.with_tables(page)
    assert "| random | 20.0% | 60.0% | 17 | 50% | 1.100 | 1.00x |" in made
    assert "old" not in made
    assert made.startswith("before\n")
    assert "after <!-- table: depth -->\n<!-- end -->\n" in made
    assert paper.with_tables(made) == made


def test_parts_run_in_processes_and_a_second_call_continues(tmp_path):
    result = call("padding", "ranks", "real-speech", "--quick", "-o", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "real-speech is left out" in " ".join((result.stdout + result.stderr).split())
    rows = json.loads((tmp_path / "padding.json").read_text(encoding="utf-8"))["rows"]
    padded = {row["name"].split()[0]: row["padded_compute"] for row in rows}
    assert padded["balanced"] < padded["random"]
    ranks = tmp_path / "ranks.json"
    kept = json.loads(ranks.read_text(encoding="utf-8"))["parts"]
    assert len(kept) > 10
    before = ranks.stat().st_mtime_ns
    assert call("ranks", "--quick", "-o", tmp_path).returncode == 0
    assert ranks.stat().st_mtime_ns == before  # every part was kept, so nothing was written


def test_a_part_that_fails_is_named_with_its_messages(tmp_path):
    (tmp_path / "lengths.parquet").write_bytes(b"no table")
    result = call("padding", "--quick", "-o", tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "padding ended with status" in result.stderr
    assert "padding.log" in result.stderr


def test_an_unknown_part_is_one_line(tmp_path):
    result = call("paddin", "-o", tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "paper.py: no part named 'paddin'; there are padding, ranks, time-to-wer, real-speech, depth"
    )
