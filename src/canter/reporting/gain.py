"""Compare the batches of a run with those of other strategies on the same utterances.

All figures are those of `canter.planning.metrics`, predicted by the run's budget: for the other strategies from plans
over the run's length index, for the run from the batches that it was trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from canter.corpus.index import LengthIndex
from canter.planning.budget import Budget
from canter.planning.lengths import Lengths
from canter.planning.metrics import BatchTable, Figures, figures
from canter.planning.plan import Plan
from canter.planning.strategies import STRATEGIES, Bucket2D, Random, Strategy
from canter.reporting.run_folder import Row, RunRecord, is_number
from canter.training.feed.speed import speeds_of

MOST_ROWS = 200_000  # utterances planned; of more, a sample
FILLED = 0.9  # fraction of the memory budget above which memory limits the largest batch
BISECTIONS = 10
DRAWN = 24  # utterances of a batch in the picture


@dataclass(frozen=True)
class Batching:
    """A strategy, and its figures for an epoch of the run's utterances."""

    name: str
    figures: Figures
    """``memory_filled`` is a fraction of the run's memory budget; ``hours`` are for a complete epoch."""
    updates: float
    """Optimiser steps in an epoch."""
    step_seconds: float
    """Mean predicted seconds of a step, on its slowest rank."""
    audio_rate: float
    """Predicted audio hours per hour."""


@dataclass(frozen=True)
class Gain:
    """Predicted figures of the run's batches, and of `random` and `bucket_2d`."""

    others: list[Batching]
    own: Batching
    fills_memory: bool
    """True where the run's largest batch takes `FILLED` of its memory budget. Then the others fill it too; otherwise
    they have the run's mean batch size, and so as many updates an epoch."""
    utterances: int
    """Number of utterances planned: all of the index, or a sample."""
    taken: int
    """Number of utterances in the run's batches."""
    packed: bool
    """True where the run's utterances stand one after the other in a micro-batch; those of the others are padded."""
    epoch_utterances: int
    epoch_audio: float
    """Seconds of audio in an epoch."""
    batch: list[float]
    """Seconds of the utterances of the run's micro-batch with median padding."""
    drawn: list[float]
    """Seconds of the same number of utterances, drawn at random."""

    @property
    def speedup(self) -> float:
        """Predicted epoch time of `random` over the run's."""
        return self.others[0].figures.hours / self.own.figures.hours


def gain(run: RunRecord) -> Gain | None:
    """Compare the run's batches; None where its lengths, budget or utterances.jsonl are missing."""
    logged = run.logged_steps()
    if run.planned is None or not logged:
        return None
    index, budget = run.planned
    taken = _taken(run, logged, index)
    if taken is None:
        return None
    seconds, tokens, batches, steps = taken
    lengths = Lengths(seconds, budget.frames(seconds), tokens.astype(np.int64))
    edges = np.append(batches, len(seconds))
    packed = getattr(STRATEGIES.get(str(run.settings.get("strategy"))), "packed", False)
    table = BatchTable.of(lengths, edges, np.append(steps, len(batches)), budget, packed=packed)
    fills = float(table.bytes(budget).max()) >= FILLED * budget.limit_bytes
    weighted = any(source.weight is not None for source in index.sources)
    planned = LengthIndex(seconds, tokens) if weighted else index
    if len(planned) > MOST_ROWS:
        rows = np.sort(np.random.default_rng(0).choice(len(planned), MOST_ROWS, replace=False))
        planned = LengthIndex(planned.seconds[rows], planned.tokens[rows])
    per_step = int(run.resolved.get("micro_batches_per_step") or max(1, round(len(batches) / len(steps))))

    def plan(strategy: Strategy, limit: float = budget.limit_bytes) -> Figures:
        room = replace(budget, limit_bytes=limit)
        found = Plan(planned, room, strategy, micro_batches_per_step=per_step).figures(run.ranks)
        return replace(found, memory_filled=found.memory_filled * limit / budget.limit_bytes)

    if fills:
        found = {strategy.name: plan(strategy) for strategy in (Random(), Bucket2D())}
    else:
        mean = float(table.size.mean())
        random = plan(Random(max(1, round(mean))))
        found = {"random": random, "bucket_2d": _of_mean_batch(mean, partial(plan, Bucket2D()), budget, planned)}
    if not all(figures.utterances for figures in found.values()):
        return None
    audio = float(np.sum(index.seconds, dtype=np.float64))
    of_planned = float(np.sum(planned.seconds, dtype=np.float64)) / len(planned)
    others = [_batching(name, one, len(index), of_planned * one.utterances) for name, one in found.items()]
    frames, tokens = budget.frames(np.asarray(index.seconds)), np.asarray(index.tokens, np.int64)
    work = float(budget.utterance_seconds(frames, tokens).sum()) / float(table.own_seconds.sum())
    taken_audio = float(table.audio_seconds.sum())
    own = _batching("this run", figures(table, budget, run.ranks), len(index), taken_audio, work)
    batch = _typical(seconds, batches, table)
    drawn = np.random.default_rng(0).choice(planned.seconds, min(len(batch), len(planned)), replace=False)
    return Gain(
        others, own, fills, len(planned), own.figures.utterances, packed, len(index), audio, batch, drawn.tolist()
    )


def _batching(name: str, found: Figures, utterances: int, audio: float, work: float | None = None) -> Batching:
    """Scale figures, which are for ``audio`` seconds, to an epoch of ``utterances``.

    ``work`` is the epoch's useful compute as a multiple of theirs, by default in proportion to the utterances.
    """
    times, seconds = utterances / found.utterances, 3600 * found.hours
    whole = replace(found, hours=found.hours * (work or times))
    return Batching(name, whole, found.steps * times, seconds / found.steps, audio / seconds if seconds else 0.0)


def _of_mean_batch(mean: float, plan: Callable[[float], Figures], budget: Budget, index: LengthIndex) -> Figures:
    """Return the figures of a plan with a mean batch of about ``mean``, by bisection of the memory limit."""
    frames, tokens = budget.frames(np.asarray(index.seconds)), np.asarray(index.tokens, np.int64)
    low, high = float(budget.bytes(1, frames, tokens).max()), budget.limit_bytes
    found = plan(high)
    for _ in range(BISECTIONS):
        if low >= high or abs(found.mean_batch / mean - 1) < 0.02:
            break
        middle = float(np.sqrt((low - budget.fixed_bytes) * (high - budget.fixed_bytes))) + budget.fixed_bytes
        found = plan(middle)
        low, high = (middle, high) if found.mean_batch < mean else (low, middle)
    return found


def _taken(
    run: RunRecord, logged: list[Row], index: LengthIndex
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the utterances of the logged steps, or None where the rows are not those of the index.

    They are seconds and tokens (n,) in order, the first utterance of each micro-batch, and the first micro-batch of
    each step.
    """
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
    taken, seconds = np.array(rows), np.asarray(index.seconds)[rows].astype(float)
    if speeds:
        for epoch in set(epochs):
            here = np.array(epochs) == epoch
            seconds[here] /= speeds_of(taken[here], seed, epoch, speeds)
    return seconds, np.asarray(index.tokens)[taken], np.array(batches), np.array(steps)


def _typical(seconds: np.ndarray, batches: np.ndarray, table: BatchTable) -> list[float]:
    """Return the seconds of the utterances of the micro-batch with median padding, among those large enough to draw."""
    padding = 1 - table.own_frames / table.padded_frames
    enough = np.flatnonzero(table.size >= min(8, int(table.size.max())))
    chosen = enough[np.argsort(padding[enough], kind="stable")[len(enough) // 2]]
    start = batches[chosen]
    return seconds[start : start + min(DRAWN, int(table.size[chosen]))].astype(float).tolist()
