"""Run all stages on a synthesised corpus: speech -> index -> budget -> plan -> training -> transcripts -> report.

The demo takes at most ten minutes on two cores. Everything is written to one folder; open `report.html` there,
`summary.json` has the figures. An interrupted demo resumes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from canter.cli.progress import TrainingProgress, console, say, track
from canter.demo.config import DemoConfig as Options
from canter.events import Events
from canter.training.run.reports import StepReport

T = TypeVar("T")


class DemoEvents(Events[StepReport]):
    """Messages and progress of the demo, on standard error."""

    def message(self, text: str) -> None:
        say(text)

    def progress(self, items: Sequence[T], name: str) -> Iterable[T]:
        return track([*items], name)

    @contextmanager
    def running(self, steps: int, done: int) -> Iterator[None]:
        with TrainingProgress(steps, done) as self.bar:
            yield

    def step(self, report: StepReport) -> None:
        self.bar(report)


def run(options: Options) -> None:
    from canter.demo.pipeline import run_demo

    options.output.mkdir(parents=True, exist_ok=True)
    summary = run_demo(options, DemoEvents())
    console.rule()
    say(
        f"WER {summary.get('wer', 1):.1%} on unseen sentences, {summary.get('times', {})['total'] / 60:.1f} minutes in "
        f"all. Look at {options.output / 'report.html'}"
    )
