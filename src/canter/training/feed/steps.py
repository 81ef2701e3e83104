"""The steps of a training run as addresses of this rank's micro-batches."""

from collections.abc import Iterator

from canter.planning.budget import Budget
from canter.planning.plan import Plan, Position
from canter.planning.sampler import PlannedStep, Stepper
from canter.training.distributed.ranks import SINGLE_RANK, Ranks
from canter.training.feed.data import Address

__all__ = ["PlannedStep", "Steps"]


class Steps(Stepper):
    """A `Stepper` that gives addresses, by which the micro-batches are loaded."""

    def __init__(self, plan: Plan, ranks: Ranks = SINGLE_RANK, memory: Budget | None = None) -> None:
        super().__init__(plan, ranks.rank, ranks.size, memory)

    def addresses(self, start: dict[str, object] | None, epoch: int, step: int) -> Iterator[Address]:
        """Yield this rank's micro-batches from a step of the run on, without end.

        ``start``: the saved position of the step in the epoch; None is the epoch's beginning. A step in which the rank
        has no micro-batch yields one address without rows. Raises PlanError for a plan without a step.
        """
        self.epoch, self.number = epoch, step
        self.start = None if start is None else Position.from_json(start)
        for planned in self.draw():
            mine = planned.micro_batches(self.rank, self.ranks)
            # speeds and masks are drawn for each epoch, or for each window of an endless stream
            draw = planned.window if planned.plan.endless else planned.epoch
            for batch in mine:
                yield Address(planned.number, batch.number, batch.number == mine[-1].number, batch.rows, draw)
            if not mine:
                yield Address(planned.number, -1, True, planned.rows[0][:0], draw)

    @staticmethod
    def position(start: dict[str, object] | None, plan: Plan) -> Position | None:
        """Return a saved position as one of ``plan``, whose budget may have been tightened since."""
        if start is None:
            return None
        place = Position.from_json(start)
        return Position(place.epoch, place.window, place.step, plan.fingerprint)

    def taken(self, step: int) -> PlannedStep:
        """Return the step, which is now taken."""
        planned = self.take()
        assert planned.number == step, f"step {planned.number} was drawn and step {step} taken"
        return planned
