"""The default strategy: batches of similar utterances that fill the budget, steps equal in time and mixed in length.

1. The snake: a window is sorted into strips of T, the utterances of a strip by U, ascending in one strip and descending
   in the next, so that neighbours in the sequence are similar. The width of strips is such that both kinds of padding
   cost the same. Small windows also try strips that hold complete batches (`strips`).
2. Even batches: the sequence is divided into a multiple of M batches of equal memory. With `mix_steps` some of them are
   smaller, so that batches of short and of long utterances take equally long.
3. Exchange: where batches are small, similar batches exchange utterances at random, so that an utterance meets others
   in every epoch.
4. Steps: batches of the same predicted time share a step, those of different length where there is a choice.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from canter.errors import PlanError
from canter.planning.budget import Budget
from canter.planning.lengths import Index, Lengths
from canter.planning.strategies.base import Cut, Cutter, Strategy, in_steps, least_batches, maxima, nothing, reorder
from canter.planning.strategies.strips import strips

GROUPS = 64  # quantiles of T at which the width of strips is computed
TIME_CLASS = 1.008  # batches whose times differ by at most this factor may change places between steps
SMALL = 8192  # maximum utterances of a window for which `strips` is tried and batches exchange utterances
FEW_TOGETHER = 16  # utterances in a batch, on average, below which batches exchange some
RETRY = 256  # batches to which one is added where they did not fit, and M at least
TAIL = 1.65  # standard deviations of tokens above the mean from which utterances are sparse
TAIL_BATCHES = 10  # that sparse utterances must fill to get strips of their own
STARTS = 64  # of the sequence of steps, among which the best is taken
EXCHANGES = 2  # the first pairs batches by frames, the second by tokens
TOLERANCE = 0.02  # fraction of time that an exchange may cost
HALVINGS = 40
# their multiples modulo 1 spread evenly over [0, 1)
GOLDEN, SILVER = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1


@dataclass(frozen=True, slots=True)
class Balanced(Strategy):
    """Batches of similar utterances that fill the budget, in steps that are equal in time and mixed in length.

    mixing: number of random parts of a window that are sorted separately, not necessarily an integer. The mixing pool
        grows with it, padding with its square root. 0 mixes least: as 1, but small batches exchange no utterances.
    mix_steps: make some batches smaller, so that a step holds short and long utterances together (`mixed_sizes`). Fills
        a few per cent less of the memory.
    accumulation: with mix_steps, the number of micro-batches of a step that each rank takes. Above 1, only the sums of
        the ranks must be equal, so batches of different times share a step and none is made smaller.
    """

    mixing: float = 1.0
    mix_steps: bool = False
    accumulation: int = 1
    name: ClassVar[str] = "balanced"
    default_window: ClassVar[int | None] = 50_000
    fills_memory: ClassVar[bool] = True
    strips_up_to: ClassVar[int] = SMALL

    def prepare(self, index: Index, budget: Budget, grid: tuple[int, int] = (1, 1)) -> Cutter:
        if not (self.mixing >= 1 or self.mixing == 0):
            raise PlanError(f"balanced: mixing is {self.mixing}; it must be 0 (least mixing), or 1 or more")
        if self.accumulation < 1:
            raise PlanError(f"balanced: accumulation is {self.accumulation}; it must be at least 1")

        def cut(lengths: Lengths, per_step: int, rng: np.random.Generator, least_steps: int = 1) -> Cut:
            if len(lengths) == 0:
                return nothing()
            together = self.accumulation if self.mix_steps else 1
            if per_step % together:
                raise PlanError(
                    f"balanced: {per_step} micro-batches per step are not a multiple of accumulation ({together})"
                )
            order = snake(lengths, budget, max(1.0, self.mixing), rng)
            frames, tokens = lengths.frames[order], lengths.tokens[order]
            least = least_batches(per_step, least_steps)
            batches = even_batches(
                frames, tokens, budget, per_step, least, rng if self.mix_steps and together == 1 else None
            )
            count = len(batches) - 1
            if len(order) <= self.strips_up_to and self.mixing <= 1 and 1 < count < len(order):
                found = strips(lengths.frames, lengths.tokens, budget, count, rng)
                if found and padded_seconds(*found, lengths, budget) < padded_seconds(order, batches, lengths, budget):
                    order, batches = found
                if self.mixing == 1 and len(order) < FEW_TOGETHER * count:
                    order = exchanged(order, batches, lengths.frames, lengths.tokens, budget, rng)
                frames, tokens = lengths.frames[order], lengths.tokens[order]
            return even_steps(order, batches, frames, tokens, budget, per_step, rng, together)

        return cut


def even_accumulation(micro_batches: int, ranks: int) -> int:
    """Return the number of micro-batches of a step that each rank takes, or 1 if the ranks do not share them evenly."""
    return micro_batches // ranks if micro_batches % ranks == 0 else 1


@dataclass(frozen=True, slots=True)
class FirstBalanced(Balanced):
    """Balanced as in Canter 0.1, for the runs that it began: small windows are divided along a snake too."""

    strips_up_to: ClassVar[int] = 0


def padded_seconds(order: np.ndarray, batches: np.ndarray, lengths: Lengths, budget: Budget) -> float:
    """Return the predicted seconds of all batches without their fixed part."""
    frames, tokens = maxima(lengths.frames[order], batches), maxima(lengths.tokens[order], batches)
    return float((np.diff(batches) * budget.time(frames, tokens)).sum())


def snake(lengths: Lengths, budget: Budget, parts: float, rng: np.random.Generator) -> np.ndarray:
    """Return positions in a sequence of similar neighbours, (n,), which passes `parts` times through all lengths."""
    by_frames = np.argsort(narrow(lengths.frames), kind="stable")
    frames, tokens = lengths.frames[by_frames], lengths.tokens[by_frames]
    strata = Strata.of(frames, tokens, budget)
    # Few utterances have many tokens for their length. They are sparse, and strips for the majority would pad them
    # badly, so they get strips of their own, from short to long; those of the others follow from long to short. To end
    # with the short ones is best: there batches are large and come out even
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
    """Return the keys in the smallest unsigned type, on which sorting is several times faster."""
    return keys.astype(np.min_scalar_type(int(keys.max()) if len(keys) else 0))


@dataclass(frozen=True, slots=True)
class Strata:
    """Statistics of the utterances around each quantile of frames; arrays (groups,)."""

    count: np.ndarray
    mean_frames: np.ndarray
    mean_tokens: np.ndarray
    deviation: np.ndarray  # of tokens
    density: np.ndarray  # utterances per frame
    size: np.ndarray  # utterances in a full batch

    @classmethod
    def of(cls, frames: np.ndarray, tokens: np.ndarray, budget: Budget) -> Strata:
        """Return the statistics of a sequence sorted by frames."""
        n = len(frames)
        groups = max(1, min(GROUPS, n // 64))
        edges = np.linspace(0, n, groups + 1).astype(np.int64)
        count = np.diff(edges)
        t = np.add.reduceat(frames, edges[:-1]) / count
        u = np.add.reduceat(tokens, edges[:-1]) / count
        variance = np.add.reduceat(tokens * tokens, edges[:-1]) / count - u * u
        density = count / (frames[edges[1:] - 1] - frames[edges[:-1]] + 1)
        size = budget.room_bytes / budget.memory(t, u)
        return cls(count, t, u, np.sqrt(np.maximum(variance, 0)), density, size)

    def strip_width(self, budget: Budget) -> np.ndarray:
        """Return the number of utterances in a strip that minimises padding.

        A strip of k batches of B utterances spans kB / density frames, of which half is padded on average; its
        tokens, sorted and divided by k, are padded by about a spread of 4 standard deviations / 2k. The sum of the two,
        each weighted with the cost of a frame or a token, has its minimum at
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
    least: int = 1,
    mix: np.random.Generator | None = None,
) -> np.ndarray:
    """Return offsets of batches of about equal memory over a sequence of similar neighbours.

    Their number is a multiple of M, or `least` where fewer would do. No batch is over the budget. Where there are fewer
    utterances than batches, each is a batch. mix: make some batches smaller, so that steps can mix lengths.
    """
    n = len(frames)
    done = np.concatenate([[0.0], np.cumsum(batch_share(frames, tokens, budget))])
    if mix is not None and done[-1] > multiple:
        sizes = mixed_sizes(frames, tokens, budget, done, multiple, least, mix)
    else:
        sizes = np.ones(max(least, max(1, math.ceil((done[-1] - 0.25) / multiple)) * multiple))
    while len(sizes) < n:
        batches = fill(frames, tokens, budget, done, sizes)
        if batches is not None:
            return batches
        count = (len(sizes) // multiple + max(1, len(sizes) // (RETRY * multiple))) * multiple
        sizes = np.concatenate([sizes, np.full(count - len(sizes), sizes.mean())])
    return np.arange(n + 1)


def mixed_sizes(
    frames: np.ndarray,
    tokens: np.ndarray,
    budget: Budget,
    full: np.ndarray,
    multiple: int,
    least: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return sizes with which a step can hold short and long utterances: fractions of a full batch, (count,).

    Ranks wait for the slowest, so the batches of a step must take equally long. Full batches do not: with most budgets
    one of short utterances takes longer than one of long utterances, and steps of full batches have similar lengths. So
    a batch that would take longer, full, than a fraction F of all is shrunk with probability F^2 to the time of one of
    those below it, drawn uniformly: the rarest lengths, which differ most from the others, spread over the others'
    steps. The longest times are lowered until the expected number of batches fills a multiple of M, or `least`.

    frames, tokens: (n,) of a sequence of similar neighbours. full: (n + 1,) full batches before each utterance.
    """
    n, total = len(frames), float(full[-1])
    edges = np.unique(np.searchsorted(full, np.arange(math.ceil(total) + 1)).clip(0, n))
    edges[-1] = n
    t, u = (np.maximum.reduceat(values, edges[:-1]) for values in (frames, tokens))
    seconds = budget.time(t, u) * budget.room_bytes / budget.memory(t, u)
    ascending = np.sort(seconds)
    below = np.searchsorted(ascending, seconds, side="left")
    chance = (below / len(seconds)) ** 2
    worth = np.diff(full[edges])

    def batches(longest: float) -> float:
        """Return the expected number of batches where none takes longer than `longest`."""
        capped = np.minimum(ascending, longest)
        mean_below = np.concatenate([[capped[0]], np.cumsum(capped) / np.arange(1, len(capped) + 1)])[below]
        mean = (1 - chance) * np.minimum(seconds, longest) + chance * np.minimum(mean_below, seconds)
        return float((worth * seconds / mean).sum())

    high = float(ascending[-1])
    count = max(least, multiple * max(1, math.ceil((batches(high) - 0.25) / multiple)))
    low = 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if batches(middle) > count - 0.25 else (low, middle)

    first, second = rng.random(2)
    begins, sizes, done = full[edges].tolist(), np.empty(count), 0.0
    for number in range(count):
        here = min(max(bisect_right(begins, done) - 1, 0), len(seconds) - 1)
        wanted = min(seconds[here], high)
        if (first + number * GOLDEN) % 1 < chance[here]:
            wanted = min(wanted, ascending[int((second + number * SILVER) % 1 * below[here])])
        sizes[number] = wanted / seconds[here]
        done += sizes[number]
    return sizes


def batch_share(frames: np.ndarray, tokens: np.ndarray, budget: Budget) -> np.ndarray:
    """Return the fraction of a batch that each utterance takes, (n,).

    It includes the padding of a batch at that place and a part of the half utterance that on average no longer fits.
    """
    room = budget.room_bytes
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
    """Return offsets of a batch for each size, each of its fraction of the remaining work; None if they do not fit.

    done: (n + 1,) full batches before each utterance. sizes: (count,) relative to each other.
    """
    room, cost = budget.room_bytes, budget.memory
    longest = np.maximum.reduce
    n, offsets, start, size = len(frames), [0], 0, 1
    prefix, total = done.data, float(done[-1])
    a, b, c, d, e = cost.T, cost.TT, cost.U, cost.TU, cost.UU
    to_come = np.cumsum(sizes[::-1])[::-1]
    for left, part, remainder in zip(range(len(sizes), 0, -1), sizes.tolist(), to_come.tolist()):
        # a little more than its fraction, so that where the estimate is too low the last do not overflow
        share = (1.002 + 0.1 / left) * (total - prefix[start]) * part / remainder
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


def exchanged(
    order: np.ndarray,
    batches: np.ndarray,
    frames: np.ndarray,
    tokens: np.ndarray,
    budget: Budget,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return `order` with utterances exchanged at random between similar batches, which keep their sizes.

    The best batches of a small set are nearly the same in each epoch: of 3 h in 400 batches half of the pairs meet
    again, and a third of the batches are identical. So the utterances of two batches of neighbouring lengths are
    redistributed at random where that costs at most `TOLERANCE` more time and both batches still fit the memory.

    order: (n,) positions. batches: (count + 1,) offsets in it. frames, tokens: (n,) by position.
    """
    members = np.split(order, batches[1:-1])
    room = budget.room_bytes

    def bounds(rows: np.ndarray) -> tuple[int, int]:
        return int(frames[rows].max()), int(tokens[rows].max())

    found = [bounds(rows) for rows in members]
    for turn in range(EXCHANGES):
        by_length = sorted(range(len(members)), key=lambda b: found[b][:: -1 if turn % 2 else 1])
        first = int(rng.integers(0, 2))
        for one, other in zip(by_length[first::2], by_length[first + 1 :: 2]):
            size, others = len(members[one]), len(members[other])
            together = rng.permutation(np.concatenate([members[one], members[other]]))
            dealt = together[:size], together[size:]
            now = bounds(dealt[0]), bounds(dealt[1])
            if max(size * budget.memory(*now[0]), others * budget.memory(*now[1])) > room:
                continue
            before = size * budget.time(*found[one]) + others * budget.time(*found[other])
            if size * budget.time(*now[0]) + others * budget.time(*now[1]) > (1 + TOLERANCE) * before:
                continue
            (members[one], members[other]), (found[one], found[other]) = dealt, now
    return np.concatenate(members)


def even_steps(
    order: np.ndarray,
    batches: np.ndarray,
    frames: np.ndarray,
    tokens: np.ndarray,
    budget: Budget,
    per_step: int,
    rng: np.random.Generator,
    together: int = 1,
) -> Cut:
    """Return steps of M batches equal in predicted time and mixed in length, in a sequence without drift.

    together: number of batches that one rank takes of a step, whose sums are equal instead.
    """
    count = len(batches) - 1
    longest = maxima(frames, batches)
    seconds = budget.step_seconds(np.diff(batches), longest, maxima(tokens, batches))
    steps, ranks = count // per_step, per_step // together
    by_time = np.argsort(seconds, kind="stable")
    quickest, by_time = np.split(by_time, [count - steps * per_step])  # these make an incomplete last step
    parts = folded(by_time, together)  # what one rank takes of a step
    time, length = seconds[parts].sum(axis=1), longest[parts].sum(axis=1)
    parts = parts[in_order := np.argsort(time, kind="stable")]
    time, length = time[in_order], length[in_order]
    begin = 0
    while begin < steps:  # classes of steps within which parts may change places
        reach = int(np.searchsorted(time, time[begin * ranks] * TIME_CLASS, side="right")) // ranks
        end = min(max(begin + 1, reach), steps)
        inside = slice(begin * ranks, end * ranks)
        by_length = parts[inside][np.argsort(length[inside], kind="stable")]
        parts[inside] = by_length.reshape(ranks, end - begin, together).swapaxes(0, 1).reshape(-1, together)
        begin = end
    table = parts.reshape(steps, per_step)
    if steps:
        size = np.diff(batches)[table].sum(axis=1)
        total = np.add.reduceat(frames, batches[:-1])[table].sum(axis=1)
        table = table[without_drift(total, size, rng)]
    return reorder(order, batches, np.concatenate([table.ravel(), quickest]), in_steps(count, per_step))


def folded(by_time: np.ndarray, together: int) -> np.ndarray:
    """Return groups of batches whose times add up to similar sums, (n / together, together).

    by_time: (n,) batches from quick to slow. The slowest of a group's first half comes with the quickest of its second:
    the sequence is folded like a letter.
    """
    layers = by_time.reshape(together, -1)
    return np.stack([layer[::-1] if number % 2 else layer for number, layer in enumerate(layers)], axis=1)


def without_drift(total: np.ndarray, size: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a sequence of steps, (S,), in which the mean length of consecutive steps is near that of the epoch.

    total, size: (S,) frames and utterances of each step. It is a low-discrepancy sequence over the steps' mean length,
    by the golden ratio. Where there are few steps, it is the best of some random starts: the one in which the running
    mean over steps, and with less weight that over utterances, stays nearest to the mean.
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
