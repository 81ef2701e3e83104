"""A plan as a batch sampler for PyTorch's DataLoader (which needs no import of torch here)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from canter.errors import PlanError
from canter.planning.elastic import share_out
from canter.planning.plan import MicroBatch, Plan, Position


class PlanSampler:
    """``DataLoader(dataset, batch_sampler=PlanSampler(plan, rank, ranks))``: this rank's micro-batches, in order.

    A batch is a list of index rows; the dataset is map-style over rows. With worker processes the loader asks for
    batches long before the loop takes them, so what counts is what was taken: call ``took()`` once for each batch
    the loop has received, or pass the loader through ``follow(loader)``, which does it. ``state_dict()`` is then
    right for any number of workers, and batches prefetched but not taken are not lost. Every rank calls it at the
    same step; a state is a position in the plan and holds for any number of ranks.

    After the last batch of an epoch the sampler stands at the start of the next one, and so does its state.

    A rank that gets nothing of a step (more ranks than micro-batches) yields an empty batch, ``[]``.
    """

    def __init__(self, plan: Plan, rank: int = 0, ranks: int = 1) -> None:
        if not 0 <= rank < ranks:
            raise PlanError(f"rank {rank} of {ranks}: ranks count from 0")
        self.plan, self.rank, self.ranks = plan, rank, ranks
        self._start: Position | None = None
        self._pending: list[tuple[Position, int]] = []  # (position after the step, its batches not yet taken)

    def __iter__(self) -> Iterator[list[int]]:
        self._pending = []
        plan = self.plan
        for at, after, step in plan.walk(self._start):
            mine = step
            if self.ranks > 1:
                mine = [batch.rows for batch in plan.micro_batches_for(self.rank, self.ranks, at)]
            batches = [rows.tolist() for rows in mine] or [[]]
            self._pending.append((after, len(batches)))
            yield from batches

    def __len__(self) -> int:
        """Batches of this rank from where it starts."""
        first = 0 if self._start is None else self.plan.number(self._start)
        shares = (self.plan.micro_batches_for(self.rank, self.ranks, n) for n in range(first, len(self.plan)))
        return sum(max(1, len(share)) for share in shares)

    def took(self) -> None:
        """The loop has received one more batch."""
        if not self._pending:
            raise PlanError("took() was called more often than the sampler gave batches")
        after, left = self._pending[0]
        if left > 1:
            self._pending[0] = (after, left - 1)
            return
        self._pending.pop(0)
        self._start = after
        if after.window == self.plan.windows.count:
            self.plan, self._start = self.plan.at_epoch(after.epoch + 1), None

    def follow(self, loader: Any) -> Iterator[Any]:
        """The loader's batches, each counted as taken when the next one is asked for (so: when it is done with)."""
        for batch in loader:
            yield batch
            self.took()

    def state_dict(self) -> dict[str, Any]:
        """The next step that has not been taken whole; JSON, less than 1 KB."""
        start = self._start or Position(self.plan.epoch, 0, 0, self.plan.fingerprint)
        return start.as_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues there, on any number of ranks and workers. Raises PlanError for a state of another plan."""
        position = Position.from_json(state)
        if position.epoch != self.plan.epoch:
            self.plan = self.plan.at_epoch(position.epoch)
        self.plan.check(position)
        self._start = position

    def set_epoch(self, epoch: int) -> None:
        """The start of an epoch, unless a state of that epoch has just been loaded."""
        if epoch != self.plan.epoch:
            self.plan, self._start = self.plan.at_epoch(epoch), None


class StepSampler:
    """A batch sampler for trainers that know of nothing but a number of updates and a fixed accumulation.

    Steps are counted over the whole run: those of the plan's epoch, then those of the next, and so on. Each gives
    every rank exactly ``accumulation`` batches, ``[]`` where there is nothing left. A pass is ``len(plan)`` steps
    from ``first()`` on: as epochs of a plan may differ by a few steps, so may the end of a pass and of an epoch, and
    the next pass goes on there. Every utterance still comes exactly once an epoch.
    """

    def __init__(self, plan: Plan, rank: int = 0, ranks: int = 1, first: Callable[[], int] = lambda: 0) -> None:
        if not 0 <= rank < ranks:
            raise PlanError(f"rank {rank} of {ranks}: ranks count from 0")
        self.rank, self.ranks, self.first = rank, ranks, first
        self.micro_batches_per_step = plan.micro_batches_per_step
        self.accumulation = -(-plan.micro_batches_per_step // ranks)
        self.steps = len(plan)
        self._epochs = [plan]
        if not self.steps:
            raise PlanError("the plan has no step: every utterance is too long or otherwise left out")

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's part of a step of the run, at most ``accumulation``."""
        epoch = 0
        while step >= len(self._epochs[epoch]):
            step -= len(self._epochs[epoch])
            epoch += 1
            if epoch == len(self._epochs):
                self._epochs.append(self._epochs[-1].at_epoch(self._epochs[-1].epoch + 1))
        plan = self._epochs[epoch]
        window, inside = plan.check(plan.position(step))
        rows = plan.cut(window).step(inside)
        mine = share_out(plan.step_seconds(window, inside), self.ranks, self.accumulation)[self.rank]
        return [MicroBatch(number, rows[number]) for number in mine]

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first()
        for step in range(first, first + self.steps):
            mine = self.micro_batches(step)
            yield from (batch.rows.tolist() for batch in mine)
            yield from ([] for _ in range(self.accumulation - len(mine)))

    def __len__(self) -> int:
        """Batches of a pass."""
        return self.steps * self.accumulation
