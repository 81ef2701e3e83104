"""Batches of a small window with nearly the least padding for their number: strips of T, each divided by U.

Where a window has few batches, or small ones, most of a snake's padding is in the batches at its turns. Here every
strip holds complete batches. The utterances are sorted by T, and dynamic programming chooses the strips, and the number
of batches of each, that minimise the sum over batches of

    padded seconds / mean + EVEN * (padded seconds / mean)^2 + price of a batch

The second term keeps batches even. The price is adjusted until the number of batches is the wanted one. The edges at
which strips may end are moved at random for every window, so that an utterance meets others in every epoch.

It batches about ten thousand utterances a second, a snake millions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from canter.planning.budget import Budget

FINE = 4  # possible edges of strips in the length of a mean batch
FINEST = 8  # the same in a window of at most FEW utterances
FEW = 2048
WIDEST = 6  # maximum number of mean batches in a strip
UNEVEN = 1.7  # maximum ratio between a strip's batches and those that its utterances make on average, either way
EVEN = 0.02
PRICES = 10  # number of prices to try


def strips(
    frames: np.ndarray, tokens: np.ndarray, budget: Budget, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return an order (n,) and the offsets of `count` batches in it, none over the budget; None if none was found."""
    by_frames = np.argsort(frames, kind="stable")
    table = StripTable.of(frames[by_frames], tokens[by_frames], budget, count, rng)
    low, high, price, found = 0.0, math.inf, 0.1, None
    for _ in range(PRICES):
        tried = table.cheapest(price)
        if tried is None:
            return None
        batches = sum(pieces for _, _, pieces in tried)
        if batches > count:
            low = price
        else:
            high, found = price, tried
            if batches >= count - max(1, count // 64):
                break
        price = 4 * price if high == math.inf else price / 4 if low == 0 else math.sqrt(low * high)
    if found is None:
        return None
    members = []
    for begin, end, pieces in found:
        inside = by_frames[begin:end]
        inside = inside[np.argsort(tokens[inside], kind="stable")]
        members += np.split(inside, len(inside) * np.arange(1, pieces) // pieces)
    members = halved(members, count, frames, tokens, budget)
    return np.concatenate(members), np.concatenate([[0], np.cumsum([len(rows) for rows in members])])


def halved(
    members: list[np.ndarray], count: int, frames: np.ndarray, tokens: np.ndarray, budget: Budget
) -> list[np.ndarray]:
    """Return `count` batches: the slowest are halved, by frames or by tokens, whichever pads less."""

    def seconds(rows: np.ndarray) -> float:
        return float(len(rows) * budget.time(frames[rows].max(), tokens[rows].max()))

    members = list(members)
    spent = [seconds(rows) for rows in members]
    while len(members) < count:
        slowest = max(range(len(members)), key=lambda b: (len(members[b]) > 1, spent[b]))
        rows, ways = members[slowest], []
        for lengths in (frames, tokens):
            halves = np.split(rows[np.argsort(lengths[rows], kind="stable")], [len(rows) // 2])
            ways.append(([seconds(half) for half in halves], halves))
        spent[slowest : slowest + 1], members[slowest : slowest + 1] = min(ways, key=lambda way: sum(way[0]))
    return members


@dataclass(frozen=True, slots=True)
class StripTable:
    """Every possible strip, and its cost if it is divided into 1, 2, ... batches.

    edges: (P + 1,) positions in the sequence sorted by frames at which a strip may end. costs: (P + 1, R, K) of the
    strip that ends at an edge, extends back over r + 1 edges, and is divided into pieces[r, k] batches.
    """

    edges: np.ndarray
    costs: np.ndarray
    pieces: np.ndarray

    @classmethod
    def of(
        cls, frames: np.ndarray, tokens: np.ndarray, budget: Budget, count: int, rng: np.random.Generator
    ) -> StripTable:
        """Return the table of a sequence sorted by frames for about `count` batches."""
        n = len(frames)
        mean = n / count
        unit = max(1, round(mean / (FINEST if n <= FEW else FINE)))
        front = int(rng.integers(0, unit))  # empty places before the first utterance shift all edges
        units = -(-(front + n) // unit)
        padded = np.concatenate([np.full(front, -1), tokens, np.full(units * unit - front - n, -1)])
        edges = np.clip(np.arange(units + 1) * unit - front, 0, n)
        room = budget.room_bytes
        typical = float(budget.time(frames, tokens).sum()) / count
        reaches = min(units, max(1, round(WIDEST * mean / unit)))
        sizes = unit * np.arange(1, reaches + 1)
        fewest = np.maximum(1, (sizes / mean / UNEVEN).astype(np.int64))
        most = np.clip(np.ceil(sizes / mean * UNEVEN).astype(np.int64), fewest, np.maximum(sizes, fewest))
        pieces = fewest[:, None] + np.arange(int((most - fewest).max()) + 1)
        costs = np.full((units + 1, *pieces.shape), np.inf)
        for reach, (size, low, high) in enumerate(zip(sizes.tolist(), fewest, most), start=1):
            inside = np.sort(np.lib.stride_tricks.sliding_window_view(padded, size)[::unit], axis=1)
            real = edges[reach:] - edges[:-reach]
            ways = np.arange(low, high + 1)
            first = np.concatenate([[0], np.cumsum(ways)[:-1]])
            of = np.repeat(ways, ways)  # one row for each batch of each way
            part = (np.arange(len(of)) - np.repeat(first, ways))[:, None]
            begins, ends = (real * at // of[:, None] for at in (part, part + 1))
            t, u = frames[edges[reach:] - 1], inside[np.arange(len(real)), size - real + ends - 1]
            share = (ends - begins) * (budget.time(t, u) / typical)
            cost = share * (1 + EVEN * share)
            cost[(begins == ends) | ((ends - begins) * budget.memory(t, u) > room)] = np.inf
            costs[reach:, reach - 1, : len(ways)] = np.add.reduceat(cost, first, axis=0).T
        return cls(edges, costs, pieces)

    def cheapest(self, price: float) -> list[tuple[int, int, int]] | None:
        """Return (first position, end, batches) of the cheapest strips; None where no division fits."""
        units, reaches = len(self.edges) - 1, len(self.pieces)
        total = self.costs + price * self.pieces
        way = total.argmin(axis=2)
        strip = np.take_along_axis(total, way[..., None], axis=2)[..., 0]
        # least[units - e] is the least cost of all before edge e, so that a slice runs back from it
        least = np.full(units + 1 + reaches, np.inf)
        least[units] = 0.0
        last = np.zeros(units + 1, np.int64)
        for end in range(1, units + 1):
            ways = strip[end] + least[units - end + 1 : units - end + 1 + reaches]
            last[end] = best = int(ways.argmin())
            least[units - end] = ways[best]
        if not math.isfinite(least[0]):
            return None
        found, end = [], units
        while end:
            reach = int(last[end])
            begin = end - reach - 1
            found.append((int(self.edges[begin]), int(self.edges[end]), int(self.pieces[reach, way[end, reach]])))
            end = begin
        return found[::-1]
