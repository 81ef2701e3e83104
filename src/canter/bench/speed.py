"""Measure how fast systems decode the same clips.

Timing begins with samples in memory and ends with token ids in Python. Reading files and turning tokens into text are
the same for all systems and are not timed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Protocol, TypedDict

import numpy as np

from canter.corpus.audio import load_utterance
from canter.corpus.manifest import Utterance
from canter.errors import CanterError, ConfigError
from canter.evaluation.wer import rtfx
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import Counters, Request
from canter.inference.inputs import Defaults, read_items

PERCENTILES = (50, 90, 95, 99)
NOISE_CLIPS, NOISE_SECONDS = 32, (2.0, 15.0)


@dataclass(frozen=True)
class Clip:
    """An utterance to decode."""

    audio: np.ndarray
    """(S,) float32 at the model's sample rate."""
    seconds: float
    prompt: tuple[int, ...]
    """First tokens of the decoder."""


class Details(TypedDict, total=False):
    """Figures that only Canter's engine measures."""

    shares: dict[str, float]
    """Fractions of the time by part: feature, encoder, decoder, other."""
    useful_rows: float
    """Fraction of the decoder's rows that had not ended."""
    mean_rows: float
    """Useful rows per decoder step."""
    acceptance: float
    """Accepted fraction of the drafted tokens."""
    steps_per_token: float
    """Decoder steps of a row for each of its tokens."""
    counters: dict[str, float]


class System(Protocol):
    """A model in a framework."""

    def __call__(self, clips: Sequence[Clip]) -> list[list[int]]:
        """Return the token ids of every clip, in the order given, without prompt and end token."""
        ...

    def details(self) -> Details:
        """Return figures of the last call."""
        ...


@dataclass(frozen=True)
class Speed:
    """Measurements of one system."""

    seconds: tuple[float, ...]
    """Time for all clips in one queue, each repeat."""
    rtfx: float
    """Seconds of audio per second, of the median repeat."""
    latency_seconds: dict[str, float]
    """Percentiles (p50, ...) of the time for a single clip."""
    same_transcripts: float
    """Fraction of clips with the tokens of the first system of the same beam size."""
    tokens: int
    details: Details
    """Details of the median repeat."""


class EngineSystem:
    """Canter's engine."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def __call__(self, clips: Sequence[Clip]) -> list[list[int]]:
        self.engine.counters = Counters(slots=self.engine.counters.slots)
        found = self.engine.decode([Request(clip.audio, clip.prompt) for clip in clips])
        return [hypothesis.tokens for hypothesis in found]

    def details(self) -> Details:
        counters = self.engine.counters
        parts = {
            name: getattr(counters, f"{name}_seconds") / max(counters.seconds, 1e-9)
            for name in ("feature", "encoder", "decoder")
        }
        return {
            "shares": {**parts, "other": max(0.0, 1.0 - sum(parts.values()))},
            "useful_rows": counters.useful_rows,
            "mean_rows": counters.mean_rows,
            "acceptance": counters.acceptance,
            "steps_per_token": counters.steps_per_token,
            "counters": asdict(counters),
        }


def load_clips(
    engine: Engine, audio: Path | None = None, language: str | None = None, most: int | None = None
) -> tuple[list[Clip], list[str]]:
    """Return clips for ``engine``, longest first, and the reasons why others were left out.

    audio: a manifest or a folder; None: modulated noise. language: of clips that name none. most: number of clips to
    take, evenly spaced over all. Raises ConfigError where no clip can be used.
    """
    model, tokenizer = engine.model, engine.model.tokenizer
    assert tokenizer is not None
    rate = model.sample_rate
    language = language or next(iter(tokenizer.languages), None)
    if audio is None:
        prompt = tuple(tokenizer.prompt(Utterance("noise", 1.0, "", lang=language)))
        return [Clip(samples, len(samples) / rate, prompt) for samples in _noise(most or NOISE_CLIPS, rate)], []
    items = read_items([audio], defaults=Defaults(language))
    if most and most < len(items):
        items = [items[place] for place in np.linspace(0, len(items) - 1, most).astype(int)]
    clips: list[Clip] = []
    left_out = [item.problem for item in items if item.problem]
    for utterance in (item.utterance for item in items if item.utterance):
        try:
            samples = load_utterance(utterance, rate)
            seconds = len(samples) / rate
            if seconds > (longest := model.longest_seconds):
                raise ConfigError(f"{utterance.audio_filepath} is {seconds:.1f} s long; at most {longest:g} s fit")
            clips.append(Clip(samples, seconds, tuple(tokenizer.prompt(utterance))))
        except CanterError as error:
            left_out.append(str(error))
    if "cached_decoding" not in model.supports:  # another library may fail on audio that is sound
        found = engine.decode([Request(clip.audio, clip.prompt) for clip in clips])
        left_out += [hypothesis.error for hypothesis in found if hypothesis.error]
        clips = [clip for clip, hypothesis in zip(clips, found) if not hypothesis.error]
    if not clips:
        raise ConfigError(f"{audio}: no clip can be used: {left_out[0]}")
    return sorted(clips, key=lambda clip: -clip.seconds), left_out


def _noise(count: int, rate: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    clips = []
    for seconds in random.uniform(*NOISE_SECONDS, count):
        rise = np.sin(np.arange(round(seconds * rate)) / random.uniform(300, 3000)) + 1.1
        clips.append((0.1 * rise * random.normal(size=len(rise))).astype(np.float32))
    return clips


def measure_speed(
    systems: Mapping[str, System], clips: Sequence[Clip], *, repeats: int = 3, latency_clips: int = 20
) -> dict[str, Speed]:
    """Measure every system on ``clips`` in one queue, and its latency on single clips, evenly spaced over all.

    Every system is first warmed up on the complete queue and on one clip. Runs are interleaved, so that a slow moment
    of the machine affects all systems alike. Raises ValueError without clips.
    """
    if not clips or repeats < 1:
        raise ValueError(f"{len(clips)} clips and {repeats} repeats: there must be at least one of both")
    spread = np.unique(np.linspace(0, len(clips) - 1, min(latency_clips, len(clips))).astype(int))
    single = [clips[place] for place in spread]
    found: dict[str, list[list[int]]] = {}
    for name, system in systems.items():
        found[name] = system(clips)
        system(single[:1])
    runs: dict[str, list[tuple[float, Details]]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, system in systems.items():
            seconds = _seconds(system, clips)
            runs[name].append((seconds, system.details()))
    latencies: dict[str, list[float]] = {name: [] for name in systems}
    for clip in single:
        for name, system in systems.items():
            latencies[name].append(_seconds(system, [clip]))
    audio = sum(clip.seconds for clip in clips)
    return {
        name: Speed(
            seconds=tuple(seconds for seconds, _ in timed),
            rtfx=rtfx(audio, median(seconds for seconds, _ in timed)),
            latency_seconds={f"p{percent}": float(np.percentile(latencies[name], percent)) for percent in PERCENTILES},
            same_transcripts=sum(map(list.__eq__, found[name], _reference(found, name))) / len(clips),
            tokens=sum(map(len, found[name])),
            details=sorted(timed, key=lambda run: run[0])[(len(timed) - 1) // 2][1],
        )
        for name, timed in runs.items()
    }


def _reference(found: Mapping[str, list[list[int]]], name: str) -> list[list[int]]:
    """Return the transcripts of the first system whose name has the same beam size after a comma, or none too."""
    return next(tokens for other, tokens in found.items() if other.partition(", ")[2] == name.partition(", ")[2])


def _seconds(system: System, clips: Sequence[Clip]) -> float:
    begun = time.perf_counter()
    system(clips)
    return time.perf_counter() - begun
