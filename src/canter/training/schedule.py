"""The steps of a run: how large its batches are, the plan that they follow, and the number of steps.

Batches fill the memory budget, unless the run would have too few updates or, on a CPU, larger ones are hardly faster.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Never

import numpy as np

from canter.corpus.index import LengthIndex
from canter.corpus.mixture import is_weighted, mixture_of
from canter.errors import BudgetError, CheckpointError, ConfigError
from canter.events import QUIET, Events
from canter.planning.bins import describe_limits, resolve_limits
from canter.planning.budget import Budget, Polynomial
from canter.planning.lengths import Index, ModelLimits
from canter.planning.metrics import BatchTable, figures
from canter.planning.plan import FIRST_VERSION, VERSION, Plan
from canter.planning.strategies import Strategy, strategy
from canter.planning.strategies.balanced import even_accumulation
from canter.training.config import TrainConfig
from canter.training.defaults import EPOCH_STEPS, RUN_STEPS, min_epoch_steps
from canter.training.feed.speed import AtSpeed
from canter.training.run.folder import Record, RunFolder, is_first_version
from canter.training.run.reports import writing
from canter.training.subject import Subject

MADE_BY = "made_by"  # key in measured_on: a run measured the budget for itself
PROBES = 16  # steps that a run measures for its budget; 'canter tune' measures more
CPU_PROBE_SECONDS = 6.0  # longest step that is measured on a CPU
PROBED = 1.5  # largest batch that is measured, as a multiple of the wanted batches
MIN_STEP_SECONDS = 4.0  # audio of an optimiser step; steps are not made smaller, not even for more updates
FIXED_FRACTION = 0.2  # of a step's time on a CPU that its fixed part takes at the largest batch (docs/training.md)
CPU_SECONDS = 24.0, 120.0  # bounds of that limit, in padded audio of a micro-batch
SEEN_WINDOWS = 4  # windows of an endless plan that the mean step time is taken from
UNTIMED_STEPS = 10  # first steps, which wait for workers to start
RETIMED = (*(percent / 100 for percent in range(35, 100, 5)), 0.975)  # fractions of a run at which steps are estimated


# -- the memory budget --


def find_budget(
    config: TrainConfig,
    folder: Path,
    subject: Subject,
    index: LengthIndex,
    micro_batches: int,
    events: Events[Never] = QUIET,
) -> Budget:
    """Return the budget in ``folder``, which --budget or a measurement makes if it is not there yet.

    index: lengths of the training data. Raises BudgetError for a budget of another model or device.
    """
    from canter.training.measure import DECIDING, measured_on

    path = folder / "budget.json"
    if path.exists():
        return Budget.load(path)
    here = measured_on(config, subject.model, subject.precision, subject.teacher)
    if config.budget is not None:
        budget = Budget.load(config.budget)
        try:
            budget.require(**{name: here[name] for name in DECIDING})
        except BudgetError as error:
            raise BudgetError(f"{config.budget}: {error}") from None
    else:
        budget = _measure(config, folder, subject, index, micro_batches, events)
        events.message(
            f"budget measured here and kept in {path}: another run of this command measures its own, and may make "
            f"other batches and steps; '--budget {path}' gives it the same"
        )
    with writing(path):
        budget.save(path)
    return budget


def _measure(
    config: TrainConfig, folder: Path, subject: Subject, index: LengthIndex, micro_batches: int, events: Events[Never]
) -> Budget:
    from canter.training.measure import make_prober, planned_frame_seconds
    from canter.tuning.fit import fit_budget

    usable, on_cpu = subject.usable(index), subject.device.type == "cpu"
    bounds = probe_bounds(config, usable, planned_frame_seconds(subject.model), micro_batches, on_cpu)
    journal = folder / "budget.probes.jsonl"
    prober = make_prober(
        config, subject.model, subject.precision, teacher=subject.teacher, journal=journal, events=events
    )
    budget = fit_budget(prober, usable, most_probes=PROBES, most_frames=bounds[0], probe_seconds=bounds[1])
    return dataclasses.replace(budget, measured_on=dict(budget.measured_on) | {MADE_BY: "canter train"})


def probe_bounds(
    config: TrainConfig, index: LengthIndex, frame_seconds: float, micro_batches: int, on_cpu: bool
) -> tuple[int | None, float | None]:
    """Return (frames, seconds) that bound the steps measured for a budget; None leaves only the memory as a bound.

    The measurements must cover the batches that are used, but on a CPU a step that fills the memory takes minutes.
    """
    longest = math.ceil(float(np.max(index.seconds)) / frame_seconds)
    slow = CPU_PROBE_SECONDS if on_cpu else None
    if config.batch_seconds is None:
        return None, slow
    if config.batch_seconds != "auto":
        return max(int(config.batch_seconds / frame_seconds), longest), None
    frames = float(np.sum(np.ceil(np.asarray(index.seconds) / frame_seconds)))
    wanted = PROBED * frames / ((config.min_steps or EPOCH_STEPS) * micro_batches)
    if on_cpu:
        wanted = min(wanted, CPU_SECONDS[1] / frame_seconds)
    return max(int(wanted), int(CPU_SECONDS[0] / frame_seconds), longest), slow


# -- the size of batches --


@dataclass(frozen=True)
class BatchLimits:
    """Bounds on a run's batches besides the memory budget."""

    seconds: float | None = None
    """Maximum padded audio of a micro-batch."""
    min_steps: int = 1
    """Minimum optimiser steps per epoch, if there are enough utterances."""
    seconds_by: str = "--batch-seconds"
    """The option or rule that set ``seconds``."""
    steps_by: str = "--min-steps"
    """The option or rule that set ``min_steps``."""


def choose_limits(
    config: TrainConfig, index: LengthIndex, budget: Budget, ranks: int, micro_batches: int, on_cpu: bool
) -> BatchLimits:
    """Return the bounds that --batch-seconds and --min-steps stand for.

    The rule of 'auto':

    - An epoch has at least 50 optimiser steps, and the run at least 1000 from scratch or 200 with --init; but a step
      has at least 4 s of audio.
    - On a CPU, unless 'canter tune' measured the budget, a micro-batch is no longer than it takes for the fixed part
      of its step to be a fifth of the time: larger ones gain little speed and cost updates.
    """
    if config.batch_seconds != "auto":
        return BatchLimits(config.batch_seconds, config.min_steps or 1)
    by_a_run = config.budget is None or MADE_BY in budget.measured_on
    seconds = cpu_seconds(index, budget) if on_cpu and by_a_run else None
    if config.min_steps is not None:
        return BatchLimits(seconds, config.min_steps, "the CPU")
    wanted, by = min_epoch_steps(config), "an epoch"
    if config.minutes is not None and config.steps is None:
        timed = _steps_for_minutes(config, index, budget, ranks, micro_batches)
        wanted, by = max((wanted, by), (timed, "--minutes"))
    elif wanted > EPOCH_STEPS:
        by = "--epochs"
    limit = max(1, int(float(np.sum(index.seconds)) / MIN_STEP_SECONDS))
    return BatchLimits(seconds, min(wanted, limit), "the CPU", by if wanted <= limit else "the audio")


def _steps_for_minutes(config: TrainConfig, index: LengthIndex, budget: Budget, ranks: int, micro_batches: int) -> int:
    """Return the steps per epoch that a run of --minutes needs to reach its minimum number of updates.

    If it cannot reach that, they are as many as there are utterances.
    """
    frames, tokens = budget.frames(np.asarray(index.seconds)), np.asarray(index.tokens, np.int64)
    work = float(np.sum(budget.utterance_seconds(frames, tokens))) / ranks
    fixed = budget.fixed_seconds * math.ceil(micro_batches / ranks)
    run = RUN_STEPS["scratch" if config.init is None else "init"]
    spare = (config.minutes or 0) * 60 - run * fixed
    return min(math.ceil(run * work / spare), len(index)) if spare > 0 else len(index)


def cpu_seconds(index: LengthIndex, budget: Budget) -> float:
    """Return the padded audio at which a step's fixed part is ``FIXED_FRACTION`` of its time."""
    frames, tokens = budget.frames(np.asarray(index.seconds)), np.asarray(index.tokens, np.int64)
    a_second = float(np.sum(budget.utterance_seconds(frames, tokens))) / (float(np.sum(frames)) * budget.frame_seconds)
    seconds = (1 / FIXED_FRACTION - 1) * budget.fixed_seconds / max(a_second, 1e-12)
    return min(max(seconds, CPU_SECONDS[0]), CPU_SECONDS[1])


@dataclass(frozen=True)
class BatchSizes:
    """Size of a plan's batches and the reason why they are not larger, as kept in run.json."""

    utterances: float
    """Mean number of utterances in a micro-batch."""
    seconds: float
    """Padded audio of the longest micro-batch."""
    memory_filled: float
    """Mean fraction of the memory budget above weights and optimiser state."""
    steps: int
    """Optimiser steps per epoch."""
    limited_by: str

    @classmethod
    def of(
        cls, table: BatchTable, steps: int, memory: Budget, plan: Budget, limits: BatchLimits, enough: bool
    ) -> "BatchSizes":
        """Return the sizes of the micro-batches in ``table``.

        memory: the memory budget. plan: the budget of the plan. enough: an epoch has at least ``limits.min_steps`` even
        without that bound.
        """
        if not len(table.size):
            return cls(0.0, 0.0, 0.0, 0, "nothing: no utterance can be used")
        used = table.bytes(memory) - memory.fixed_bytes
        return cls(
            utterances=float(np.mean(table.size)),
            seconds=float(np.max(table.padded_frames)) * memory.frame_seconds,
            memory_filled=float(np.mean(used)) / (memory.limit_bytes - memory.fixed_bytes),
            steps=steps,
            limited_by=batch_limit(limits, steps, enough, _limits_seconds(limits, memory, plan), table.size.max() == 1),
        )

    def __str__(self) -> str:
        return (
            f"batches: {self.utterances:.1f} utterances on average, at most {self.seconds:.0f} s of audio; they fill "
            f"{self.memory_filled:.1%} of the memory budget; {self.steps:,} updates an epoch (limited by "
            f"{self.limited_by})"
        )


def _limits_seconds(limits: BatchLimits, memory: Budget, plan: Budget) -> bool:
    """Return whether a micro-batch reaches ``limits.seconds`` before it fills the memory."""
    return limits.seconds is not None and plan.limit_bytes >= int(limits.seconds / memory.frame_seconds + 1e-6)


def batch_limit(limits: BatchLimits, steps: int, enough: bool, by_seconds: bool, single: bool) -> str:
    """Return what keeps batches from being larger, and which option changes it.

    enough: the number of steps does not limit them. by_seconds: the limit in seconds is reached before the memory is
    full. single: no batch has more than one utterance.
    """
    if enough and not by_seconds:
        return "memory; --budget or --batch-seconds changes it"
    if enough and limits.seconds_by == "the CPU":
        return "the CPU, on which larger batches are hardly faster; --batch-seconds changes it"
    if enough:
        return f"--batch-seconds {limits.seconds:g}"
    if steps < limits.min_steps and single:
        return f"the number of utterances: batches of one make fewer than {limits.min_steps} updates"
    if limits.steps_by == "the audio":
        return f"the size of the data: a step has at least {MIN_STEP_SECONDS:g} s of audio; --min-steps changes it"
    if limits.steps_by == "--min-steps":
        return f"--min-steps {limits.min_steps}"
    also = {"an epoch": "", "--epochs": " and --epochs", "--minutes": " and --minutes"}[limits.steps_by]
    return f"the size of the data{also}: an epoch has at least {limits.min_steps} updates; --min-steps changes it"


def limited(budget: Budget, batch_seconds: float | None, index: Index, slowest: float = 1.0) -> Budget:
    """Return ``budget`` with micro-batches limited to ``batch_seconds`` of padded audio, if the memory holds that.

    The longest utterance, also at its ``slowest`` speed, always fits as a batch of one. None changes nothing. The limit
    counts frames instead of bytes, so that the quadratic part does not shrink batches of long utterances.
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


# -- the plan and its steps --


@dataclass(frozen=True)
class TrainingSchedule:
    """Steps of a run: the plan of its micro-batches, their number and their predicted time."""

    plan: Plan
    steps: int
    step_seconds: float
    """Mean predicted seconds of a step."""
    budget: Budget
    """Memory budget; the plan's own may be narrower."""
    decisions: Record
    """Decisions that a resumed run keeps, for run.json."""


def choose_schedule(
    config: TrainConfig,
    run: RunFolder,
    subject: Subject,
    index: LengthIndex,
    budget: Budget,
    micro_batches: int,
    ranks: int,
    events: Events[Never] = QUIET,
) -> TrainingSchedule:
    """Return the steps of a run: the decisions in its run.json, and otherwise what ``config`` and ``budget`` make.

    index: lengths of the training data. Raises ConfigError or PlanError for settings that do not fit each other.
    """
    record, speeds, usable = run.recorded(), config.augment.speed, subject.usable(index)
    mixture = mixture_of(config.manifest)
    weighted = mixture is not None and is_weighted(mixture)
    if weighted and speeds:
        raise ConfigError(
            f"--augment.speed: a speed is drawn for each epoch, but {config.manifest[0]}, whose sources have weights, "
            "has no epochs; leave one of them out"
        )
    if "batch_limits" in record:
        try:
            limits = BatchLimits(**record["batch_limits"])
        except TypeError as error:
            raise CheckpointError(f"{run.folder}/run.json: batch_limits is damaged ({error})") from None
    else:
        limits = choose_limits(config, usable, budget, ranks, micro_batches, subject.device.type == "cpu")
    slowest = min(speeds, default=1.0)
    bounded = record.get("model_limits", not record)  # runs that began without these limits resume without
    bounds = subject.limits if bounded and subject.limits.exceeded(index, slowest) else ModelLimits()
    accumulation = record.get("accumulation", 1 if record else even_accumulation(micro_batches, ranks))
    rates = resolve_limits(config.max_tokens_per_second, index, budget)  # at the original speed
    if config.max_tokens_per_second == "auto":
        events.message(f"--max-tokens-per-second auto: {describe_limits(rates)}")
    planned = AtSpeed(index, config.seed, 0, speeds) if speeds else index
    plan = Plan(
        planned,
        budget,
        strategy_of(config, accumulation),
        longest_seconds=bounds.seconds,
        most_tokens=bounds.tokens,
        seed=config.seed,
        window=min(config.batching_window, len(index)),
        micro_batches_per_step=micro_batches,
        max_tokens_per_second=rates,
        endless=weighted,
        cache=run.folder / ".cache",
        version=FIRST_VERSION if is_first_version(record) else VERSION,
    )
    known = planned if bounds == ModelLimits() else usable
    plan, sizes, step_seconds = plan_batches(plan, limits, known, ranks, slowest)
    events.message(str(sizes))
    steps = record.get("steps") or choose_steps(config, step_seconds, sizes.steps)
    decisions = {
        "steps": steps,
        "micro_batches_per_step": micro_batches,
        "batch_limits": dataclasses.asdict(limits),
        "batches": dataclasses.asdict(sizes),
        "model_limits": bounded,
        "accumulation": accumulation,
    }
    return TrainingSchedule(plan, steps, step_seconds, budget, decisions)


def strategy_of(config: TrainConfig, accumulation: int = 1) -> Strategy:
    """Return the batching strategy with its options. Raise PlanError for an unknown one.

    accumulation: micro-batches of a step that each rank takes at the run's first start.
    """
    options = {"mixing": config.mixing, "mix_steps": config.mix_steps or None}
    if config.mix_steps and config.strategy == "balanced":
        options["accumulation"] = accumulation
    return strategy(config.strategy, **{name: value for name, value in options.items() if value is not None})


def plan_batches(
    plan: Plan, limits: BatchLimits, usable: Index, ranks: int, slowest: float = 1.0
) -> tuple[Plan, BatchSizes, float]:
    """Return ``plan`` within the limits, its batch sizes and the mean predicted seconds of a step.

    plan: plan whose only bound is the memory budget. usable: the utterances that bound the batches' seconds.
    """
    memory = plan.budgets[0][1]
    narrowed = limited(memory, limits.seconds, usable, slowest)
    plan = dataclasses.replace(plan, budget=narrowed, min_steps=1)
    table, seconds, steps = predicted(plan, ranks)
    enough = steps >= limits.min_steps
    if not enough:
        plan = dataclasses.replace(plan, min_steps=limits.min_steps)
        table, seconds, steps = predicted(plan, ranks)
    return plan, BatchSizes.of(table, steps, memory, narrowed, limits, enough), seconds


def predicted(plan: Plan, ranks: int) -> tuple[BatchTable, float, int]:
    """Return (micro-batches, mean predicted seconds of a step on ``ranks`` ranks, steps per epoch).

    An epoch of weighted sources counts as many utterances as there are.
    """
    table = plan.table(SEEN_WINDOWS if plan.endless else None)
    found = figures(table, plan.budgets[0][1], ranks)
    steps = found.steps
    if plan.endless:
        steps = round(steps * len(plan.index) / max(1, found.utterances))
    return table, found.hours * 3600 / max(1, found.steps), steps


def choose_steps(config: TrainConfig, step_seconds: float, epoch_steps: int) -> int:
    """Return the number of steps, from --steps, --minutes or --epochs, in this order."""
    if config.steps is not None:
        return config.steps
    if config.minutes is not None:
        return max(1, round(config.minutes * 60 / step_seconds))
    return max(1, round(config.epochs * epoch_steps))


class Pace:
    """Estimator of the number of steps of a run of --minutes: early on, after the CTC-only warm-up, and then often.

    With data decoding and other work on the machine, a step takes longer than a probe, and the machine may become
    slower or faster at any time.
    """

    def __init__(self, config: TrainConfig, step_seconds: float, estimates: int = 0):
        """Start with the mean predicted seconds of a step, and the number of estimates made so far."""
        self.config, self.step_seconds, self.estimates = config, step_seconds, estimates
        self.timed: list[tuple[float, float]] = []  # (predicted, measured) seconds of each step
        self.at: int | None = None
        """Step after which to estimate next; None if the number of steps is fixed."""

    def plan(self, step: int, steps: int) -> None:
        """Choose when to estimate next, at ``step`` of a run of ``steps`` steps."""
        fractions = sorted({0.02, (self.config.loss.ctc_warmup or 0.0) + 0.08, *RETIMED})
        if self.config.minutes is None or self.config.steps is not None or self.estimates >= len(fractions):
            self.at = None
        else:
            self.at = max(step + 2 * UNTIMED_STEPS, round(fractions[self.estimates] * steps))

    def took(self, predicted: float, seconds: float) -> None:
        """Note the predicted and measured seconds of a step."""
        if self.at is not None:
            self.timed.append((predicted, seconds))

    def steps(self, step: int, steps: int, seconds: float) -> int:
        """Return the number of steps that fits the minutes, given that ``step`` steps took ``seconds``."""
        recent = self.timed[UNTIMED_STEPS:][-max(UNTIMED_STEPS, steps // 20) :]
        predicted, measured = map(sum, zip(*recent, strict=True))
        remaining = (self.config.minutes or 0) * 60 - seconds
        mean = self.step_seconds * measured / max(predicted, 1e-9)
        self.estimates += 1
        return step + max(1, round(remaining / mean))
