"""The complete demo, as small as possible."""

import json
import re
from dataclasses import replace

import pytest

from canter.cli.main import main
from canter.demo.pipeline import recipe, training_minutes
from canter.training.config import dump_config


def test_training_gets_what_is_left_of_ten_minutes(tmp_path):
    assert training_minutes(tmp_path, spent=1.0) == 6.5
    assert training_minutes(tmp_path, spent=4.0) == pytest.approx(4.25)
    assert training_minutes(tmp_path, spent=60.0) == 3.0
    begun = replace(recipe(tmp_path / "train.jsonl", tmp_path), minutes=4.25)
    (tmp_path / "config.yaml").write_text(dump_config(begun))
    assert training_minutes(tmp_path, spent=60.0) == 4.25


def test_the_demo_leaves_a_summary_and_a_page_that_needs_nothing_else(tmp_path):
    output = tmp_path / "demo"
    assert main(["demo", "--quick", "--utterances", "60", "--minutes", "0.02", "--output", str(output)]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["utterances"] == 60
    assert 0 < summary["audio_hours"] < 1
    assert summary["train_seconds"] > 0
    assert summary["rtfx"] > 0
    assert summary["cer"] >= 0
    assert summary["wer"] > 0.3  # nothing can be learnt in a second
    assert summary["attention_wer"] > 0.3
    assert 0 <= summary["trained_padding"] < 0.5
    assert summary["measured_speed"]["steps"] >= 1
    assert all(rate > 0 for rate in summary["measured_speed"]["audio_seconds_a_second"].values())
    assert list(summary["strategies"]) == ["random", "duration", "bucket_1d", "bucket_2d", "balanced"]
    for row in summary["strategies"].values():
        assert 0 <= row["padding"] < 1
        assert row["mean_batch"] >= 1
    shift = summary["decoder_shift"]
    assert {row["cache"] for row in shift.values()} == {"none", "hidden", "full"}
    parameters = {row["shape"]: row["parameters"] for row in shift.values()}
    deep, shallow = parameters.values()
    assert abs(deep / shallow - 1) < 0.05
    rows = [json.loads(line) for line in (output / "test.transcribed.jsonl").read_text().splitlines()]
    train = {json.loads(line)["text"] for line in (output / "corpus" / "train.jsonl").read_text().splitlines()}
    assert all("pred_text" in row and row["text"] not in train for row in rows)
    page = (output / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"""(?:src|href)=["']https?:""", page)
