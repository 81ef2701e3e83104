"""Lengths of utterances in the units of the budget, and the limits by which utterances are left out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from canter.errors import PlanError
from canter.planning.budget import Budget

# one limit, or (duration in seconds, limit) pairs in ascending order of duration
RateLimits: TypeAlias = float | tuple[tuple[float, float], ...] | None
# as a user gives them: "auto" stands for the limits of `canter.planning.bins.outlier_limits`
GivenLimits: TypeAlias = RateLimits | Literal["auto"]


class Index(Protocol):
    """The part of a length index that planning needs; `canter.corpus.index.LengthIndex` has it."""

    @property
    def seconds(self) -> np.ndarray:
        """Seconds of audio, (N,) float32."""
        ...

    @property
    def tokens(self) -> np.ndarray:
        """Target tokens with prompt and end token, (N,) integers."""
        ...

    @property
    def source_of(self) -> np.ndarray:
        """The row's source, (N,) integers."""
        ...

    @property
    def sources(self) -> Sequence[object]:
        """Sources in order; those with a `weight` are drawn by it in an endless stream."""
        ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...


@runtime_checkable
class PerEpoch(Protocol):
    """An index whose lengths differ between epochs, as with speed perturbation."""

    def at_epoch(self, epoch: int) -> Index: ...


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of n utterances, with frames and tokens rounded up to the grid if there is one."""

    seconds: np.ndarray  # (n,) float, s
    frames: np.ndarray  # (n,) int64, T
    tokens: np.ndarray  # (n,) int64, U

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, rows: np.ndarray) -> Lengths:
        return Lengths(self.seconds[rows], self.frames[rows], self.tokens[rows])

    @classmethod
    def of(cls, index: Index, rows: np.ndarray | slice, budget: Budget, grid: tuple[int, int] = (1, 1)) -> Lengths:
        """Return the lengths of rows of an index; `grid` rounds T and U up to multiples."""
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
    """Return usable rows of an index at a regular stride, about `most` at most, from which bins are estimated."""
    lengths = Lengths.of(index, slice(None, None, max(1, len(index) // most)), budget, grid)
    return lengths.take(np.flatnonzero(exclusions(lengths, budget, None) == 0))


OVER_RATE = "over the tokens-per-second bound"
REASONS = (
    "usable",
    "no duration",
    "over the budget by itself",
    OVER_RATE,
    "longer than the model takes",
    "more tokens than the model has positions for",
)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The longest utterance that a model takes; ``tokens`` with prompt and end token."""

    seconds: float = math.inf
    tokens: float = math.inf

    def exceeded(self, index: Index, slowest: float = 1.0) -> bool:
        """Return whether any utterance of the index is longer, spoken at its ``slowest`` speed."""
        if not len(index):
            return False
        return float(np.max(index.seconds)) / slowest > self.seconds or int(np.max(index.tokens)) > self.tokens


def rate_limits(value: float | str | Sequence[str | float | Sequence[float]] | None) -> GivenLimits:
    """Check and normalise limits in tokens per second.

    value: one limit, (duration, limit) pairs in any order, or text such as "25" and "10:30 20:25 40:20", or its words;
    "auto" stays. Raises PlanError naming the invalid value.
    """
    if value in ("auto", ["auto"], ("auto",)):
        return "auto"
    if value is None or isinstance(value, int | float):
        limits = [] if value is None else [(math.inf, float(value))]
    else:
        words = value.replace(",", " ").split() if isinstance(value, str) else list(value)
        limits = [_rate_limit(word, single=len(words) == 1) for word in words]
    for duration, limit in limits:
        if not (duration > 0 and limit > 0):
            named = f"{limit:g}" if duration == math.inf else f"{duration:g}:{limit:g}"
            raise PlanError(f"max_tokens_per_second is {named}; durations and limits must be positive")
    limits.sort()
    for (duration, _), (following, _) in itertools.pairwise(limits):
        if duration == following:
            raise PlanError(f"max_tokens_per_second has two limits for durations up to {duration:g} s")
    if not limits:
        return None
    return limits[0][1] if limits[0][0] == math.inf else tuple(limits)


def _rate_limit(word: str | float | Sequence[float], single: bool) -> tuple[float, float]:
    """Return (duration, limit) of a pair or of a word such as "10:30"; a single "25" has no bound on duration."""
    parts = word.split(":") if isinstance(word, str) else [word] if isinstance(word, int | float) else list(word)
    try:
        numbers = [float(part) for part in parts]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) == 2 and not math.isinf(numbers[0]):
        return numbers[0], numbers[1]
    if len(numbers) == 1 and single:
        return math.inf, numbers[0]
    raise PlanError(
        f"max_tokens_per_second has {word!r}; give one limit such as 25, duration:limit pairs such as 10:30 "
        "20:25, or auto"
    )


def rate_limit_at(seconds: np.ndarray, limits: RateLimits) -> np.ndarray | float:
    """Return the limit in tokens per second of each duration.

    It is that of the first pair whose duration is not shorter, or of the last pair for longer utterances.
    """
    if limits is None:
        return math.inf
    if isinstance(limits, float):
        return limits
    durations, values = np.array(limits).T
    durations = durations.astype(seconds.dtype)  # a stored 10.1 s is not longer than 10.1
    return values[np.minimum(np.searchsorted(durations, seconds), len(values) - 1)]


def exclusions(
    lengths: Lengths,
    budget: Budget,
    max_tokens_per_second: RateLimits,
    model: ModelLimits | None = None,
    grid_tokens: int = 1,
) -> np.ndarray:
    """Return an index into REASONS for each utterance, (n,) int8; 0 for those that can be used.

    grid_tokens: multiple to which the tokens of ``lengths`` are rounded up, and therefore the model's limit.
    """
    reason = np.zeros(len(lengths), np.int8)
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(lengths.seconds) & (lengths.seconds > 0) & (lengths.tokens >= 0)
        if max_tokens_per_second is not None:
            most = lengths.seconds * rate_limit_at(lengths.seconds, max_tokens_per_second)
            reason[lengths.tokens > most] = 3
    reason[budget.bytes(1, lengths.frames, lengths.tokens) > budget.limit_bytes] = 2
    if model is not None:
        if model.tokens < math.inf:
            reason[lengths.tokens > -(-model.tokens // grid_tokens) * grid_tokens] = 5
        reason[lengths.seconds > model.seconds] = 4
    reason[~usable] = 1
    return reason
