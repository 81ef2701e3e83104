"""Lengths of utterances in the units the budget counts, and the two small interfaces around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from canter.planning.budget import Budget


class Index(Protocol):
    """What planning needs of a length index; `canter.corpus.index.LengthIndex` is one."""

    @property
    def seconds(self) -> np.ndarray:
        """(N,) float32, seconds of audio."""
        ...

    @property
    def tokens(self) -> np.ndarray:
        """(N,) integers, target tokens with prompt and end token."""
        ...

    @property
    def source_of(self) -> np.ndarray:
        """(N,) integers, the row's source."""
        ...

    @property
    def sources(self) -> Any:
        """Sources in order, each with a `weight`."""
        ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of n utterances. frames and tokens are rounded up to the grid, if there is one."""

    seconds: np.ndarray  # (n,) float, s
    frames: np.ndarray  # (n,) int64, T
    tokens: np.ndarray  # (n,) int64, U

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, rows: np.ndarray) -> Lengths:
        return Lengths(self.seconds[rows], self.frames[rows], self.tokens[rows])

    @classmethod
    def of(
        cls, index: Index, rows: np.ndarray | slice, budget: Budget, grid: tuple[int, int] = (1, 1)
    ) -> Lengths:
        """Of some rows of an index; `grid` rounds T and U up to multiples."""
        seconds = np.asarray(index.seconds[rows])
        tokens = np.asarray(index.tokens[rows]).astype(np.int64)
        with np.errstate(invalid="ignore"):
            frames = budget.frames(seconds)
        if grid[0] > 1:
            frames = -(-frames // grid[0]) * grid[0]
        if grid[1] > 1:
            tokens = -(-tokens // grid[1]) * grid[1]
        return cls(seconds, frames, tokens)


def sample(index: Index, budget: Budget, grid: tuple[int, int] = (1, 1), most: int = 200_000) -> Lengths:
    """Usable rows of an index at a regular stride, at most about `most`: what bins are estimated from."""
    lengths = Lengths.of(index, slice(None, None, max(1, len(index) // most)), budget, grid)
    return lengths.take(np.flatnonzero(exclusions(lengths, budget, None) == 0))


REASONS = ("usable", "no duration", "over the budget by itself", "over the tokens-per-second bound")


def exclusions(lengths: Lengths, budget: Budget, max_tokens_per_second: float | None) -> np.ndarray:
    """(n,) int8, for each utterance an index into REASONS; 0 where it can be used."""
    reason = np.zeros(len(lengths), np.int8)
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(lengths.seconds) & (lengths.seconds > 0) & (lengths.tokens >= 0)
        if max_tokens_per_second is not None:
            reason[lengths.tokens > lengths.seconds * max_tokens_per_second] = 3
    reason[budget.bytes(1, lengths.frames, lengths.tokens) > budget.limit_bytes] = 2
    reason[~usable] = 1
    return reason
