"""Measuring a training step of a given shape: peak memory and time, under a cap.

B: utterances, T: encoder frames, U: tokens, prompt and end token included.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from canter.errors import BudgetError
from canter.models.norm import merge_pending
from canter.runtime import OutOfMemory, is_out_of_memory, peak_of, release_memory, tensor_bytes

Step = Callable[[int, int, int], None]
"""Runs one whole training step (forward, loss, backward, update) on a synthetic batch of B utterances, T encoder
frames and U tokens each."""

FORMAT = "canter-probes/1"
GUARDED = 0.7  # of what is free: a probe expected above it, or about which nothing is known, runs under a cap


@dataclass(frozen=True)
class ProbedStep:
    """A step with what it keeps from one to the next."""

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    run: Step
    compiled: bool = False
    """Whether the first step of a shape may compile, which is no part of what later ones take."""

    def __call__(self, batch: int, frames: int, tokens: int) -> None:
        self.run(batch, frames, tokens)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def state_bytes(self) -> int:
        """Weights, buffers and optimiser state; gradients come and go and are part of a step's peak."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return tensor_bytes(tensors)

    @property
    def gradient_bytes(self) -> int:
        return tensor_bytes(p for p in self.model.parameters() if p.requires_grad)

    def clear(self) -> None:
        """Drops what a step that broke off has left."""
        self.model.zero_grad(set_to_none=True)
        merge_pending(self.model)


class BatchShape(NamedTuple):
    """Of a padded batch: B utterances of T frames and U tokens."""

    batch: int
    frames: int
    tokens: int


@dataclass(frozen=True)
class Probe:
    """What one step of shape (B, T, U) took."""

    batch: int
    frames: int
    tokens: int
    bytes: float
    """Peak, weights and optimiser state included; of a step that did not fit, what it had asked for by then."""
    seconds: float
    """Not a number where the step ran under a cap, which slows it down, or did not fit."""
    fits: bool = True

    @property
    def shape(self) -> BatchShape:
        return BatchShape(self.batch, self.frames, self.tokens)


@dataclass
class Prober:
    """Runs steps, each shape once, and keeps count.

    ``limit_bytes`` is what a step may take, weights and optimiser state included. ``journal``, a JSON-lines file,
    keeps every probe as it is made; probes in it that were made on the same thing (``measured_on``) are not made again.
    """

    step: ProbedStep
    limit_bytes: float
    measured_on: Mapping[str, Any] = field(default_factory=dict)
    journal: Path | None = None
    told: Callable[[Probe], None] = lambda _: None
    clock: Callable[[], float] = time.perf_counter
    """Tells the time of steps; `time.process_time` leaves out what other processes of a shared CPU take."""
    steps: int = 0
    """Training steps run."""
    known: dict[BatchShape, Probe] = field(default_factory=dict)
    """Probes asked for, in that order."""
    kept: dict[BatchShape, Probe] = field(default_factory=dict)
    """Probes of an earlier run, to be asked for."""
    _warm: bool = False

    def __post_init__(self) -> None:
        if self.journal is not None:
            self._read()

    @property
    def probes(self) -> list[Probe]:
        """In the order made."""
        return list(self.known.values())

    @property
    def out_of_memory(self) -> int:
        """Probes that did not fit."""
        return sum(not probe.fits for probe in self.known.values())

    @property
    def spent(self) -> int:
        """Of the steps that a caller allows: all of them, warming up and repeating included. On a GPU, where every
        shape runs once more to be timed, the shapes."""
        shapes = len(self.known)
        return shapes if self.step.device.type == "cuda" else max(shapes, self.steps)

    @property
    def fitting(self) -> list[Probe]:
        return [probe for probe in self.known.values() if probe.fits]

    def warm_up(self, batch: int, frames: int, tokens: int) -> None:
        """A step that is not measured: the first one pays for optimiser state, kernels and threads.

        Raises BudgetError where it does not fit.
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
                f"weights and optimiser state alone take {gib(self.step.state_bytes)} of "
                f"{gib(self.limit_bytes)}; raise the limit, or use a smaller model"
            )

    def __call__(self, batch: int, frames: int, tokens: int, expected: float | None = None) -> Probe:
        """Measures a step of this shape, or returns what is known of it. ``expected`` bytes well under the limit
        let it run without a cap, which is needed for its time to mean anything on a CPU."""
        shape = BatchShape(batch, frames, tokens)
        if shape not in self.known:
            if shape in self.kept:
                self.known[shape] = self.kept[shape]
            else:
                self.warm_up(1, frames, tokens)
                self.known[shape] = self._measure(shape, expected)
                self._write(self.known[shape])
            self.told(self.known[shape])
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
                seconds = math.nan  # the cap slowed it down: again without, where it took less than expected
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
        """Seconds of one step. OutOfMemory where it did not fit."""
        device, self.steps = self.step.device, self.steps + 1
        start = self.clock()
        failed = 0
        with _capped(device, self.step, cap):
            try:
                self.step(*shape)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed = error.wanted if isinstance(error, OutOfMemory) else int(self.limit_bytes)
        seconds = self.clock() - start
        if failed:  # outside the handler: the traceback holds the step's tensors
            self.step.clear()
            release_memory()
            raise OutOfMemory(failed)
        return seconds

    def _read(self) -> None:
        assert self.journal is not None
        for measured_on, probe in read_probes(self.journal) if self.journal.exists() else ():
            fits = probe.bytes <= self.limit_bytes
            if measured_on == dict(self.measured_on) and (probe.fits or not fits):
                self.kept[probe.shape] = replace(probe, fits=fits)  # what broke a lower limit may fit this one

    def _write(self, probe: Probe) -> None:
        if self.journal is None:
            return
        value = asdict(probe) | {"seconds": None if math.isnan(probe.seconds) else probe.seconds}
        line = json.dumps({"format": FORMAT, "measured_on": dict(self.measured_on), **value})
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_probes(journal: Path) -> list[tuple[dict[str, Any], Probe]]:
    """(what it was measured on, probe) of each line of a journal. Raises BudgetError naming a line that is no probe."""
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


@contextlib.contextmanager
def _capped(device: torch.device, step: ProbedStep, cap: float | None):
    """On CUDA the allocator refuses more than ``cap`` bytes above what is in use; elsewhere nothing is done here."""
    if device.type != "cuda" or cap is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap + torch.cuda.memory_reserved(device)) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB"
