"""The steps still to come: which micro-batches each has, and which of them are this rank's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from canter.errors import CanterError
from canter.planning.budget import Budget
from canter.planning.elastic import share_out
from canter.planning.plan import Plan, Position
from canter.training.distributed.ranks import SINGLE_RANK, Ranks
from canter.training.feed.data import Address
from canter.training.feed.speed import AtSpeed
from canter.training.step.recovery import next_limit, tightened


@dataclass(frozen=True)
class PlannedStep:
    """A step as the plan has it, for all ranks."""

    epoch: int
    window: int
    after: Position
    """Where the run is once it is taken."""
    rows: Sequence[np.ndarray]
    """Of each micro-batch."""
    seconds: np.ndarray
    """(M,) predicted."""
    filled: float
    """Predicted bytes of its micro-batches as a share of the limit, on average."""


@dataclass
class Steps:
    """Hands out addresses ahead of the steps; ``taken(step)`` gives back what the plan said of one."""

    plan: Plan
    ranks: Ranks = SINGLE_RANK
    memory: Budget | None = None
    """Of the memory there is; none: the plan's."""
    tightenings: list[list[float]] = field(default_factory=list)
    """[epoch, first window, limit in bytes] where a micro-batch that did not fit made the budget smaller."""
    planned: dict[int, PlannedStep] = field(default_factory=dict, repr=False)
    _plans: dict[tuple, Plan] = field(default_factory=dict, repr=False)

    def plan_of(self, epoch: int) -> Plan:
        """The plan of an epoch, with its speeds and the budgets in force."""
        base = self.plan
        index = base.index.at_epoch(epoch) if isinstance(base.index, AtSpeed) else base.index
        if index is base.index and not self.tightenings:
            return base.at_epoch(epoch)
        key = (epoch, len(self.tightenings))
        if key not in self._plans:
            windows = sorted({0} | {int(w) for e, w, _ in self.tightenings if e == epoch})
            budget = base.budgets[0][1]
            budgets = [(w, tightened(budget, base.index, self._limits(epoch, w))) for w in windows]
            self._plans = {
                key: Plan(
                    index,
                    budgets,
                    base.strategy,
                    seed=base.seed,
                    epoch=epoch,
                    window=base.window,
                    micro_batches_per_step=base.micro_batches_per_step,
                    min_steps=base.min_steps,
                    max_tokens_per_second=base.max_tokens_per_second,
                    grid=base.grid,
                    block=base.block,
                    endless=base.endless,
                    curriculum=base.curriculum,
                    cache=base.cache,
                    version=base.version,
                )
            }
        return self._plans[key]

    def _limits(self, epoch: int, window: int) -> list[float]:
        return [limit for e, w, limit in self.tightenings if (e, w) <= (epoch, window)]

    def tighten(self, planned: PlannedStep, number: int) -> float:
        """Makes the budget smaller from the window after the step's on, by its micro-batch ``number``, which did not
        fit. Returns the new limit in bytes."""
        plan = self.plan_of(planned.epoch)
        budget = plan.budget_of(planned.window)
        limit = next_limit(budget, _bytes(plan, budget, planned.rows[number]))
        self.tightenings.append([planned.epoch, planned.window + 1, limit])
        return limit

    def addresses(self, start: dict[str, Any] | None, epoch: int, step: int) -> Iterator[Address]:
        """This rank's micro-batches from a step on, for ever; a step without any gives one without rows.

        ``start`` is the position of the step within the epoch; None its beginning. Raises CanterError where the plan
        is empty.
        """
        while True:
            plan = self.plan_of(epoch)
            began = step
            for before, after, rows in plan.walk(self.position(start, plan)):
                seconds = plan.step_seconds(before.window, before.step)
                filled = self._filled(plan, before.window, rows)
                self.planned[step] = PlannedStep(epoch, before.window, after, rows, seconds, filled)
                mine = share_out(seconds, self.ranks.size)[self.ranks.rank]
                # what is drawn for an utterance anew each epoch is so each window where there are no epochs
                draw = before.window if plan.endless else epoch
                for number in mine:
                    yield Address(step, number, number == mine[-1], rows[number], draw)
                if not mine:
                    yield Address(step, -1, True, rows[0][:0], draw)
                step += 1
            if step == began and start is None:
                raise CanterError("the plan has no step: every utterance is too long or otherwise left out")
            epoch, start = epoch + 1, None

    @staticmethod
    def position(start: dict[str, Any] | None, plan: Plan) -> Position | None:
        """A saved position in ``plan``, whose budget may have become another since."""
        if start is None:
            return None
        place = Position.from_json(start)
        return Position(place.epoch, place.window, place.step, plan.fingerprint)

    def taken(self, step: int) -> PlannedStep:
        return self.planned.pop(step)

    def _filled(self, plan: Plan, window: int, rows: Sequence[np.ndarray]) -> float:
        budget = self.memory or plan.budget_of(window)
        return float(np.mean([_bytes(plan, budget, some) / budget.limit_bytes for some in rows]))


def _bytes(plan: Plan, budget: Budget, rows: np.ndarray) -> float:
    """Predicted bytes of a micro-batch of ``rows``."""
    frames = int(np.max(budget.frames(np.asarray(plan.index.seconds[rows]))))
    tokens = int(np.max(np.asarray(plan.index.tokens[rows])))
    return float(budget.bytes(len(rows), frames, tokens))
