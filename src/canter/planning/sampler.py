"""The stepper, which takes a run through the steps of a plan, and batch samplers over it. Needs no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from canter.errors import PlanError
from canter.planning.budget import Budget
from canter.planning.lengths import Index, Lengths, exclusions
from canter.planning.plan import MicroBatch, Plan, Position

KEEP = 2  # plans of epochs that a stepper holds
TIGHTER = 0.9  # of the bytes above the fixed ones that an oversized micro-batch needed: the next limit
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class PlannedStep:
    """A step of a run, for all ranks."""

    plan: Plan
    number: int
    """Steps of the run before it."""
    position: Position
    after: Position
    """Position of the run once the step is taken."""
    rows: list[np.ndarray]
    """Rows of each micro-batch."""
    memory: Budget
    """Budget by which `filled` is computed."""

    @property
    def epoch(self) -> int:
        return self.position.epoch

    @property
    def window(self) -> int:
        return self.position.window

    @cached_property
    def seconds(self) -> np.ndarray:
        """Predicted seconds of each micro-batch, (M,)."""
        return self.plan.step_seconds(self.window, self.position.step)

    @cached_property
    def filled(self) -> float:
        """Predicted bytes of a micro-batch as a fraction of the memory limit, mean over the step."""
        return float(np.mean(self.plan.predicted_bytes(self.rows, self.memory) / self.memory.limit_bytes))

    def micro_batches(self, rank: int, ranks: int) -> list[MicroBatch]:
        """Return a rank's micro-batches of the step; empty for some where there are more ranks than micro-batches."""
        return self.plan.micro_batches_for(rank, ranks, self.position)


class Stepper:
    """The steps of a run for one rank: those of the plan's epoch, then of the next epochs.

    Steps are drawn ahead (``draw()``) and taken in order (``take()``). The state is the first step not taken, so steps
    that were only drawn come again on resuming. It is the same on every rank and holds for any number of ranks.

    memory: budget of the device's memory, where the plan's is smaller; only for the reported fraction filled.
    """

    def __init__(self, plan: Plan, rank: int = 0, ranks: int = 1, memory: Budget | None = None) -> None:
        if not 0 <= rank < ranks:
            raise PlanError(f"rank {rank} of {ranks}: ranks count from 0")
        self.plan, self.rank, self.ranks, self.memory = plan, rank, ranks, memory
        self.epoch, self.number = plan.epoch, 0
        self.start: Position | None = None
        """The next step; None for the first one of the epoch."""
        self.tightenings: list[list[float]] = []
        """[epoch, first window, limit in bytes] where a micro-batch that ran out of memory tightened the budget."""
        self._drawn: deque[PlannedStep] = deque()
        self._plans: dict[tuple[int, int], Plan] = {}

    def plan_of(self, epoch: int) -> Plan:
        """Return the plan of an epoch, with the tightened budgets."""
        key = (epoch, len(self.tightenings))
        if key not in self._plans:
            while len(self._plans) >= KEEP:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = self._tightened_plan(epoch)
        return self._plans[key]

    def _tightened_plan(self, epoch: int) -> Plan:
        plan = self.plan if epoch == self.plan.epoch else self.plan.at_epoch(epoch)
        if not self.tightenings:
            return plan
        windows = sorted({0} | {int(window) for e, window, _ in self.tightenings if e == epoch})
        budgets = []
        for window in windows:
            limits = [limit for e, first, limit in self.tightenings if (e, first) <= (epoch, window)]
            budgets.append((window, tightened(self.plan.budgets[0][1], self.plan.index, limits)))
        return replace(plan, budget=budgets)

    def tighten(self, step: PlannedStep, number: int) -> float:
        """Lower the memory limit from the next window on, by a micro-batch of the step that ran out of memory.

        Return the new limit in bytes.
        """
        budget = step.plan.budget_of(step.window)
        needed = min(float(step.plan.predicted_bytes([step.rows[number]], budget)[0]), budget.limit_bytes)
        limit = budget.fixed_bytes + TIGHTER * (needed - budget.fixed_bytes)
        self.tightenings.append([step.epoch, step.window + 1, limit])
        return limit

    def draw(self) -> Iterator[PlannedStep]:
        """Yield the steps not taken yet, those of the next epochs included, without end.

        Raises PlanError for a plan without a step.
        """
        self._drawn.clear()
        epoch, start, number = self.epoch, self.start, self.number
        while True:
            before = number
            for step in self._draw(epoch, start, number):
                number = step.number + 1
                yield step
            if number == before and start is None:
                raise PlanError("the plan has no step: every utterance is too long or otherwise left out")
            epoch, start = epoch + 1, None

    def draw_epoch(self) -> Iterator[PlannedStep]:
        """Yield the steps of the epoch that are not taken yet."""
        self._drawn.clear()
        yield from self._draw(self.epoch, self.start, self.number)

    def _draw(self, epoch: int, start: Position | None, number: int) -> Iterator[PlannedStep]:
        plan = self.plan_of(epoch)
        if start is not None:  # its plan's budget may have been tightened since
            start = replace(start, plan=plan.fingerprint)
        for position, after, rows in plan.walk(start):
            memory = self.memory or plan.budget_of(position.window)
            step = PlannedStep(plan, number, position, after, rows, memory)
            self._drawn.append(step)
            yield step
            number += 1

    def take(self) -> PlannedStep:
        """Return the first step that is drawn and not taken, and count it as taken."""
        if not self._drawn:
            raise PlanError("a step was taken that was not drawn")
        step = self._drawn.popleft()
        self.number = step.number + 1
        self.epoch, self.start = step.epoch, step.after
        if step.after.window == step.plan.windows.count:
            self.epoch, self.start = step.epoch + 1, None
        return step

    def state_dict(self) -> dict[str, object]:
        """Return the first step that is not taken, as JSON of less than 1 KB, and the tightened budgets if any."""
        at = self.start or Position(self.epoch, 0, 0, "")
        state = replace(at, plan=self.plan_of(self.epoch).fingerprint).as_json()
        return state | ({"tightenings": self.tightenings} if self.tightenings else {})

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue at a saved state, on any number of ranks. Raises PlanError for the state of another plan."""
        position = Position.from_json(state)
        held = state.get("tightenings", [])
        if not isinstance(held, list):
            raise PlanError(f"position: tightenings is {held!r}; it must be a list")
        self.tightenings = held
        self.plan_of(position.epoch).check(position)
        self.epoch, self.start = position.epoch, position
        self._drawn.clear()


class PlanSampler(Stepper):
    """A batch sampler for PyTorch's DataLoader: ``DataLoader(dataset, batch_sampler=PlanSampler(plan, rank, ranks))``.

    A batch is a list of index rows, one of this rank's micro-batches; the dataset is map-style over rows. Worker
    processes fetch batches long before the loop takes them, so the state counts what the loop has taken: call
    ``took()`` for each batch that the loop has received, or iterate over ``follow(loader)``, which does it. The state
    is then exact with any number of workers, and holds for any number of ranks. Every rank saves it at the same step.

    An iteration is an epoch, or the remainder of one; after its last batch the state is the start of the next epoch. A
    rank without a micro-batch in a step (more ranks than micro-batches) yields an empty batch, ``[]``.
    """

    def __init__(self, plan: Plan, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(plan, rank, ranks)
        self._pending: deque[int] = deque()  # batches not taken yet of each step drawn

    def __iter__(self) -> Iterator[list[int]]:
        self._pending.clear()
        for step in self.draw_epoch():
            batches = [batch.rows.tolist() for batch in step.micro_batches(self.rank, self.ranks)] or [[]]
            self._pending.append(len(batches))
            yield from batches

    def __len__(self) -> int:
        """Return the number of this rank's batches in the remainder of the epoch."""
        plan = self.plan_of(self.epoch)
        first = 0 if self.start is None else plan.number(self.start)
        shares = (plan.micro_batches_for(self.rank, self.ranks, number) for number in range(first, len(plan)))
        return sum(max(1, len(share)) for share in shares)

    def took(self) -> None:
        """Count one more batch as received by the loop."""
        if not self._pending:
            raise PlanError("took() was called more often than the sampler gave batches")
        self._pending[0] -= 1
        if not self._pending[0]:
            self._pending.popleft()
            self.take()

    def follow(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the loader's batches; each counts as taken when the next one is asked for."""
        for batch in loader:
            yield batch
            self.took()

    def set_epoch(self, epoch: int) -> None:
        """Move to the start of an epoch, unless a state of that epoch has just been loaded."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, None


class StepSampler(Stepper):
    """A batch sampler for trainers that only count updates and accumulate a fixed number of batches.

    Steps are counted over the run. Each gives every rank exactly ``accumulation`` batches, some of them empty (``[]``)
    where the rank has fewer. A pass is ``len(plan)`` steps from ``first()`` on. Epochs of a plan may differ by a few
    steps, so a pass may end inside an epoch, and the next one continues there. Every utterance still comes exactly
    once in an epoch.
    """

    def __init__(self, plan: Plan, rank: int = 0, ranks: int = 1, first: Callable[[], int] = lambda: 0) -> None:
        super().__init__(plan, rank, ranks)
        refuse_packed(plan, "this trainer")
        self.first = first
        self.micro_batches_per_step = plan.micro_batches_per_step
        self.accumulation = -(-plan.micro_batches_per_step // ranks)
        self.steps = len(plan)
        """Number of steps of a pass."""
        self._counts: dict[int, int] = {}  # steps of each epoch
        if not self.steps:
            raise PlanError("the plan has no step: every utterance is too long or otherwise left out")

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step of the run, at most ``accumulation``."""
        epoch = self.plan.epoch
        while step >= self._count(epoch):
            step -= self._count(epoch)
            epoch += 1
        return self.plan_of(epoch).micro_batches_for(self.rank, self.ranks, step, self.accumulation)

    def _count(self, epoch: int) -> int:
        if epoch not in self._counts:
            self._counts[epoch] = len(self.plan_of(epoch))
        return self._counts[epoch]

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first()
        for step in range(first, first + self.steps):
            mine = self.micro_batches(step)
            yield from (batch.rows.tolist() for batch in mine)
            yield from ([] for _ in range(self.accumulation - len(mine)))

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        return self.steps * self.accumulation


def refuse_packed(plan: Plan, trainer: str) -> None:
    """Raise PlanError for a plan of packed micro-batches, which would not fit in memory padded."""
    if plan.batching.packed:
        raise PlanError(
            f"{trainer} pads its batches, and those of {plan.batching.name!r} are planned without; "
            "choose another one, such as 'balanced', or train with 'canter train'"
        )


def tightened(budget: Budget, index: Index, limits: list[float]) -> Budget:
    """Return the budget with the lowest of the limits in bytes, but large enough for every utterance that fitted."""
    if not limits:
        return budget
    lengths = Lengths.of(index, slice(None), budget)
    usable = exclusions(lengths, budget, None) == 0
    single = budget.bytes(1, lengths.frames[usable], lengths.tokens[usable])
    least = float(np.max(single)) if usable.any() else budget.limit_bytes
    return replace(budget, limit_bytes=min(budget.limit_bytes, max(min(limits), least)))
