"""Systems take turns, are warmed up, and what is reported is what was measured."""

import time

import numpy as np
import pytest

from canter.evaluation.speed import Clip, measure

CLIPS = [Clip(np.zeros(1600 * (number + 1), np.float32), 0.1 * (number + 1), (1, 2)) for number in range(6)]


class Sleeper:
    """Takes a given time for each clip, and notes its calls."""

    def __init__(self, name: str, calls: list, seconds: float, answer: int = 0):
        self.name, self.calls, self.seconds, self.answer = name, calls, seconds, answer

    def __call__(self, clips):
        self.calls.append((self.name, len(clips)))
        time.sleep(self.seconds * len(clips))
        return [[len(clip.audio), self.answer if clip is CLIPS[0] else 0] for clip in clips]

    def details(self):
        return {"calls": len(self.calls)}


def test_runs_are_interleaved_after_a_warm_up():
    calls: list = []
    systems = {name: Sleeper(name, calls, seconds) for name, seconds in (("a", 0.002), ("b", 0.006))}
    systems["b"].answer = 1
    speeds = measure(systems, CLIPS, repeats=3, latency_clips=2)
    warm = [("a", 6), ("a", 1), ("b", 6), ("b", 1)]
    assert calls == warm + [("a", 6), ("b", 6)] * 3 + [("a", 1), ("b", 1)] * 2
    a, b = speeds["a"], speeds["b"]
    assert len(a.seconds) == 3
    assert a.rtfx == pytest.approx(sum(clip.seconds for clip in CLIPS) / sorted(a.seconds)[1])
    assert b.rtfx < a.rtfx
    assert 0.002 <= a.latency_seconds["p50"] <= a.latency_seconds["p99"]
    assert (a.same_transcripts, b.same_transcripts) == (1.0, pytest.approx(5 / 6))
    assert a.tokens == 12
    assert a.details["calls"] in (5, 7, 9)


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="0 clips and 3 repeats"):
        measure({}, [])
