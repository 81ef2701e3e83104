"""Choose how large the batches of a run are: they fill the memory budget, unless the run would have too few updates or,
on a CPU, larger batches are no faster."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from canter.corpus.index import LengthIndex
from canter.planning.budget import Budget, Polynomial
from canter.planning.metrics import BatchTable
from canter.training.config import TrainConfig
from canter.training.defaults import EPOCH_STEPS, RUN_STEPS, least_steps

MADE_BY = "made_by"  # in measured_on: the budget is one that a run measured for itself
LEAST_SECONDS = 4.0  # of audio in an optimiser step: not even for more updates are steps smaller
FIXED_SHARE = 0.05  # of a step on a CPU: where its fixed part takes less, larger batches are no faster
CPU_SECONDS = 24.0, 120.0  # of padded audio in a micro-batch, between which that bound lies
CPU_PROBE_SECONDS = 6.0  # of a step that is measured on a CPU
PROBED = 1.5  # times the seconds of the batches that are wanted, the largest that is measured


@dataclass(frozen=True)
class BatchLimits:
    """Bounds on a run's batches beside the memory budget."""

    seconds: float | None = None
    """Maximum padded audio of a micro-batch."""
    min_steps: int = 1
    """Minimum optimiser steps an epoch, where there are enough utterances."""
    seconds_by: str = "--batch-seconds"
    """The option or rule that set ``seconds``."""
    steps_by: str = "--min-steps"
    """The option or rule that set ``min_steps``."""


def choose_limits(
    config: TrainConfig, index: LengthIndex, budget: Budget, ranks: int, micro_batches: int, on_cpu: bool
) -> BatchLimits:
    """Return the bounds that --batch-seconds and --min-steps stand for. The rule of 'auto':

    - An epoch has at least 50 optimiser steps, and the run at least 1000 from scratch or 200 with --init; but a step
      has at least 4 s of audio.
    - On a CPU, without --budget or with one that another run measured, a micro-batch is no longer than it takes for the
      fixed part of its step to be 5 % of the time.
    """
    if config.batch_seconds != "auto":
        return BatchLimits(config.batch_seconds, config.min_steps or 1)
    by_a_run = config.budget is None or MADE_BY in budget.measured_on
    seconds = cpu_seconds(index, budget) if on_cpu and by_a_run else None
    if config.min_steps is not None:
        return BatchLimits(seconds, config.min_steps, "the CPU")
    wanted, by = least_steps(config), "an epoch"
    if config.minutes is not None and config.steps is None:
        timed = steps_in(config, index, budget, ranks, micro_batches)
        wanted, by = max((wanted, by), (timed, "--minutes"))
    elif wanted > EPOCH_STEPS:
        by = "--epochs"
    most = max(1, int(float(np.sum(index.seconds)) / LEAST_SECONDS))
    return BatchLimits(seconds, min(wanted, most), "the CPU", by if wanted <= most else "the audio")


def steps_in(config: TrainConfig, index: LengthIndex, budget: Budget, ranks: int, micro_batches: int) -> int:
    """Return the steps that an epoch must have for a run of --minutes to reach its number of updates; very many where
    it cannot."""
    frames, tokens = budget.frames(np.asarray(index.seconds)), np.asarray(index.tokens, np.int64)
    work = float(np.sum(budget.utterance_seconds(frames, tokens))) / ranks
    fixed = budget.fixed_seconds * math.ceil(micro_batches / ranks)
    run = RUN_STEPS["scratch" if config.init is None else "init"]
    spare = (config.minutes or 0) * 60 - run * fixed
    return min(math.ceil(run * work / spare), len(index)) if spare > 0 else len(index)


def cpu_seconds(index: LengthIndex, budget: Budget) -> float:
    """Return the padded audio at which a step's fixed part is ``FIXED_SHARE`` of its time."""
    frames, tokens = budget.frames(np.asarray(index.seconds)), np.asarray(index.tokens, np.int64)
    a_second = float(np.sum(budget.utterance_seconds(frames, tokens))) / (float(np.sum(frames)) * budget.frame_seconds)
    seconds = (1 / FIXED_SHARE - 1) * budget.fixed_seconds / max(a_second, 1e-12)
    return min(max(seconds, CPU_SECONDS[0]), CPU_SECONDS[1])


def probe_bounds(
    config: TrainConfig, index: LengthIndex, frame_seconds: float, micro_batches: int, on_cpu: bool
) -> tuple[int | None, float | None]:
    """Return (frames, seconds) that a step may have at most when the budget is measured; None is no bound but memory.

    What is measured must cover the batches that are used; on a CPU a step of all the memory would take minutes.
    """
    longest = math.ceil(float(np.max(index.seconds)) / frame_seconds)
    slow = CPU_PROBE_SECONDS if on_cpu else None
    if config.batch_seconds is None:
        return None, slow
    if config.batch_seconds != "auto":
        return max(int(config.batch_seconds / frame_seconds), longest), None
    frames = float(np.sum(np.ceil(np.asarray(index.seconds) / frame_seconds)))
    most = PROBED * frames / ((config.min_steps or EPOCH_STEPS) * micro_batches)
    if on_cpu:
        most = min(most, CPU_SECONDS[1] / frame_seconds)
    return max(int(most), int(CPU_SECONDS[0] / frame_seconds), longest), slow


@dataclass(frozen=True)
class BatchSizes:
    """Size of a plan's batches and the reason why they are not larger; kept in run.json."""

    utterances: float
    """Mean number of utterances in a micro-batch."""
    seconds: float
    """Padded audio of the longest micro-batch."""
    memory_filled: float
    """Mean fraction of the memory budget above weights and optimiser state."""
    steps: int
    """Optimiser steps an epoch."""
    limited_by: str

    @classmethod
    def of(
        cls, table: BatchTable, steps: int, memory: Budget, plan: Budget, limits: BatchLimits, enough: bool
    ) -> "BatchSizes":
        """Return the sizes of the micro-batches in ``table``.

        ``memory`` is the memory budget, ``plan`` the budget of the plan. ``enough``: an epoch has the wanted number of
        steps even without ``limits.min_steps``.
        """
        if not len(table.size):
            return cls(0.0, 0.0, 0.0, 0, "nothing: no utterance can be used")
        used = memory.bytes(table.size, table.frames, table.tokens) - memory.fixed_bytes
        return cls(
            utterances=float(np.mean(table.size)),
            seconds=float(np.max(table.size * table.frames)) * memory.frame_seconds,
            memory_filled=float(np.mean(used)) / (memory.limit_bytes - memory.fixed_bytes),
            steps=steps,
            limited_by=why(limits, steps, enough, _counts_seconds(limits, memory, plan), int(table.size.max()) == 1),
        )

    def __str__(self) -> str:
        return (
            f"batches: {self.utterances:.1f} utterances on average, at most {self.seconds:.0f} s of audio; they fill "
            f"{self.memory_filled:.1%} of the memory budget; {self.steps:,} updates an epoch (limited by "
            f"{self.limited_by})"
        )


def _counts_seconds(limits: BatchLimits, memory: Budget, plan: Budget) -> bool:
    """Return whether a micro-batch is full by ``limits.seconds`` before the memory is."""
    return limits.seconds is not None and plan.limit_bytes >= int(limits.seconds / memory.frame_seconds + 1e-6)


def why(limits: BatchLimits, steps: int, enough: bool, by_seconds: bool, single: bool) -> str:
    """Return what keeps batches from being larger, and which option changes it.

    ``enough``: they need not be smaller for the number of steps. ``by_seconds``: the cap in seconds is reached before
    the memory. ``single``: no batch has more than one utterance."""
    if enough and not by_seconds:
        return "memory; --budget or --batch-seconds changes it"
    if enough and limits.seconds_by == "the CPU":
        return "the CPU, on which larger ones are no faster; --batch-seconds changes it"
    if enough:
        return f"--batch-seconds {limits.seconds:g}"
    if steps < limits.min_steps and single:
        return f"the number of utterances: one each makes fewer than {limits.min_steps} updates"
    if limits.steps_by == "the audio":
        return f"the size of the data: a step keeps {LEAST_SECONDS:g} s of audio; --min-steps changes it"
    if limits.steps_by == "--min-steps":
        return f"--min-steps {limits.min_steps}"
    also = {"an epoch": "", "--epochs": " and --epochs", "--minutes": " and --minutes"}[limits.steps_by]
    return f"the size of the data{also}: an epoch has at least {limits.min_steps} updates; --min-steps changes it"


def limited(budget: Budget, batch_seconds: float | None, index: LengthIndex, slowest: float = 1.0) -> Budget:
    """Return ``budget`` with a micro-batch held to ``batch_seconds`` of audio, padding included, or to what the memory
    holds where that is less; the longest utterance, at its ``slowest`` speed too, may always go alone. Unchanged for
    None.

    Counting frames instead of bytes keeps batches of long utterances from being cut for their quadratic part.
    """
    if batch_seconds is None:
        return budget
    frames, tokens = budget.frames(np.asarray(index.seconds) / slowest), np.asarray(index.tokens, np.int64)
    fits = budget.max_batch(frames, tokens) >= 1
    if not fits.any():
        return budget
    most = float(np.max(budget.utterance_bytes(frames[fits], tokens[fits]) / frames[fits]))
    in_memory = (budget.limit_bytes - budget.fixed_bytes) / most
    limit = max(min(batch_seconds / budget.frame_seconds, in_memory), float(frames[fits].max()))
    return dataclasses.replace(budget, limit_bytes=float(int(limit + 1e-6)), fixed_bytes=0.0, memory=Polynomial(T=1.0))
