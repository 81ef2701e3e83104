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
from typing import Any, TypeVar

import numpy as np

from canter.errors import BudgetError
from canter.files import write_text
from canter.untrusted import read_json_value

FORMAT = "canter-budget/1"
TERMS = ("T", "TT", "U", "TU", "UU")
Number = TypeVar("Number", float, np.ndarray)


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

    def __call__(self, frames: Any, tokens: Any) -> Any:
        """Value at (T, U); numbers or arrays of one shape."""
        return frames * (self.T + self.TT * frames + self.TU * tokens) + tokens * (self.U + self.UU * tokens)


@dataclass(frozen=True)
class Budget:
    """What fits on a device and how long it takes (see the module's formula).

    limit_bytes: what a micro-batch may use; fixed_bytes: used whatever the batch is. `measured_on` says which
    model, device and precision the numbers belong to.
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
        """A budget that holds `seconds` of padded audio a micro-batch and knows nothing else."""
        if not seconds > 0:
            raise BudgetError(f"budget: batch seconds is {seconds}; it must be positive")
        return cls(
            limit_bytes=float(int(seconds / frame_seconds + 1e-6)),
            memory=Polynomial(T=1.0),
            time=Polynomial(T=frame_seconds),
            frame_seconds=frame_seconds,
            measured_on={"model": f"{seconds:g} seconds a batch"},
        )

    def frames(self, seconds: Any) -> Any:
        """T = ceil(seconds / frame_seconds), computed in double precision; int64 for arrays."""
        frames = np.ceil(np.asarray(seconds, dtype=np.float64) / self.frame_seconds)
        return int(frames) if frames.ndim == 0 else frames.astype(np.int64)

    def utterance_bytes(self, frames: Any, tokens: Any) -> Any:
        """Bytes one utterance adds to a batch padded to (T, U)."""
        return self.memory(frames, tokens)

    def bytes(self, batch: Any, frames: Any, tokens: Any) -> Any:
        """Predicted peak bytes of a batch (B, T, U)."""
        return self.fixed_bytes + batch * self.memory(frames, tokens)

    def utterance_seconds(self, frames: Any, tokens: Any) -> Any:
        """Seconds one utterance adds to a batch padded to (T, U)."""
        return self.time(frames, tokens)

    def step_seconds(self, batch: Any, frames: Any, tokens: Any) -> Any:
        """Predicted seconds of one micro-batch (B, T, U), forward and backward."""
        return self.fixed_seconds + batch * self.time(frames, tokens)

    def max_batch(self, frames: Any, tokens: Any) -> Any:
        """Largest B that fits when padded to (T, U); zero where one utterance alone does not."""
        room = (self.limit_bytes - self.fixed_bytes) / np.maximum(self.memory(frames, tokens), 1e-30)
        size = np.floor(np.minimum(room, 2**31)).astype(np.int64)
        # the quotient may round up to a whole number: what counts is that the product fits
        size = size - (self.bytes(size, frames, tokens) > self.limit_bytes)
        return int(size) if np.ndim(size) == 0 else size

    @cached_property
    def fingerprint(self) -> str:
        """Changes when anything that decides a plan changes (`measured_on` does not)."""
        value = self.as_json()
        del value["measured_on"]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    def require(self, **expected: Any) -> None:
        """Refuses use on something else than it was measured on, such as ``require(device="H100", precision="bf16")``.

        What `measured_on` does not say is not checked. Raises BudgetError naming every difference.
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

    def as_json(self) -> dict[str, Any]:
        """The JSON object of the file format."""
        return {
            "format": FORMAT,
            "memory": {
                "limit_bytes": self.limit_bytes,
                "fixed_bytes": self.fixed_bytes,
                "per_utterance_bytes": asdict(self.memory),
            },
            "time": {"fixed_seconds": self.fixed_seconds, "per_utterance_seconds": asdict(self.time)},
            "frame_seconds": self.frame_seconds,
            "measured_on": dict(self.measured_on),
        }

    def save(self, path: str | Path) -> None:
        """Write the budget file, whole or not at all."""
        write_text(path, json.dumps(self.as_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Budget:
        """Reads a budget file. Raises BudgetError naming the file, the field and its value."""
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
    def from_json(cls, value: Any) -> Budget:
        """From the JSON object; unknown, missing and wrongly typed fields are errors that name the field."""
        top = _object(value, "", {"format", "memory", "time"}, {"frame_seconds", "measured_on"})
        if top["format"] != FORMAT:
            raise BudgetError(f"budget: format is {top['format']!r}; this version reads {FORMAT!r}")
        memory = _object(top["memory"], "memory", {"limit_bytes", "per_utterance_bytes"}, {"fixed_bytes"})
        time = _object(top["time"], "time", {"per_utterance_seconds"}, {"fixed_seconds"})
        measured_on = top.get("measured_on", {})
        if not isinstance(measured_on, dict):
            raise BudgetError(f"budget: measured_on is {measured_on!r}; it must be an object")
        return cls(
            limit_bytes=_number(memory["limit_bytes"], "memory.limit_bytes"),
            fixed_bytes=_number(memory.get("fixed_bytes", 0.0), "memory.fixed_bytes"),
            memory=_polynomial(memory["per_utterance_bytes"], "memory.per_utterance_bytes"),
            fixed_seconds=_number(time.get("fixed_seconds", 0.0), "time.fixed_seconds"),
            time=_polynomial(time["per_utterance_seconds"], "time.per_utterance_seconds"),
            frame_seconds=_number(top.get("frame_seconds", 0.08), "frame_seconds"),
            measured_on=measured_on,
        )


def _object(value: Any, name: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    where = name or "the file"
    if not isinstance(value, dict):
        raise BudgetError(f"budget: {where} is {type(value).__name__}; it must be an object")
    prefix = f"{name}." if name else ""
    for key in sorted(required - value.keys()):
        raise BudgetError(f"budget: {prefix}{key} is missing")
    for key in sorted(value.keys() - required - optional):
        raise BudgetError(f"budget: {prefix}{key} is not a field; known: {', '.join(sorted(required | optional))}")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BudgetError(f"budget: {name} is {value!r}; it must be a number")
    return float(value)


def _polynomial(value: Any, name: str) -> Polynomial:
    terms = _object(value, name, set(), set(TERMS))
    return Polynomial(**{term: _number(number, f"{name}.{term}") for term, number in terms.items()})
