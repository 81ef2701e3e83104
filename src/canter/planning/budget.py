"""The budget: what a batch costs in memory and time, as a value that can be saved, read and edited by hand.

A batch of B utterances padded to T encoder frames and U target tokens (prompt and end token counted) costs

    fixed + B * (a T + b T^2 + c U + d T U + e U^2)

bytes, and likewise seconds, with one set of non-negative coefficients for memory and one for time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np

from canter.errors import BudgetError
from canter.fields import from_mapping
from canter.files import write_text
from canter.untrusted import read_json_value

FORMAT = "canter-budget/1"
TERMS = ("T", "TT", "U", "TU", "UU")
Array: TypeAlias = np.ndarray
Number = TypeVar("Number", float, np.ndarray)
"""A number, or an array of any shape; the frames and tokens of a call are of the same shape."""


def parse_memory(text: str, name: str = "memory") -> int:
    """Return the bytes of a size such as "80GiB", "80GB" or "80" (GB). Raises BudgetError that names ``name``."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?(?:([KMGT])(i?)B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise BudgetError(f"{name} is {text!r}; give a size such as 80GiB, 80GB or 80 (GB)")
    number, unit, binary = found.groups()
    return round(float(number) * (1024 if binary else 1000) ** (" KMGT".index((unit or "G").upper())))


@dataclass(frozen=True, slots=True)
class Polynomial:
    """Cost of one utterance of a batch padded to T frames and U tokens: aT + bT^2 + cU + dTU + eU^2."""

    T: float = 0.0
    TT: float = 0.0
    U: float = 0.0
    TU: float = 0.0
    UU: float = 0.0

    def __call__(self, frames: Number, tokens: Number) -> Number:
        """Return the value at (T, U)."""
        return frames * (self.T + self.TT * frames + self.TU * tokens) + tokens * (self.U + self.UU * tokens)

    def of_terms(self, terms: Array) -> Array:
        """Return the value of terms (..., 5), in the order of TERMS, that are sums over a micro-batch."""
        t, tt, u, tu, uu = (terms[..., number] for number in range(5))
        return self.T * t + self.TT * tt + self.U * u + self.TU * tu + self.UU * uu


@dataclass(frozen=True)
class Budget:
    """Memory and time of micro-batches on a device (see the module's formula).

    limit_bytes: maximum memory of a micro-batch, fixed bytes included. fixed_bytes: memory that does not depend on the
    batch. measured_on: model, device and precision to which the numbers belong.
    """

    limit_bytes: float
    memory: Polynomial
    time: Polynomial = field(default_factory=lambda: Polynomial(T=1e-5))
    fixed_bytes: float = 0.0
    fixed_seconds: float = 0.0
    frame_seconds: float = 0.08
    measured_on: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {
            "memory.limit_bytes": self.limit_bytes,
            "memory.fixed_bytes": self.fixed_bytes,
            "time.fixed_seconds": self.fixed_seconds,
            "frame_seconds": self.frame_seconds,
        }
        for part, polynomial in (
            ("memory.per_utterance_bytes", self.memory),
            ("time.per_utterance_seconds", self.time),
        ):
            numbers |= {f"{part}.{term}": getattr(polynomial, term) for term in TERMS}
            if not any(getattr(polynomial, term) > 0 for term in TERMS):
                raise BudgetError(f"budget: {part} is zero for every term; at least one must be positive")
        for name, value in numbers.items():
            if not math.isfinite(value) or value < 0:
                raise BudgetError(f"budget: {name} is {value}; it must be a finite number, zero or more")
        if self.frame_seconds == 0:
            raise BudgetError("budget: frame_seconds is 0; it is the seconds of one encoder frame, such as 0.08")
        if self.limit_bytes <= self.fixed_bytes:
            raise BudgetError(
                f"budget: memory.limit_bytes ({self.limit_bytes:.0f}) leaves nothing above memory.fixed_bytes "
                f"({self.fixed_bytes:.0f}); raise the limit or use a smaller model"
            )

    @classmethod
    def from_batch_seconds(cls, seconds: float, *, frame_seconds: float = 0.08) -> Budget:
        """Return a budget of `seconds` of padded audio a micro-batch, without any other limit."""
        if not seconds > 0:
            raise BudgetError(f"budget: batch seconds is {seconds}; it must be positive")
        return cls(
            limit_bytes=float(int(seconds / frame_seconds + 1e-6)),
            memory=Polynomial(T=1.0),
            time=Polynomial(T=frame_seconds),
            frame_seconds=frame_seconds,
            measured_on={"model": f"{seconds:g} seconds a batch"},
        )

    @property
    def room_bytes(self) -> float:
        """Memory for utterances: the limit without the fixed bytes."""
        return self.limit_bytes - self.fixed_bytes

    @overload
    def frames(self, seconds: float) -> int: ...
    @overload
    def frames(self, seconds: Array) -> Array: ...
    def frames(self, seconds):
        """Return T = ceil(seconds / frame_seconds), computed in double precision; int64 for arrays."""
        frames = np.ceil(np.asarray(seconds, dtype=np.float64) / self.frame_seconds)
        return int(frames) if frames.ndim == 0 else frames.astype(np.int64)

    def utterance_bytes(self, frames: Number, tokens: Number) -> Number:
        """Return the bytes that one utterance adds to a batch padded to (T, U)."""
        return self.memory(frames, tokens)

    @overload
    def bytes(self, batch: float, frames: float, tokens: float) -> float: ...
    @overload
    def bytes(self, batch: Array | float, frames: Array, tokens: Array) -> Array: ...
    def bytes(self, batch, frames, tokens):
        """Return the predicted peak bytes of a micro-batch (B, T, U)."""
        return self.fixed_bytes + batch * self.memory(frames, tokens)

    def utterance_seconds(self, frames: Number, tokens: Number) -> Number:
        """Return the seconds that one utterance adds to a batch padded to (T, U)."""
        return self.time(frames, tokens)

    @overload
    def step_seconds(self, batch: float, frames: float, tokens: float) -> float: ...
    @overload
    def step_seconds(self, batch: Array | float, frames: Array, tokens: Array) -> Array: ...
    def step_seconds(self, batch, frames, tokens):
        """Return the predicted seconds of a micro-batch (B, T, U), forward and backward."""
        return self.fixed_seconds + batch * self.time(frames, tokens)

    def bytes_of_terms(self, terms: Array) -> Array:
        """Return the predicted peak bytes of packed micro-batches; terms: (..., 5) of `groups.packed_terms`."""
        return self.fixed_bytes + self.memory.of_terms(terms)

    def seconds_of_terms(self, terms: Array) -> Array:
        """Return the predicted seconds of packed micro-batches, forward and backward, from terms (..., 5)."""
        return self.fixed_seconds + self.time.of_terms(terms)

    @overload
    def max_batch(self, frames: float, tokens: float) -> int: ...
    @overload
    def max_batch(self, frames: Array, tokens: Array) -> Array: ...
    def max_batch(self, frames, tokens):
        """Return the largest B that fits when padded to (T, U); zero where a single utterance does not fit."""
        room = self.room_bytes / np.maximum(self.memory(frames, tokens), 1e-30)
        size = np.floor(np.minimum(room, 2**31)).astype(np.int64)
        # the quotient may have been rounded up to an integer, so the product is checked
        size = size - (self.bytes(size, frames, tokens) > self.limit_bytes)
        return int(size) if np.ndim(size) == 0 else size

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides a plan; `measured_on` does not."""
        value = self.as_json()
        del value["measured_on"]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    def require(self, **expected: object) -> None:
        """Check what the budget was measured on, as in ``require(device="H100", precision="bf16")``.

        Names that `measured_on` lacks are not checked. Raises BudgetError naming every difference.
        """
        wrong = [
            f"{name} is {wanted!r} here and {self.measured_on[name]!r} in the budget"
            for name, wanted in expected.items()
            if self.measured_on.get(name) is not None and self.measured_on[name] != wanted
        ]
        if wrong:
            raise BudgetError(
                f"budget was measured on something else: {'; '.join(wrong)}. Run 'canter tune' again here"
            )

    def as_json(self) -> dict[str, object]:
        """Return the JSON object of the file format."""
        memory = _Memory(self.limit_bytes, self.fixed_bytes, self.memory)
        time = _Time(self.fixed_seconds, self.time)
        return asdict(_BudgetFile(FORMAT, memory, time, self.frame_seconds, dict(self.measured_on)))

    def save(self, path: str | Path) -> None:
        """Write the budget file atomically."""
        write_text(path, json.dumps(self.as_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Budget:
        """Read a budget file. Raises BudgetError naming the file, the field and its value."""
        try:
            value = read_json_value(path, BudgetError)
        except FileNotFoundError:
            raise BudgetError(f"{path}: no such budget; make one with 'canter tune', or name a model shape") from None
        except OSError as error:
            raise BudgetError(f"{path} cannot be read ({error.strerror or error})") from None
        try:
            return cls.from_json(value)
        except BudgetError as error:
            raise BudgetError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, value: object) -> Budget:
        """Return the budget of a JSON object. Raises BudgetError for unknown, missing and wrongly typed fields."""
        file = from_mapping(_BudgetFile, value, "budget", error=BudgetError)
        if file.format != FORMAT:
            raise BudgetError(f"budget: format is {file.format!r}; this version reads {FORMAT!r}")
        return cls(
            limit_bytes=file.memory.limit_bytes,
            fixed_bytes=file.memory.fixed_bytes,
            memory=file.memory.per_utterance_bytes,
            fixed_seconds=file.time.fixed_seconds,
            time=file.time.per_utterance_seconds,
            frame_seconds=file.frame_seconds,
            measured_on=file.measured_on,
        )


@dataclass(frozen=True)
class _Memory:
    limit_bytes: float
    fixed_bytes: float = 0.0
    per_utterance_bytes: Polynomial = field(default_factory=Polynomial)


@dataclass(frozen=True)
class _Time:
    fixed_seconds: float = 0.0
    per_utterance_seconds: Polynomial = field(default_factory=Polynomial)


@dataclass(frozen=True)
class _BudgetFile:
    """The JSON object of the file format."""

    format: str
    memory: _Memory
    time: _Time
    frame_seconds: float = 0.08
    measured_on: dict[str, Any] = field(default_factory=dict)
