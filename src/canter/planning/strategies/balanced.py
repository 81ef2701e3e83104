"""The default: every batch filled to the budget with utterances alike, every step even in time and mixed in length.

A window is sorted into strips of T, the utterances of a strip by U, up in one strip and down in the next, so that
the sequence runs through the (T, U) plane in a snake and neighbours are alike. Strips are as wide as makes the two
kinds of padding cost the same. The snake is then cut into a multiple of M batches of equal memory, and these are
dealt out: batches of the same predicted time share a step, those of different length where there is a choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from canter.errors import PlanError
from canter.planning.budget import Budget
from canter.planning.lengths import Index, Lengths
from canter.planning.strategies.base import Cut, Cutter, in_steps, maxima, nothing, reorder

GROUPS = 64  # quantiles of T at which the width of strips is worked out
TIME_CLASS = 1.004  # batches whose times differ by no more than this factor may change places between steps
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Balanced:
    """mixing: parts a window is dealt into at random before it is sorted. 1 pads least; more parts make batches
    more random (the mixing pool grows with them, padding with their square root)."""

    mixing: float = 1.0
    name: ClassVar[str] = "balanced"
    default_window: ClassVar[int | None] = 50_000

    def tokens_per_second(self, index: Index, budget: Budget) -> float | None:
        return None

    def prepare(self, index: Index, budget: Budget, grid: tuple[int, int] = (1, 1)) -> Cutter:
        if not self.mixing >= 1:
            raise PlanError(f"balanced: mixing is {self.mixing}; it must be 1 (least padding) or more")

        def cut(lengths: Lengths, per_step: int, rng: np.random.Generator) -> Cut:
            if len(lengths) == 0:
                return nothing()
            order = snake(lengths, budget, round(self.mixing), rng)
            frames, tokens = lengths.frames[order], lengths.tokens[order]
            batches = even_batches(frames, tokens, budget, per_step)
            return deal(order, batches, frames, tokens, budget, per_step, rng)

        return cut


def snake(lengths: Lengths, budget: Budget, parts: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) positions such that neighbours are alike; `parts` turns through the whole range of lengths."""
    n = len(lengths)
    by_frames = np.argsort(narrow(lengths.frames), kind="stable")
    width = strip_width(lengths.frames[by_frames], lengths.tokens[by_frames], budget) / parts
    strip = np.cumsum(1.0 / np.maximum(width, 1.0)) / parts
    # a random phase, so that the edges of strips (and with them who meets whom) move from window to window
    strip = np.floor(strip + rng.random()).astype(np.int64)
    tokens = lengths.tokens[by_frames]
    span = int(tokens.max()) + 1
    if parts > 1:  # the window is in shuffled order: a position's residue is a random part
        part = by_frames % parts
        backwards = part % 2 == 1
        strips = int(strip[-1]) + 1
        strip = part * strips + np.where(backwards, strips - 1 - strip, strip)
    key = strip * span + np.where(strip % 2 == 1, span - 1 - tokens, tokens)
    return by_frames[np.argsort(narrow(key), kind="stable")]


def narrow(keys: np.ndarray) -> np.ndarray:
    """The same keys in the smallest unsigned type: sorting is several times faster on it."""
    return keys.astype(np.min_scalar_type(int(keys.max()) if len(keys) else 0))


def strip_width(frames: np.ndarray, tokens: np.ndarray, budget: Budget) -> np.ndarray:
    """(n,) utterances per strip around each utterance of a sequence sorted by frames.

    A strip of k batches of B utterances spans kB / density frames, of which half is padded on average; its tokens,
    sorted and cut in k, are padded by about a spread of 4 standard deviations / 2k. The sum of the two, each
    weighted with what a frame or a token costs, is least at k^2 = token cost x spread x density / (frame cost x B).
    """
    n = len(frames)
    groups = max(1, min(GROUPS, n // 64))
    edges = np.linspace(0, n, groups + 1).astype(np.int64)
    count = np.diff(edges)
    t = np.add.reduceat(frames, edges[:-1]) / count
    u = np.add.reduceat(tokens, edges[:-1]) / count
    spread = (
        4
        * np.sqrt(np.maximum(np.add.reduceat(tokens.astype(np.float64) ** 2, edges[:-1]) / count - u * u, 0))
        + 1
    )
    density = count / (frames[edges[1:] - 1] - frames[edges[:-1]] + 1)
    per_frame = budget.time(t + 1, u) - budget.time(t, u)
    per_token = budget.time(t, u + 1) - budget.time(t, u)
    size = (budget.limit_bytes - budget.fixed_bytes) / budget.memory(t, u)
    strip = np.sqrt(per_token * spread * density / np.maximum(per_frame * size, 1e-30))
    return np.repeat(np.maximum(strip, 1.0) * size, count)


def even_batches(frames: np.ndarray, tokens: np.ndarray, budget: Budget, multiple: int) -> np.ndarray:
    """Offsets of batches of about equal memory over a sequence of alike neighbours; their number a multiple of M.

    No batch is over the budget. Where there are fewer utterances than M, each is a batch.
    """
    n = len(frames)
    room = budget.limit_bytes - budget.fixed_bytes
    share = padded_work(frames, tokens, budget) / room
    done = np.concatenate([[0.0], np.cumsum(share)])
    count = max(1, math.ceil(done[-1] / multiple)) * multiple
    while count < n:
        batches = fill(frames, tokens, budget, done, count)
        if batches is not None:
            return batches
        count += multiple
    return np.arange(n + 1)


def padded_work(frames: np.ndarray, tokens: np.ndarray, budget: Budget) -> np.ndarray:
    """(n,) bytes of each utterance padded as in a batch cut about here."""
    room = budget.limit_bytes - budget.fixed_bytes
    work = budget.memory(frames, tokens).astype(np.float64)
    for _ in range(2):
        done = np.cumsum(work)
        count = max(1, math.ceil(done[-1] / room))
        cuts = np.searchsorted(done, done[-1] * np.arange(1, count) / count)
        batches = np.unique(np.concatenate([[0], cuts, [len(frames)]]))
        work = np.repeat(
            budget.memory(maxima(frames, batches), maxima(tokens, batches)).astype(np.float64),
            np.diff(batches),
        )
    return work


def fill(
    frames: np.ndarray, tokens: np.ndarray, budget: Budget, done: np.ndarray, count: int
) -> np.ndarray | None:
    """Cuts exactly `count` batches, each as near as can be to an equal share of what is left; None if they do not fit.

    done: (n + 1,) estimated batches' worth of memory before each utterance.
    """
    room, cost = budget.limit_bytes - budget.fixed_bytes, budget.memory
    n, total = len(frames), float(done[-1])
    largest_frames, largest_tokens = frames.max, tokens.max  # noqa: F841
    offsets = [0]
    start, size = 0, 1
    for left in range(count, 0, -1):
        target = min(1.0, (total - float(done[start])) / left)
        limit = min(room, room * target * (1 + 0.5 / size))
        most = n - start - (left - 1)  # leave one utterance for each batch to come
        if most < 1:
            return None
        size = grow(frames, tokens, start, min(size, most), most, limit, cost)
        start += size
        offsets.append(start)
    return np.array(offsets, np.int64) if start == n else None


def grow(frames, tokens, start: int, guess: int, most: int, limit: float, cost) -> int:
    """Largest size at `start`, at most `most` and at least 1, whose padded memory stays within the limit."""
    fits, over = 0, most + 1
    size = max(1, guess)
    while True:
        end = start + size
        worth = cost(int(np.maximum.reduce(frames[start:end])), int(np.maximum.reduce(tokens[start:end])))
        can = int(limit / worth) if worth > 0 else most
        if can >= size:
            fits = size
            if can == size:  # one more would be over even at these maxima
                return size
            size = min(can, over - 1)
        else:
            over = size
            size = max(can, fits + 1) if can > fits else (fits + over) // 2
        if over - fits <= 1:
            return max(1, fits)
        size = min(max(size, fits + 1), over - 1)


def deal(
    order: np.ndarray,
    batches: np.ndarray,
    frames: np.ndarray,
    tokens: np.ndarray,
    budget: Budget,
    per_step: int,
    rng: np.random.Generator,
) -> Cut:
    """Steps of M batches equal in predicted time and mixed in length, in a sequence without drift."""
    count = len(batches) - 1
    longest = maxima(frames, batches)
    seconds = budget.step_seconds(np.diff(batches), longest, maxima(tokens, batches))
    steps = count // per_step
    by_time = np.argsort(seconds, kind="stable")
    chosen = np.empty(count, np.int64)
    begin = 0
    while begin < steps:  # classes of steps within which batches may change places
        first = seconds[by_time[begin * per_step]]
        reach = int(np.searchsorted(seconds[by_time], first * TIME_CLASS, side="right")) // per_step
        end = min(max(begin + 1, reach), steps)
        inside = by_time[begin * per_step : end * per_step]
        inside = inside[np.argsort(longest[inside], kind="stable")]
        chosen[begin * per_step : end * per_step] = inside.reshape(per_step, end - begin).T.ravel()
        begin = end
    chosen[steps * per_step :] = by_time[steps * per_step :]
    if steps:
        # steps in a low-discrepancy sequence over their mean length: every stretch has its share of long and short
        table = chosen[: steps * per_step].reshape(steps, per_step)
        rank = np.argsort(longest[table].mean(axis=1), kind="stable")
        table = table[rank][np.argsort((np.arange(steps) * GOLDEN + rng.random()) % 1.0)]
        chosen[: steps * per_step] = table.ravel()
    return reorder(order, batches, chosen, in_steps(count, per_step))
