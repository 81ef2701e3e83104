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
from canter.planning.strategies.base import Cut, Cutter, in_steps, least_batches, maxima, nothing, reorder
from canter.planning.strategies.exchange import exchanged
from canter.planning.strategies.mixed_steps import mixed_sizes
from canter.planning.strategies.recut import recut
from canter.planning.strategies.strips import strips

GROUPS = 64  # quantiles of T at which the width of strips is worked out
TIME_CLASS = 1.008  # batches whose times differ by no more than this factor may change places between steps
SPARE = 1.005  # times the batches that are needed, where a search is to follow: with none empty it gets stuck
SMALL = 8192  # utterances of a window up to which strips are tried beside the snake, and like batches exchange some
FEW_TOGETHER = 16  # utterances in a batch, on average, below which batches exchange some
WORTH_A_SEARCH = 8  # utterances in a batch, on average, below which strips leave a search nothing to find
RETRY = 256  # batches to which one is added where they did not fit, and M at least
TAIL = 1.65  # standard deviations of tokens above the mean from where on utterances are sparse
TAIL_BATCHES = 10  # that they must fill to be worth a way of their own
STARTS = 64  # of the sequence of steps, among which the best is taken
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Balanced:
    """mixing: parts a window is dealt into at random before each is sorted; need not be whole. The mixing pool grows
    with the number of parts, padding with its square root. 0 is 1 with a local search after it (see `recut`): the
    least padding, at some thousand utterances a second instead of millions; for sets of up to some ten thousand.
    mix_steps: shrink some batches so that a step holds short and long utterances together (see `mixed_steps`); fills
    a few per cent less of the memory. Not with mixing 0."""

    mixing: float = 1.0
    mix_steps: bool = False
    name: ClassVar[str] = "balanced"
    default_window: ClassVar[int | None] = 50_000
    strips_up_to: ClassVar[int] = SMALL
    worth_a_search: ClassVar[int] = WORTH_A_SEARCH

    def tokens_per_second(self, index: Index, budget: Budget) -> float | None:
        return None

    def prepare(self, index: Index, budget: Budget, grid: tuple[int, int] = (1, 1)) -> Cutter:
        if not (self.mixing >= 1 or self.mixing == 0):
            raise PlanError(f"balanced: mixing is {self.mixing}; it must be 0 (least padding), or 1 or more")
        if self.mix_steps and self.mixing == 0:
            raise PlanError("balanced: mixing 0 (least padding) excludes mix_steps; set mixing to 1 or more")

        def cut(lengths: Lengths, per_step: int, rng: np.random.Generator, least_steps: int = 1) -> Cut:
            if len(lengths) == 0:
                return nothing()
            order = snake(lengths, budget, max(1.0, self.mixing), rng)
            frames, tokens = lengths.frames[order], lengths.tokens[order]
            spare = SPARE if self.mixing == 0 else 1.0
            least = least_batches(per_step, least_steps)
            batches = even_batches(frames, tokens, budget, per_step, spare, least, rng if self.mix_steps else None)
            count = len(batches) - 1
            if len(order) <= self.strips_up_to and self.mixing <= 1 and 1 < count < len(order):
                found = strips(lengths.frames, lengths.tokens, budget, count, rng)
                if found and padded_seconds(*found, lengths, budget) < padded_seconds(order, batches, lengths, budget):
                    order, batches = found
                if self.mixing == 1 and len(order) < FEW_TOGETHER * count:
                    order = exchanged(order, batches, lengths.frames, lengths.tokens, budget, rng)
                frames, tokens = lengths.frames[order], lengths.tokens[order]
            if self.mixing == 0 and len(order) >= self.worth_a_search * count:
                moved, batches = recut(batches, frames, tokens, budget, rng)
                order, frames, tokens = order[moved], frames[moved], tokens[moved]
            return deal(order, batches, frames, tokens, budget, per_step, rng)

        return cut


@dataclass(frozen=True, slots=True)
class FirstBalanced(Balanced):
    """Balanced as Canter 0.1 had it, for the runs that it began: small windows are cut from a snake too."""

    strips_up_to: ClassVar[int] = 0
    worth_a_search: ClassVar[int] = 0


def padded_seconds(order: np.ndarray, batches: np.ndarray, lengths: Lengths, budget: Budget) -> float:
    """Return the seconds of all batches, fixed ones left out."""
    frames, tokens = maxima(lengths.frames[order], batches), maxima(lengths.tokens[order], batches)
    return float((np.diff(batches) * budget.time(frames, tokens)).sum())


def snake(lengths: Lengths, budget: Budget, parts: float, rng: np.random.Generator) -> np.ndarray:
    """(n,) positions such that neighbours are alike; `parts` turns through the whole range of lengths."""
    by_frames = np.argsort(narrow(lengths.frames), kind="stable")
    frames, tokens = lengths.frames[by_frames], lengths.tokens[by_frames]
    strata = Strata.of(frames, tokens, budget)
    # few utterances have many tokens for their length: they are sparse, and strips that suit the many would pad
    # them badly, so they go a way of their own, from the short to the long, and the rest goes back. To end among
    # the short is best: there batches are large and come out even
    tail = tokens > np.repeat(strata.mean_tokens + TAIL * strata.deviation, strata.count)
    if (tail / np.repeat(strata.size, strata.count)).sum() < TAIL_BATCHES * parts:
        tail[:] = False
    strip = np.empty(len(frames), np.int64)
    first = 0
    for inside, backwards in ((np.flatnonzero(tail), False), (np.flatnonzero(~tail), True)):
        if len(inside) == 0:
            continue
        here = Strata.of(frames[inside], tokens[inside], budget)
        width = np.maximum(here.strip_width(budget) / math.sqrt(parts), here.size)  # a part is less dense
        # a random phase, so that the edges of strips (and with them who meets whom) move from window to window
        number = np.cumsum(np.repeat(1.0 / (width * parts), here.count)) + rng.random()
        number = number.astype(np.int64)
        strip[inside] = first + (int(number[-1]) - number if backwards else number)
        first += int(number[-1]) + 1
    if parts > 1:  # the window is in shuffled order: any stretch of it is a random part
        strip += (by_frames * (parts / len(frames))).astype(np.int64) * first
    span = int(tokens.max()) + 1
    key = strip * span + np.where(strip & 1, span - 1 - tokens, tokens)
    return by_frames[np.argsort(narrow(key), kind="stable")]


def narrow(keys: np.ndarray) -> np.ndarray:
    """The same keys in the smallest unsigned type: sorting is several times faster on it."""
    return keys.astype(np.min_scalar_type(int(keys.max()) if len(keys) else 0))


@dataclass(frozen=True, slots=True)
class Strata:
    """What utterances are like around each quantile of frames; arrays (groups,)."""

    count: np.ndarray
    mean_frames: np.ndarray
    mean_tokens: np.ndarray
    deviation: np.ndarray  # of tokens
    density: np.ndarray  # utterances per frame
    size: np.ndarray  # utterances in a full batch

    @classmethod
    def of(cls, frames: np.ndarray, tokens: np.ndarray, budget: Budget) -> Strata:
        """Of a sequence sorted by frames."""
        n = len(frames)
        groups = max(1, min(GROUPS, n // 64))
        edges = np.linspace(0, n, groups + 1).astype(np.int64)
        count = np.diff(edges)
        t = np.add.reduceat(frames, edges[:-1]) / count
        u = np.add.reduceat(tokens, edges[:-1]) / count
        variance = np.add.reduceat(tokens * tokens, edges[:-1]) / count - u * u
        density = count / (frames[edges[1:] - 1] - frames[edges[:-1]] + 1)
        size = (budget.limit_bytes - budget.fixed_bytes) / budget.memory(t, u)
        return cls(count, t, u, np.sqrt(np.maximum(variance, 0)), density, size)

    def strip_width(self, budget: Budget) -> np.ndarray:
        """Utterances per strip that make padding least.

        A strip of k batches of B utterances spans kB / density frames, of which half is padded on average; its
        tokens, sorted and cut in k, are padded by about a spread of 4 standard deviations / 2k. The sum of the two,
        each weighted with what a frame or a token costs, is least at
        k^2 = token cost x spread x density / (frame cost x B).
        """
        t, u = self.mean_frames, self.mean_tokens
        per_frame = budget.time(t + 1, u) - budget.time(t, u)
        per_token = budget.time(t, u + 1) - budget.time(t, u)
        spread = 4 * self.deviation + 1
        return np.sqrt(per_token * spread * self.density * self.size / np.maximum(per_frame, 1e-30))


def even_batches(
    frames: np.ndarray,
    tokens: np.ndarray,
    budget: Budget,
    multiple: int,
    spare: float = 1.0,
    least: int = 1,
    mix: np.random.Generator | None = None,
) -> np.ndarray:
    """Return offsets of batches of about equal memory over a sequence of alike neighbours.

    Their number is a multiple of M, or `least` where fewer would do.

    No batch is over the budget. Where there are fewer utterances than batches, each is a batch. spare: how many times
    the batches that are needed there are to be. least: least number of batches. mix: shrink some batches so that steps
    can be mixed in length.
    """
    n = len(frames)
    done = np.concatenate([[0.0], np.cumsum(batch_share(frames, tokens, budget))])
    if mix is not None and done[-1] > multiple:
        sizes = mixed_sizes(frames, tokens, budget, done, multiple, least, mix)
    else:
        sizes = np.ones(max(least, max(1, math.ceil((spare * done[-1] - 0.25) / multiple)) * multiple))
    while len(sizes) < n:
        batches = fill(frames, tokens, budget, done, sizes)
        if batches is not None:
            return batches
        count = (len(sizes) // multiple + max(1, len(sizes) // (RETRY * multiple))) * multiple
        sizes = np.concatenate([sizes, np.full(count - len(sizes), sizes.mean())])
    return np.arange(n + 1)


def batch_share(frames: np.ndarray, tokens: np.ndarray, budget: Budget) -> np.ndarray:
    """(n,) what part of a batch cut about here each utterance takes: padded as there, and with its share of the half
    utterance that on average no longer fits."""
    room = budget.limit_bytes - budget.fixed_bytes
    work = budget.memory(frames, tokens).astype(np.float64)
    for _ in range(2):
        done = np.cumsum(work)
        count = max(1, math.ceil(done[-1] / room))
        cuts = np.searchsorted(done, done[-1] * np.arange(1, count) / count)
        batches = np.unique(np.concatenate([[0], cuts, [len(frames)]]))
        padded = budget.memory(maxima(frames, batches), maxima(tokens, batches)).astype(np.float64)
        work = np.repeat(padded, np.diff(batches))
    return np.repeat(padded / room * (1 + 0.5 * padded / room), np.diff(batches))


def fill(
    frames: np.ndarray, tokens: np.ndarray, budget: Budget, done: np.ndarray, sizes: np.ndarray
) -> np.ndarray | None:
    """Return offsets of as many batches as there are sizes, each of its part of what is left; None if they do not fit.

    done: (n + 1,) full batches before each utterance. sizes: (count,) relative to each other.
    """
    room, cost = budget.limit_bytes - budget.fixed_bytes, budget.memory
    longest = np.maximum.reduce
    n, offsets, start, size = len(frames), [0], 0, 1
    prefix, total = done.data, float(done[-1])
    a, b, c, d, e = cost.T, cost.TT, cost.U, cost.TU, cost.UU
    to_come = np.cumsum(sizes[::-1])[::-1]
    for left, part, rest in zip(range(len(sizes), 0, -1), sizes.tolist(), to_come.tolist()):
        # a little more than its part, so that where the estimate is too low the last do not overflow
        share = (1.002 + 0.1 / left) * (total - prefix[start]) * part / rest
        limit = room * (min(1.0, share) if left > 1 else 1.0)
        most = n - start - (left - 1)  # leave one utterance for each batch to come
        if most < 1:
            return None
        # the largest size whose padded memory stays within the limit: sizes up to `fits` do, `over` does not
        fits, over = 0, most + 1
        size = min(size, most)
        while True:
            t, u = int(longest(frames[start : start + size])), int(longest(tokens[start : start + size]))
            can = limit / (t * (a + b * t + d * u) + u * (c + e * u))
            if can >= size:
                fits = size
                if can < size + 1:  # one more would be over even at these maxima
                    break
                size = int(min(can, over - 1))
            else:
                over = size
                size = max(int(can), fits + 1)
            if over - fits <= 1:
                break
        size = max(1, fits)
        start += size
        offsets.append(start)
    return np.array(offsets, np.int64) if start == n else None


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
    by_time = np.roll(by_time, -(count - steps * per_step))  # the quickest are left for a last step that is not whole
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
        table = chosen[: steps * per_step].reshape(steps, per_step)
        size = np.diff(batches)[table].sum(axis=1)
        total = np.add.reduceat(frames, batches[:-1])[table].sum(axis=1)
        table = table[without_drift(total, size, rng)]
        chosen[: steps * per_step] = table.ravel()
    return reorder(order, batches, chosen, in_steps(count, per_step))


def without_drift(total: np.ndarray, size: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(S,) a sequence of steps in which every stretch has its share of long and short ones.

    total, size: (S,) frames and utterances of each step. A low-discrepancy sequence over the steps' mean length, by
    the golden ratio. Where there are few steps, it is that of some random starts in which the steps so far, and next
    to that their utterances, are never far from the mean.
    """
    mean = total / size
    by_length = np.argsort(mean, kind="stable")
    starts = rng.random((max(1, min(STARTS, 4096 // len(mean))), 1))
    sequences = by_length[np.argsort((np.arange(len(mean)) * GOLDEN + starts) % 1.0, axis=1)]
    if len(sequences) == 1:
        return sequences[0]
    excess = total - size * (total.sum() / size.sum())
    tips = [
        np.cumsum(values[sequences], axis=1) / max(float(values.std()), 1e-9) for values in (mean - mean.mean(), excess)
    ]
    return sequences[np.argmin((tips[0] ** 2 + 0.1 * tips[1] ** 2).sum(axis=1))]
