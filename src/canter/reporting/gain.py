"""Compare the batches of a run with those that other strategies would have made of the same utterances.

All figures are those of `canter.planning.metrics`. The other strategies' are predicted: planned over the run's own
length index, with the budget's model of time and memory. The run's own come twice: predicted in the same way from the
batches that it was trained on, and measured, from its metrics.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from canter.corpus.index import LengthIndex
from canter.planning.budget import Budget
from canter.planning.metrics import BatchTable, Figures, figures
from canter.planning.plan import Plan
from canter.planning.strategies import Bucket2D, Random, Strategy
from canter.reporting.run_folder import Row, Run, is_number
from canter.training.feed.speed import speeds_of

MOST_ROWS = 200_000  # utterances planned; more are sampled
FILLED = 0.9  # fraction of the memory that a run's largest batch must take for memory to be its limit
BISECTIONS = 10
SHOWN = 24  # utterances of a batch drawn


@dataclass(frozen=True)
class Batching:
    """One way to batch the run's utterances, and its figures for an epoch of them."""

    name: str
    figures: Figures
    """``memory_filled`` is a fraction of the run's memory budget; ``hours`` are of a whole epoch."""
    updates: float
    """Optimiser steps in an epoch."""


@dataclass(frozen=True)
class Gain:
    """The run's batches (predicted) beside those of `random` and `bucket_2d` (predicted)."""

    others: list[Batching]
    own: Batching
    fills_memory: bool
    """True where the run's largest batch takes `FILLED` of its memory budget. The others then fill it too; otherwise
    they have batches as large as the run's on average, so that an epoch has as many updates."""
    utterances: int
    """Utterances planned: those of the index, or a sample."""
    taken: int
    """Utterances of the run's batches."""
    epoch_utterances: int
    epoch_audio: float
    """Seconds of audio in an epoch."""
    batch: list[float]
    """Seconds of the utterances of one of the run's micro-batches, of median padding."""
    drawn: list[float]
    """Seconds of as many utterances drawn at random."""

    @property
    def speedup(self) -> float:
        """Predicted epoch time of `random` over the run's."""
        return self.others[0].figures.hours / self.own.figures.hours


def gain(run: Run) -> Gain | None:
    """Compare the run's batches; None where its lengths, budget or utterances.jsonl are missing."""
    logged = run.logged_steps()
    if run.planned is None or not logged:
        return None
    index, budget = run.planned
    taken = _taken(run, logged, index)
    if taken is None:
        return None
    seconds, tokens, batches, steps = taken
    table = _table(seconds, tokens, batches, steps, budget)
    fills = float(budget.bytes(table.size, table.frames, table.tokens).max()) >= FILLED * budget.limit_bytes
    weighted = any(source.weight is not None for source in index.sources)
    planned = LengthIndex(seconds, tokens) if weighted else index
    if len(planned) > MOST_ROWS:
        rows = np.sort(np.random.default_rng(0).choice(len(planned), MOST_ROWS, replace=False))
        planned = LengthIndex(planned.seconds[rows], planned.tokens[rows])
    per_step = int(run.settled.get("micro_batches_per_step") or max(1, round(len(batches) / len(steps))))

    def plan(strategy: Strategy, limit: float = budget.limit_bytes) -> Figures:
        room = replace(budget, limit_bytes=limit)
        found = Plan(planned, room, strategy, micro_batches_per_step=per_step).figures(run.ranks)
        return replace(found, memory_filled=found.memory_filled * limit / budget.limit_bytes)

    if fills:
        found = {strategy.name: plan(strategy) for strategy in (Random(), Bucket2D())}
    else:
        mean = float(table.size.mean())
        random = plan(Random(max(1, round(mean))))
        found = {
            "random": random,
            "bucket_2d": _of_mean_batch(mean, partial(plan, Bucket2D()), budget, planned),
        }
    if not all(figures.utterances for figures in found.values()):
        return None
    others = [_batching(name, figures, len(index)) for name, figures in found.items()]
    frames, whole = budget.frames(np.asarray(index.seconds)), np.asarray(index.tokens, np.int64)
    work = float(budget.utterance_seconds(frames, whole).sum()) / float(table.own_seconds.sum())
    own = _batching("this run", figures(table, budget, run.ranks), len(index), work)
    batch = _typical(seconds, batches, table)
    drawn = np.random.default_rng(0).choice(planned.seconds, min(len(batch), len(planned)), replace=False)
    audio = float(np.sum(index.seconds, dtype=np.float64))
    return Gain(others, own, fills, len(planned), own.figures.utterances, len(index), audio, batch, drawn.tolist())


def _batching(name: str, found: Figures, utterances: int, work: float | None = None) -> Batching:
    """Scale figures to an epoch of so many utterances; ``work`` is the epoch's useful computing as a multiple of
    theirs, where their utterances are too few to stand for all."""
    times = utterances / found.utterances
    return Batching(name, replace(found, hours=found.hours * (work or times)), found.steps * times)


def _of_mean_batch(mean: float, plan: Callable[[float], Figures], budget: Budget, index: LengthIndex) -> Figures:
    """Return the figures of a plan whose memory is limited (by bisection) so that its mean batch is about ``mean``."""
    frames, tokens = budget.frames(np.asarray(index.seconds)), np.asarray(index.tokens, np.int64)
    alone = budget.bytes(1, frames, tokens)
    low, high = float(alone.max()), budget.limit_bytes
    found = plan(high)
    for _ in range(BISECTIONS):
        if low >= high or abs(found.mean_batch / mean - 1) < 0.02:
            break
        middle = float(np.sqrt((low - budget.fixed_bytes) * (high - budget.fixed_bytes))) + budget.fixed_bytes
        found = plan(middle)
        low, high = (middle, high) if found.mean_batch < mean else (low, middle)
    return found


def _taken(
    run: Run, logged: list[Row], index: LengthIndex
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Return seconds and tokens (n,) of the utterances of the logged steps, in their order, and the first utterance of
    each micro-batch and the first micro-batch of each step. None where rows are not the index's."""
    augment, seed = run.settings.get("augment"), run.settings.get("seed") or 0
    speeds = (augment.get("speed") if isinstance(augment, dict) else None) or ()
    if type(seed) is not int or not isinstance(speeds, list | tuple) or not all(map(is_number, speeds)):
        return None
    speeds = tuple(speeds)
    rows: list[int] = []
    epochs, batches, steps = [], [], []
    for row in logged:
        if not any(row["rows"]):
            continue
        steps.append(len(batches))
        for batch in filter(None, row["rows"]):
            batches.append(len(rows))
            epochs += [row.get("epoch") or 0] * len(batch)
            rows += batch
    if not rows or min(rows) < 0 or max(rows) >= len(index):
        return None
    own, seconds = np.array(rows), np.asarray(index.seconds)[rows].astype(float)
    if speeds:
        for epoch in set(epochs):
            here = np.array(epochs) == epoch
            seconds[here] /= speeds_of(own[here], seed, epoch, speeds)
    return seconds, np.asarray(index.tokens)[own], np.array(batches), np.array(steps)


def _table(
    seconds: np.ndarray, tokens: np.ndarray, batches: np.ndarray, steps: np.ndarray, budget: Budget
) -> BatchTable:
    """Sizes and lengths of micro-batches, from what `_taken` returns."""
    frames, tokens = budget.frames(seconds), tokens.astype(np.int64)

    def total(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, batches)

    return BatchTable(
        size=np.diff(np.append(batches, len(seconds))),
        frames=np.maximum.reduceat(frames, batches),
        tokens=np.maximum.reduceat(tokens, batches),
        own_frames=total(frames),
        own_tokens=total(tokens),
        own_seconds=total(budget.utterance_seconds(frames, tokens)),
        audio_seconds=total(seconds.astype(np.float64)),
        steps=np.append(steps, len(batches)),
    )


def _typical(seconds: np.ndarray, batches: np.ndarray, table: BatchTable) -> list[float]:
    """Return the utterances' seconds of the micro-batch of median padding among those with enough of them to draw."""
    padding = 1 - table.own_frames / (table.size * table.frames)
    enough = np.flatnonzero(table.size >= min(8, int(table.size.max())))
    chosen = enough[np.argsort(padding[enough], kind="stable")[len(enough) // 2]]
    start = batches[chosen]
    return seconds[start : start + min(SHOWN, int(table.size[chosen]))].astype(float).tolist()
