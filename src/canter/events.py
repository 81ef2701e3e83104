"""Messages, progress and metrics of a long operation, through one object.

Libraries take an `Events` and call it; the commands hand in one that draws on the terminal, programs one of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

T = TypeVar("T")
Report = TypeVar("Report", contravariant=True)


class Events(Generic[Report]):
    """Listener of a long operation; this one ignores everything. Override what is of interest.

    ``Report`` is what an operation reports step by step, such as `canter.training.run.reports.StepReport`.
    """

    def message(self, text: str) -> None:
        """Take a line for the user."""

    def progress(self, items: Sequence[T], name: str) -> Iterable[T]:
        """Return ``items`` to iterate over, under a progress bar called ``name``."""
        return items

    def running(self, steps: int, done: int) -> AbstractContextManager[object]:
        """Return a context manager around an operation of ``steps`` steps, of which ``done`` are behind it."""
        return nullcontext()

    def step(self, report: Report) -> None:
        """Take the report of a step."""

    def metrics(self, step: int, values: Mapping[str, object]) -> None:
        """Take named numbers that were measured after ``step``."""


QUIET: Events[object] = Events()
"""Listener that ignores everything."""


class Printed(Events[object]):
    """Messages on standard output, for scripts."""

    def message(self, text: str) -> None:
        print(text, flush=True)
