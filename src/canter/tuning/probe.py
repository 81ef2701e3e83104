"""Measurement of training steps of given batch shapes: peak memory and time, under a cap.

B: utterances, T: encoder frames, U: tokens, prompt and end token included.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Never

import torch
from torch import Tensor, nn

from canter.errors import BudgetError
from canter.events import QUIET, Events
from canter.runtime import OutOfMemory, capped_allocator, gib, is_out_of_memory, peak_of, release_memory, tensor_bytes

FORMAT = "canter-probes/1"
GUARDED = 0.7  # fraction of the free memory above which a probe, or one of unknown size, runs under a cap


class BatchShape(NamedTuple):
    """Shape of a padded batch: B utterances of T frames and U tokens."""

    batch: int
    frames: int
    tokens: int


class ProbedStep(ABC):
    """A training step (forward, loss, backward, update) on synthetic batches of any shape."""

    model: nn.Module
    frame_seconds: float
    """Seconds of T."""
    compiled: bool = False
    """The first step of a shape may compile, which later ones do not."""

    @abstractmethod
    def __call__(self, batch: int, frames: int, tokens: int) -> None:
        """Run one step on B utterances of T encoder frames and U tokens each."""

    def tensors(self) -> Iterable[Tensor]:
        """Return the tensors that are kept between steps; gradients are part of a step's peak."""
        return [*self.model.parameters(), *self.model.buffers()]

    def discard(self) -> None:
        """Drop what a failed step has left behind."""
        self.model.zero_grad(set_to_none=True)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def state_bytes(self) -> int:
        """Bytes of the tensors that are kept between steps."""
        return tensor_bytes(self.tensors())

    @property
    def gradient_bytes(self) -> int:
        return tensor_bytes(p for p in self.model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Probe:
    """Measured memory and time of one step of shape (B, T, U)."""

    batch: int
    frames: int
    tokens: int
    bytes: float
    """Peak, weights and optimiser state included; of a step that did not fit, what it had asked for by then."""
    seconds: float
    """NaN if the step ran under a cap, which slows it down, or did not fit."""
    fits: bool = True

    @property
    def shape(self) -> BatchShape:
        return BatchShape(self.batch, self.frames, self.tokens)


@dataclass
class Prober:
    """Runner of training steps that measures each shape once.

    ``limit_bytes`` is the memory that a step may use, weights and optimiser state included. ``journal``, a JSON-lines
    file, receives every probe as soon as it is made; probes in it that were made under the same conditions
    (``measured_on``) are not repeated.
    """

    step: ProbedStep
    limit_bytes: float
    measured_on: Mapping[str, object] = field(default_factory=dict)
    journal: Path | None = None
    events: Events[Never] = QUIET
    clock: Callable[[], float] = time.perf_counter
    """Clock of the steps; `time.process_time` ignores other processes on a shared CPU."""
    steps: int = 0
    """Number of training steps run."""
    known: dict[BatchShape, Probe] = field(default_factory=dict)
    """Probes asked for, in that order."""
    kept: dict[BatchShape, Probe] = field(default_factory=dict)
    """Probes of an earlier run, from the journal."""
    _warm: bool = False

    def __post_init__(self) -> None:
        if self.journal is not None and self.journal.exists():
            for measured_on, probe in read_probes(self.journal):
                fits = probe.bytes <= self.limit_bytes
                if measured_on == dict(self.measured_on) and (probe.fits or not fits):
                    self.kept[probe.shape] = replace(probe, fits=fits)  # a failure at a lower limit may fit this one

    @property
    def probes(self) -> list[Probe]:
        return list(self.known.values())

    @property
    def fitting(self) -> list[Probe]:
        return [probe for probe in self.known.values() if probe.fits]

    @property
    def out_of_memory(self) -> int:
        """Number of probes that did not fit."""
        return len(self.known) - len(self.fitting)

    @property
    def spent(self) -> int:
        """Number of steps that count against a caller's maximum: all of them, warm-up and repetitions included.

        On a GPU, where every shape runs once more to be timed, the number of shapes.
        """
        shapes = len(self.known)
        return shapes if self.step.device.type == "cuda" else max(shapes, self.steps)

    def warm_up(self, batch: int, frames: int, tokens: int) -> None:
        """Run a step that is not measured: the first one allocates optimiser state and loads kernels.

        Raises BudgetError if it does not fit.
        """
        if self._warm:
            return
        self._warm = True
        try:
            self._peak(BatchShape(batch, frames, tokens), self.limit_bytes)
        except OutOfMemory as error:
            raise BudgetError(
                f"not even one utterance of {frames} frames and {tokens} tokens fits: it asked for "
                f"{gib(error.wanted)} of {gib(self.limit_bytes)}; raise the limit, or use a smaller model, a smaller "
                "optimiser, or activation checkpointing"
            ) from None
        if self.step.state_bytes >= self.limit_bytes:
            raise BudgetError(
                f"weights and optimiser state take {gib(self.step.state_bytes)} of {gib(self.limit_bytes)}, which "
                "leaves nothing for a batch; raise the limit, or use a smaller model"
            )

    def __call__(self, batch: int, frames: int, tokens: int, expected: float | None = None) -> Probe:
        """Measure a step of this shape, or return its earlier probe.

        ``expected`` bytes well under the limit let it run without a cap, which slows a step down on a CPU.
        """
        shape = BatchShape(batch, frames, tokens)
        if shape not in self.known:
            if shape in self.kept:
                self.known[shape] = self.kept[shape]
            else:
                self.warm_up(1, frames, tokens)
                self.known[shape] = self._measure(shape, expected)
                self._write(self.known[shape])
        return self.known[shape]

    def _measure(self, shape: BatchShape, expected: float | None) -> Probe:
        state, device = self.step.state_bytes, self.step.device
        free = self.limit_bytes - state
        guarded = device.type == "cuda" or expected is None or expected - state > GUARDED * free
        try:
            if self.step.compiled:
                self._peak(shape, free if guarded else None)
            peak, seconds = self._peak(shape, free if guarded else None)
            if guarded and device.type != "cuda":
                seconds = math.nan  # the cap slowed it down; run again without one if it took less than expected
                if expected is not None and peak <= GUARDED * free:
                    peak, seconds = self._peak(shape, None)
        except OutOfMemory as error:
            return Probe(*shape, max(state + error.wanted, self.limit_bytes), math.nan, False)
        if device.type == "cuda":  # the first step of a shape finds its kernels and asks the driver for memory
            seconds = self._run(shape)
        return Probe(*shape, state + peak, seconds, peak <= free)

    def _peak(self, shape: BatchShape, cap: float | None) -> tuple[int, float]:
        seconds = math.nan

        def run() -> None:
            nonlocal seconds
            seconds = self._run(shape, cap)

        return peak_of(run, self.step.device, cap), seconds

    def _run(self, shape: BatchShape, cap: float | None = None) -> float:
        """Return the seconds of one step. Raises OutOfMemory if it did not fit."""
        device, self.steps = self.step.device, self.steps + 1
        start = self.clock()
        failed = 0
        with capped_allocator(device, cap):
            try:
                self.step(*shape)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed = error.wanted if isinstance(error, OutOfMemory) else int(self.limit_bytes)
        seconds = self.clock() - start
        if failed:  # outside of the handler: the traceback holds the step's tensors
            self.step.discard()
            release_memory()
            raise OutOfMemory(failed)
        return seconds

    def _write(self, probe: Probe) -> None:
        if self.journal is None:
            return
        value = asdict(probe) | {"seconds": None if math.isnan(probe.seconds) else probe.seconds}
        line = json.dumps({"format": FORMAT, "measured_on": dict(self.measured_on), **value})
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_probes(journal: Path) -> list[tuple[dict[str, object], Probe]]:
    """Return (conditions of the measurement, probe) of each line of a journal.

    Raises BudgetError that names a line which is not a probe.
    """
    found = []
    for number, line in enumerate(journal.read_text(encoding="utf-8").splitlines(), 1):
        try:
            value = json.loads(line)
            if value.pop("format") != FORMAT:
                continue
            measured_on = value.pop("measured_on")
            value["seconds"] = math.nan if value["seconds"] is None else value["seconds"]
            found.append((measured_on, Probe(**value)))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise BudgetError(f"{journal}:{number}: not a probe; remove the line, or the file") from None
    return found
