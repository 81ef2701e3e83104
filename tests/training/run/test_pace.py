"""A run of given minutes ends in time, also on a machine that becomes slower or faster on the way."""

import pytest

from canter.training.config import LossConfig, TrainConfig
from canter.training.schedule import Pace


def simulated(minutes: float, promised: float, seconds_at) -> tuple[float, int]:
    """Return the seconds that a run takes, and its steps; ``seconds_at(elapsed)`` is the time of a step."""
    config = TrainConfig(minutes=minutes, loss=LossConfig(ctc_weight=0.3, ctc_warmup=0.2))
    pace, elapsed, step = Pace(config, promised), 0.0, 0
    steps = round(minutes * 60 / promised)
    pace.plan(0, steps)
    while step < steps:
        taken = seconds_at(elapsed)
        step, elapsed = step + 1, elapsed + taken
        pace.took(promised, taken)
        if step == pace.at:
            steps = pace.steps(step, steps, elapsed)
            pace.plan(step, steps)
    return elapsed, step


@pytest.mark.parametrize(
    ("name", "seconds_at"),
    [
        ("as promised", lambda elapsed: 0.14),
        ("slower from the start", lambda elapsed: 0.5),
        ("slower from a third on", lambda elapsed: 0.14 if elapsed < 130 else 0.42),
        ("slower from half on", lambda elapsed: 0.14 if elapsed < 195 else 0.42),
        ("slower near the end", lambda elapsed: 0.14 if elapsed < 330 else 0.42),
        ("faster from half on", lambda elapsed: 0.42 if elapsed < 195 else 0.14),
        ("now slow, now fast", lambda elapsed: 0.42 if int(elapsed / 40) % 2 else 0.14),
    ],
)
def test_the_minutes_are_kept(name, seconds_at):
    elapsed, steps = simulated(6.5, promised=0.14, seconds_at=seconds_at)
    assert elapsed == pytest.approx(390, rel=0.07), name
    assert steps > 700
