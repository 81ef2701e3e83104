"""Fixed batch size, shuffled: what a plain data loader does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from canter.errors import PlanError
from canter.planning.budget import Budget
from canter.planning.lengths import Index, Lengths, sample
from canter.planning.strategies.base import Cut, Cutter, enough_batches, in_steps


@dataclass(frozen=True, slots=True)
class Random:
    """`batch_size` utterances a micro-batch; None takes the largest size that fits whatever is drawn together."""

    batch_size: int | None = None
    name: ClassVar[str] = "random"
    default_window: ClassVar[int | None] = None

    def tokens_per_second(self, index: Index, budget: Budget) -> float | None:
        return None

    def prepare(self, index: Index, budget: Budget, grid: tuple[int, int] = (1, 1)) -> Cutter:
        size = self.batch_size
        if size is None:
            lengths = sample(index, budget, grid)
            most = max_corner(lengths) if len(lengths) else (1, 1)
            size = max(1, budget.max_batch(*most))
        if size < 1:
            raise PlanError(f"random: batch_size is {size}; it must be at least 1")

        def cut(lengths: Lengths, per_step: int, rng: np.random.Generator, least_steps: int = 1) -> Cut:
            n = len(lengths)

            def form(share: float) -> np.ndarray:
                return np.append(np.arange(0, n, max(1, int(share * size))), n)

            batches = enough_batches(form, n, per_step, least_steps)
            return Cut(np.arange(n), batches, in_steps(len(batches) - 1, per_step))

        return cut


def max_corner(lengths: Lengths) -> tuple[int, int]:
    return int(lengths.frames.max()), int(lengths.tokens.max())
