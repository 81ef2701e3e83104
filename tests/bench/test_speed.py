"""Systems take turns, are warmed up, and what is reported is what was measured."""

import numpy as np
import pytest

from canter.bench import speed
from canter.bench.speed import Clip, measure_speed

CLIPS = [Clip(np.zeros(1600 * (number + 1), np.float32), 0.1 * (number + 1), (1, 2)) for number in range(6)]


class Clock:
    """Stands still but where a system takes its time."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class System:
    """Takes a given time for each clip, and notes its calls."""

    def __init__(self, name: str, calls: list, clock: Clock, seconds: float, answer: int = 0):
        self.name, self.calls, self.clock, self.seconds, self.answer = name, calls, clock, seconds, answer

    def __call__(self, clips):
        self.calls.append((self.name, len(clips)))
        self.clock.now += self.seconds * len(clips)
        return [[len(clip.audio), self.answer if clip is CLIPS[0] else 0] for clip in clips]

    def details(self):
        return {"calls": len(self.calls)}


def test_runs_are_interleaved_after_a_warm_up(monkeypatch):
    calls: list = []
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    systems = {name: System(name, calls, clock, seconds) for name, seconds in (("a", 0.002), ("b", 0.006))}
    systems["b"].answer = 1
    speeds = measure_speed(systems, CLIPS, repeats=3, latency_clips=2)
    warm = [("a", 6), ("a", 1), ("b", 6), ("b", 1)]
    assert calls == warm + [("a", 6), ("b", 6)] * 3 + [("a", 1), ("b", 1)] * 2
    a, b = speeds["a"], speeds["b"]
    assert a.seconds == pytest.approx([0.012] * 3)
    assert a.rtfx == pytest.approx(sum(clip.seconds for clip in CLIPS) / 0.012)
    assert a.rtfx == pytest.approx(3 * b.rtfx)
    assert a.latency_seconds["p50"] == pytest.approx(0.002)
    assert b.latency_seconds["p99"] == pytest.approx(0.006)
    assert (a.same_transcripts, b.same_transcripts) == (1.0, pytest.approx(5 / 6))
    assert a.tokens == 12
    assert a.details["calls"] in (5, 7, 9)


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="0 clips and 3 repeats"):
        measure_speed({}, [])
