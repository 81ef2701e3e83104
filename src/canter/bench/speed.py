"""How fast systems decode the same clips: runs interleaved, so that a slow moment of the machine falls on all alike.

What is timed begins with samples in memory and ends with token ids in Python: reading files and spelling text are
the same for all and left out.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Protocol

import numpy as np

from canter.evaluation.wer import rtfx
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import Counters, Request

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Clip:
    """One utterance to decode."""

    audio: np.ndarray
    """(S,) float32 at the model's rate."""
    seconds: float
    prompt: tuple[int, ...]
    """The decoder's first tokens."""


class System(Protocol):
    """A model in a framework."""

    def __call__(self, clips: Sequence[Clip]) -> list[list[int]]:
        """Token ids of every clip, in the order given, without prompt and end."""
        ...

    def details(self) -> dict[str, Any]:
        """What it can tell of its last call: counts, and where its seconds went."""
        ...


@dataclass(frozen=True)
class Speed:
    """What was measured of one system."""

    seconds: tuple[float, ...]
    """Of all clips in one queue, each repeat."""
    rtfx: float
    """Seconds of audio a second of the median repeat."""
    latency_seconds: dict[str, float]
    """Percentiles (p50, ...) over clips decoded alone."""
    same_transcripts: float
    """Share of clips with the tokens of the first system."""
    tokens: int
    details: dict[str, Any] = field(default_factory=dict)
    """Of the median repeat."""


class CanterSystem:
    """Canter's engine."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def __call__(self, clips: Sequence[Clip]) -> list[list[int]]:
        self.engine.counters = Counters(slots=self.engine.counters.slots)
        found = self.engine.decode([Request(clip.audio, clip.prompt) for clip in clips])
        return [hypothesis.tokens for hypothesis in found]

    def details(self) -> dict[str, Any]:
        counters = self.engine.counters
        parts = {
            name: getattr(counters, f"{name}_seconds") / max(counters.seconds, 1e-9)
            for name in ("feature", "encoder", "decoder")
        }
        return {
            "shares": {**parts, "other": max(0.0, 1.0 - sum(parts.values()))},
            "useful_rows": counters.useful_rows,
            "mean_rows": counters.mean_rows,
            "counters": asdict(counters),
        }


def measure(
    systems: dict[str, System], clips: Sequence[Clip], *, repeats: int = 3, latency_clips: int = 20
) -> dict[str, Speed]:
    """Every system's speed on ``clips`` in one queue, and its latency on some of them, spread over all, one by one.

    Each system is warmed up on what is timed: the whole queue, and a clip alone. Raises ValueError without clips.
    """
    if not clips or repeats < 1:
        raise ValueError(f"{len(clips)} clips and {repeats} repeats: there must be at least one of both")
    alone = [
        clips[place] for place in np.unique(np.linspace(0, len(clips) - 1, min(latency_clips, len(clips))).astype(int))
    ]
    found: dict[str, list[list[int]]] = {}
    for name, system in systems.items():
        found[name] = system(clips)
        system(alone[:1])
    runs: dict[str, list[tuple[float, dict[str, Any]]]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, system in systems.items():
            seconds = _seconds(system, clips)
            runs[name].append((seconds, system.details()))
    latencies: dict[str, list[float]] = {name: [] for name in systems}
    for clip in alone:
        for name, system in systems.items():
            latencies[name].append(_seconds(system, [clip]))
    first = next(iter(found.values()))
    audio = sum(clip.seconds for clip in clips)
    return {
        name: Speed(
            seconds=tuple(seconds for seconds, _ in timed),
            rtfx=rtfx(audio, median(seconds for seconds, _ in timed)),
            latency_seconds={f"p{percent}": float(np.percentile(latencies[name], percent)) for percent in PERCENTILES},
            same_transcripts=sum(map(list.__eq__, found[name], first)) / len(clips),
            tokens=sum(map(len, found[name])),
            details=sorted(timed, key=lambda run: run[0])[(len(timed) - 1) // 2][1],
        )
        for name, timed in runs.items()
    }


def _seconds(system: System, clips: Sequence[Clip]) -> float:
    begun = time.perf_counter()
    system(clips)
    return time.perf_counter() - begun
