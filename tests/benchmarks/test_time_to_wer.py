"""The time to a WER lies between the lengths of two runs, and strategies are compared seed by seed."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import time_to_wer

    yield time_to_wer
    for name in ("time_to_wer", "convergence", "ladder"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("points", "rate", "expected"),
    [
        ([(100, 0.5), (200, 0.1), (400, 0.02)], 0.1, 200),
        ([(400, 0.02), (100, 0.5), (200, 0.1)], 0.06, 200 * 2**0.5),
        ([(100, 0.05), (200, 0.04)], 0.1, 100),
        ([(100, 0.05), (200, 0.2)], 0.1, None),
        ([(100, 0.05), (200, 0.2), (400, 0.0)], 0.1, 200 * 2**0.5),
        ([], 0.1, None),
    ],
)
def test_the_time_to_a_rate(bench, points, rate, expected):
    assert bench.crossing(points, rate) == (None if expected is None else pytest.approx(expected))


def test_the_baseline_has_speed_one_and_a_faster_strategy_more(bench, tmp_path):
    options = bench.Options(tmp_path, seeds=2, minutes=(1, 2), arms=("random", "balanced"), rates=(0.1,))
    rows = [
        {
            "arm": arm,
            "seed": seed,
            "minutes": minutes,
            "seconds": 60 * minutes,
            "steps": 9,
            "audio_hours": 9,
            "wer": wer / minutes,
        }
        for arm, wer in (("random", 0.2), ("balanced", 0.1))
        for seed in range(2)
        for minutes in (1, 2)
    ]
    found = bench.summary(rows, options)
    assert found["random"]["seconds_to"]["0.1"] == pytest.approx([120, 120])
    assert found["random"]["speed_up"]["0.1"] == pytest.approx([1, 1])
    assert found["balanced"]["speed_up"]["0.1"] == pytest.approx([2, 2])
    bench.show(found, options)
    bench.draw_wer(rows, options.arms, options.minutes).savefig(tmp_path / "wer.png")
    assert (tmp_path / "wer.png").stat().st_size > 5000
