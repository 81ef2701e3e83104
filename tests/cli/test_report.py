"""`canter report`: where the page goes, and what a user can get wrong."""

import json

from canter.cli.main import main


def test_page_is_in_the_run_folder_or_at_the_given_path(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": 2.0}) + "\n")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "1 steps" in (run / "report.html").read_text()
    other = tmp_path / "pages" / "x.html"
    assert main(["report", str(run), "-o", str(other)]) == 0
    assert other.read_text().startswith("<!doctype html>")


def test_no_run_folder_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "is not a run folder" in error
    assert error.count("\n") == 1
