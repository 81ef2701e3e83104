"""The rows of each window: a shuffle of any size that is never materialised.

A window depends only on (index, seed, epoch, window size). Rows are shuffled by a keyed bijection, so the rows of a
window are computed from their positions, in an index of any size. Every source is spread evenly over the windows of an
epoch. In an endless stream each window draws from a source by its weight, and draws every row of a source once before
it draws one again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from canter.errors import PlanError
from canter.planning.lengths import Index

ROUNDS = 4
BLOCKS = 256  # minimum number in a window of each source that is read in runs
FEWEST_BLOCKS = 4  # the same where the block is given


def mix(*parts: int) -> int:
    """Return a hash of integers with 64 bits (splitmix64's finaliser, chained)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state + (part & 0xFFFFFFFFFFFFFFFF) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


def _hash32(values: np.ndarray, key: int) -> np.ndarray:
    """Return Murmur3's 32-bit finaliser of uint32 values and a key."""
    h = values ^ np.uint32(key)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h


def shuffled(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """Return the images of `positions` (int64) under a keyed bijection of range(count).

    It is a Feistel network over a near-square grid of height x width >= count (Black & Rogaway 2002, generalised
    Feistel), repeated for the few positions that leave the range.
    """
    if count < 2:
        return positions.copy()
    height = math.isqrt(count - 1) + 1
    width = -(-count // height)
    keys = [mix(key, number) & 0xFFFFFFFF for number in range(ROUNDS)]

    def walk(values: np.ndarray) -> np.ndarray:
        x, y = (part.astype(np.uint32) for part in np.divmod(values, width))
        for number in range(0, ROUNDS, 2):
            # reduce the hash before adding: a sum of 32 bits must not wrap
            x = (x + _hash32(y, keys[number]) % np.uint32(height)) % np.uint32(height)
            y = (y + _hash32(x, keys[number + 1]) % np.uint32(width)) % np.uint32(width)
        return x.astype(np.int64) * width + y

    result = walk(positions)
    outside = np.flatnonzero(result >= count)
    while len(outside):
        result[outside] = walk(result[outside])
        outside = outside[result[outside] >= count]
    return result


@dataclass(frozen=True)
class Windows:
    """The windows of an epoch, or of an endless weighted stream.

    size: number of utterances in a window. The windows of an epoch are made equal, and may differ from it by up to a
        half.
    block: maximum number of neighbouring rows that are drawn together, so that archives are read in runs. None: the
        rows of a shard where a source has several shards or is a tar, but few enough that a window has 256 blocks of
        it; 1 for files that can be opened in any order. The windows of an epoch hold complete blocks (the last one
        takes the remainder); an endless stream keeps its mixture exact and may continue a block in the next window. A
        block may extend over the end of a shard.
    """

    index: Index
    seed: int
    epoch: int
    size: int
    endless: bool = False
    block: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or (self.block is not None and self.block < 1):
            raise PlanError(f"window is {self.size} and block {self.block}; both must be at least 1")
        if len(self.index) == 0:
            raise PlanError("the index is empty: there is nothing to plan")
        if self.endless and not self._weights.sum() > 0:
            raise PlanError("every source has weight 0; give at least one a positive weight")

    @cached_property
    def count(self) -> int | None:
        """Number of windows in the epoch; None for an endless stream."""
        return None if self.endless else max(1, round(len(self.index) / self.size))

    @cached_property
    def _runs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(first row, rows of the source before it and the total) of each run of neighbouring rows, for each source."""
        sources = max(1, len(list(self.index.sources)))
        if sources == 1:
            return [(np.zeros(1, np.int64), np.array([0, len(self.index)]))]
        shards = getattr(self.index, "shards", ())
        if shards:  # no need to read the rows
            first, stop, owner = np.array([(s.start, s.stop, s.source) for s in shards], np.int64).T
        else:
            source_of = np.asarray(self.index.source_of)
            first = np.concatenate([[0], np.flatnonzero(source_of[1:] != source_of[:-1]) + 1])
            stop, owner = np.append(first[1:], len(source_of)), source_of[first]
        runs = []
        for source in range(sources):
            mine = np.flatnonzero((owner == source) & (stop > first))
            runs.append((first[mine], np.concatenate([[0], np.cumsum(stop[mine] - first[mine])])))
        return runs

    @cached_property
    def _sizes(self) -> list[int]:
        return [int(before[-1]) for _, before in self._runs]

    @cached_property
    def _weights(self) -> np.ndarray:
        weights = [getattr(source, "weight", None) for source in self.index.sources] or [None]
        values = np.array([n if w is None else w for w, n in zip(weights, self._sizes)], np.float64)
        for source, value in enumerate(values):
            if not math.isfinite(value) or value < 0:
                raise PlanError(f"source {source}: weight is {value}; it must be zero or more")
        return values * (np.array(self._sizes) > 0)

    @cached_property
    def blocks(self) -> list[int]:
        """Number of rows of each source that stay neighbours in the shuffle."""
        shares = self._weights / self._weights.sum() if self.endless else None
        natural = [1] * len(self._sizes) if self.block is None else [self.block] * len(self._sizes)
        if self.block is None:
            for source, shards in self._shards.items():
                given = getattr(list(self.index.sources)[source], "audio", "")
                if len(shards) > 1 or given or shards[0].origin.endswith(".tar"):
                    natural[source] = int(np.median([shard.stop - shard.start for shard in shards]))
        least = BLOCKS if self.block is None else FEWEST_BLOCKS
        drawn = [
            size / (self.count or 1) if shares is None else self.size * shares[source]
            for source, size in enumerate(self._sizes)
        ]
        return [max(1, min(rows, int(n / least))) for rows, n in zip(natural, drawn)]

    @cached_property
    def _shards(self) -> dict[int, list[Any]]:
        """The shards with audio of each source."""
        found: dict[int, list[Any]] = {}
        for shard in getattr(self.index, "shards", ()):
            if shard.path:
                found.setdefault(shard.source, []).append(shard)
        return found

    def rows(self, window: int) -> np.ndarray:
        """Return the rows of a window in random order, int64."""
        if window < 0 or (self.count is not None and window >= self.count):
            raise PlanError(f"window {window} is outside the epoch's {self.count}")
        parts = []
        shares = self._weights / self._weights.sum() if self.endless else None
        for source, size in enumerate(self._sizes):
            if shares is not None:
                first, last = (math.floor(w * self.size * shares[source]) for w in (window, window + 1))
            else:
                first, last = (self._before(source, w) for w in (window, window + 1))
            while first < last:  # an endless stream may reach the end of a pass inside a window
                turn = first // size
                stop = min(last, (turn + 1) * size)
                local = self._order(np.arange(first - turn * size, stop - turn * size), source, size, turn)
                starts, before = self._runs[source]
                run = np.searchsorted(before, local, side="right") - 1 if len(starts) > 1 else 0
                parts.append(local + (starts[run] - before[run]))
                first = stop
        if len(parts) == 1 and max(self.blocks) == 1:
            return parts[0]
        rows = np.concatenate([np.empty(0, np.int64), *parts])
        return rows[shuffled(np.arange(len(rows)), len(rows), mix(self.seed, self.epoch, window, len(parts)))]

    def _before(self, source: int, window: int) -> int:
        """Return the number of rows of a source before a window of an epoch, in complete blocks."""
        count, block = self.count or 1, self.blocks[source]
        size = self._sizes[source]
        return size if window == count else window * (size // block) // count * block

    def _order(self, positions: np.ndarray, source: int, size: int, turn: int) -> np.ndarray:
        key, block = mix(self.seed, self.epoch, source, turn), self.blocks[source]
        if block == 1:
            return shuffled(positions, size, key)
        blocks = size // block
        complete = positions < blocks * block  # the remainder, less than a block, stays at the end
        moved = positions.copy()
        inside = positions[complete]
        moved[complete] = shuffled(inside // block, blocks, key) * block + inside % block
        return moved
