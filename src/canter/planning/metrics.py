"""The figures of a plan, each defined once. All follow from the plan, the lengths and the budget.

For micro-batches of B utterances padded to T (frames) and U (tokens), with unpadded lengths T_i and U_i:

- padded audio    1 - sum T_i / sum B T
- padded tokens   1 - sum U_i / sum B U
- padded compute  1 - sum s(T_i, U_i) / sum B s(T, U), s the budget's seconds per utterance without the fixed part
- mean batch      utterances / micro-batches
- memory filled   mean over micro-batches of predicted bytes / limit; over: the number that exceed the limit
- epoch hours     sum over steps of the slowest rank's predicted seconds
- waiting         mean over steps of the slowest rank's predicted seconds / the ranks' mean
- step mixing     variance of the batches' mean seconds of audio within steps / over all batches; 0 where none differ
- mixing pool     mean batch / probability that two utterances of a batch share one in the next epoch too

Rounding T and U up to a grid counts as padding. Packed micro-batches have no other padded audio and tokens; their bytes
and seconds follow from the terms of `canter.planning.groups.packed_terms`, so the padding of groups is padded compute.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal

import numpy as np

from canter.planning.budget import Budget
from canter.planning.elastic import slowest_rank
from canter.planning.groups import packed_terms
from canter.planning.lengths import Lengths

Cause = Literal["memory", "batch_seconds", "min_steps", "utterances", "strategy"]


@dataclass(frozen=True, slots=True)
class BatchTable:
    """Utterances, longest lengths and sums of unpadded lengths of each micro-batch.

    All columns are (micro-batches,) except `steps`, the offsets of steps in micro-batches (S + 1,), and `terms`, those
    of `packed_terms` (micro-batches, 5), or None where micro-batches are padded to (frames, tokens).
    """

    size: np.ndarray
    frames: np.ndarray
    tokens: np.ndarray
    own_frames: np.ndarray
    own_tokens: np.ndarray
    own_seconds: np.ndarray  # predicted seconds of the unpadded utterances, without the fixed part
    audio_seconds: np.ndarray
    steps: np.ndarray
    terms: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        lengths: Lengths,
        batches: np.ndarray,
        steps: np.ndarray,
        budget: Budget,
        *,
        packed: bool = False,
        own: Lengths | None = None,
    ) -> BatchTable:
        """Return the table of utterances in batch order.

        batches: offsets of micro-batches in the utterances. steps: offsets of steps in micro-batches. own: the lengths
        before rounding up to a grid, if there is one.
        """
        own = own or lengths
        starts = batches[:-1]

        def total(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values, starts) if len(starts) else values[:0]

        def longest(values: np.ndarray) -> np.ndarray:
            return np.maximum.reduceat(values, starts) if len(starts) else values[:0]

        terms = None
        if packed:
            inside = (slice(begin, end) for begin, end in pairwise(batches.tolist()))
            found = [packed_terms(lengths.frames[rows], lengths.tokens[rows]) for rows in inside]
            terms = np.array(found, np.int64).reshape(-1, 5)
        return cls(
            size=np.diff(batches),
            frames=longest(lengths.frames),
            tokens=longest(lengths.tokens),
            own_frames=total(own.frames),
            own_tokens=total(own.tokens),
            own_seconds=total(budget.utterance_seconds(own.frames, own.tokens)),
            audio_seconds=total(own.seconds.astype(np.float64)),
            steps=steps,
            terms=terms,
        )

    @property
    def padded_frames(self) -> np.ndarray:
        """Frames of each micro-batch, its padding included, (micro-batches,)."""
        return self.size * self.frames if self.terms is None else self.terms[:, 0]

    @property
    def padded_tokens(self) -> np.ndarray:
        """Tokens of each micro-batch, its padding included, (micro-batches,)."""
        return self.size * self.tokens if self.terms is None else self.terms[:, 2]

    def bytes(self, budget: Budget) -> np.ndarray:
        """Return the predicted peak bytes of each micro-batch, (micro-batches,)."""
        if self.terms is None:
            return budget.bytes(self.size, self.frames, self.tokens)
        return budget.bytes_of_terms(self.terms)

    def compute(self, budget: Budget) -> np.ndarray:
        """Return the predicted seconds of each micro-batch without the fixed part, (micro-batches,)."""
        if self.terms is None:
            return self.size * budget.utterance_seconds(self.frames, self.tokens)
        return budget.time.of_terms(self.terms)

    def seconds(self, budget: Budget) -> np.ndarray:
        """Return the predicted seconds of each micro-batch, forward and backward, (micro-batches,)."""
        return budget.fixed_seconds + self.compute(budget)

    @classmethod
    def concatenate(cls, tables: Iterable[BatchTable]) -> BatchTable:
        tables = list(tables)
        before = np.cumsum([0] + [len(t.size) for t in tables])
        steps = [t.steps[1:] + start for t, start in zip(tables, before)]
        names = [f.name for f in fields(cls) if f.name != "steps" and getattr(tables[0], f.name) is not None]
        columns = {name: np.concatenate([getattr(t, name) for t in tables]) for name in names}
        return cls(**columns, steps=np.concatenate([[0], *steps]).astype(np.int64))


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of a plan; the module's docstring defines them."""

    padded_audio: float
    padded_tokens: float
    padded_compute: float
    mean_batch: float
    memory_filled: float
    over: int
    steps: int
    micro_batches: int
    utterances: int
    hours: float
    waiting: float
    step_mixing: float


def figures(table: BatchTable, budget: Budget, ranks: int) -> Figures:
    """Return the figures of a plan's micro-batches, its steps shared out to `ranks`."""
    if len(table.size) == 0:
        return Figures(0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 0, 0.0, 1.0, 0.0)
    used = table.bytes(budget)
    compute = float(table.compute(budget).sum())
    seconds = table.seconds(budget)
    slowest = slowest_rank(seconds, table.steps, ranks)
    mean = np.add.reduceat(seconds, table.steps[:-1]) / ranks
    return Figures(
        padded_audio=_wasted(table.own_frames, table.padded_frames),
        padded_tokens=_wasted(table.own_tokens, table.padded_tokens),
        padded_compute=1 - float(table.own_seconds.sum()) / compute if compute else 0.0,
        mean_batch=float(table.size.mean()),
        memory_filled=float(used.mean()) / budget.limit_bytes,
        over=int((used > budget.limit_bytes).sum()),
        steps=len(table.steps) - 1,
        micro_batches=len(table.size),
        utterances=int(table.size.sum()),
        hours=float(slowest.sum()) / 3600,
        waiting=float((slowest / mean).mean()),
        step_mixing=_step_mixing(table),
    )


def _step_mixing(table: BatchTable) -> float:
    mean = table.audio_seconds / table.size
    counts = np.diff(table.steps)
    of_steps = np.repeat(np.add.reduceat(mean, table.steps[:-1]) / counts, counts)
    total = float(mean.var())
    return float(((mean - of_steps) ** 2).mean()) / total if total > 0 else 0.0


def _wasted(own: np.ndarray, padded: np.ndarray) -> float:
    total = int(padded.sum())
    return 1 - int(own.sum()) / total if total else 0.0


def mixing_pool(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean batch / probability that two utterances of a batch share one in the other epoch too.

    first, second: (N,) the row's micro-batch in each epoch, -1 for rows in none. The result is exact, by counting
    pairs; infinite where no pair meets again.
    """
    both = (first >= 0) & (second >= 0)
    a, b = first[both], second[both]
    if len(a) == 0:
        return 0.0
    sizes = np.bincount(a).astype(np.float64)
    pairs = (sizes * (sizes - 1)).sum()
    _, meet = np.unique(a * (int(b.max()) + 1) + b, return_counts=True)
    again = (meet.astype(np.float64) * (meet - 1)).sum()
    mean = len(a) / np.count_nonzero(sizes)
    return float(mean * pairs / again) if again else float("inf")


@dataclass(frozen=True, slots=True)
class Limits:
    """The bound on the batches of a plan; `str()` explains it in one line.

    by: "memory", the budget's limit; "batch_seconds", a budget below the device's memory; "min_steps", the minimum
        number of steps; "utterances", too few to fill a step or to make `min_steps` steps; "strategy", which leaves
        memory empty (a fixed size, a cap in seconds).
    memory_filled: predicted bytes / limit, mean over micro-batches. room_filled: the same without the fixed bytes.
    steps: number in an epoch, or in as many utterances of an endless stream as the index has. per_step: M. mean_batch:
        utterances in a micro-batch.
    """

    by: Cause
    memory_filled: float
    room_filled: float
    steps: int
    min_steps: int
    per_step: int
    mean_batch: float

    def line(self, min_steps: str = "min_steps", batch_seconds: str = "batch_seconds") -> str:
        """Return the explanation, with the reader's names of the options."""
        filled = f"{self.memory_filled:.1%} of the memory filled"
        if self.memory_filled - self.room_filled > 0.001:
            filled += f" ({self.room_filled:.1%} of the memory beside the weights)"
        made = f"{self.mean_batch:.1f} utterances a micro-batch, {self.steps:,} step{'s'[: self.steps != 1]} an epoch"
        reason = {
            "memory": "the memory",
            "batch_seconds": f"{batch_seconds}; a larger value fills more of the memory",
            "min_steps": f"{min_steps} {self.min_steps}; {min_steps} 1 makes the largest batches and fewest steps",
            "utterances": (
                f"the number of utterances: no more than {self.steps:,} steps of {self.per_step} micro-batches"
                if self.steps < self.min_steps
                else f"the number of utterances, too few to fill {self.per_step} micro-batches"
            ),
            "strategy": "the strategy, which leaves memory empty; 'balanced' fills it",
        }[self.by]
        return f"batches: {filled}, {made}; limited by {reason}"

    def __str__(self) -> str:
        return self.line()
