"""Explain what limits the batches of a plan, and how much of the memory they fill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Cause = Literal["memory", "batch_seconds", "min_steps", "utterances", "strategy"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The bound that limits the batches of a plan; `str()` explains it in one line.

    by: "memory", the limit of the budget; "batch_seconds", a budget smaller than the memory; "min_steps", the least
        number of steps; "utterances", of which there are too few to fill a step, or to make `min_steps` steps;
        "strategy", which leaves memory empty (a fixed size, a cap in seconds).
    memory_filled: predicted bytes / limit, mean over micro-batches. room_filled: the same without the fixed bytes.
    steps: in an epoch, or in as many utterances of an endless stream. per_step: M. mean_batch: utterances in a
        micro-batch.
    """

    by: Cause
    memory_filled: float
    room_filled: float
    steps: int
    min_steps: int
    per_step: int
    mean_batch: float

    def line(self, min_steps: str = "min_steps", batch_seconds: str = "batch_seconds") -> str:
        """Return the explanation with the options named as the reader has them."""
        filled = f"{self.memory_filled:.1%} of the memory filled"
        if self.memory_filled - self.room_filled > 0.001:
            filled += f" ({self.room_filled:.1%} of what is above the weights)"
        made = f"{self.mean_batch:.1f} utterances a micro-batch, {self.steps:,} step{'s'[: self.steps != 1]} an epoch"
        reason = {
            "memory": "the memory",
            "batch_seconds": f"{batch_seconds}; a larger value fills more of the memory",
            "min_steps": f"{min_steps} {self.min_steps}; {min_steps} 1 makes the largest batches and fewest steps",
            "utterances": (
                f"the number of utterances: no more than {self.steps:,} steps of {self.per_step} micro-batches"
                if self.steps < self.min_steps
                else f"the number of utterances, which are too few to fill {self.per_step} micro-batches"
            ),
            "strategy": "the strategy, which leaves memory empty; 'balanced' fills it",
        }[self.by]
        return f"batches: {filled}, {made}; limited by {reason}"

    def __str__(self) -> str:
        return self.line()
