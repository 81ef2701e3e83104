"""Progress bars and messages on standard error."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from canter.events import Events
from canter.training.run.reports import StepReport

T = TypeVar("T")
console = Console(stderr=True)


def _bar(name: str) -> Progress:
    return Progress(
        TextColumn(f"{name:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def track(items: Sequence[T], name: str) -> Iterator[T]:
    """Yield ``items`` under a progress bar."""
    with _bar(name) as bar:
        yield from bar.track(items)


@contextmanager
def counting(name: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Context manager with a progress bar that yields a function for (done, total)."""
    with _bar(name) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def say(text: str) -> None:
    """Print a line on standard error."""
    console.print(text, highlight=False)


class TerminalEvents(Events[StepReport]):
    """Messages and progress of a training run on standard error."""

    def message(self, text: str) -> None:
        say(text)

    def progress(self, items: Sequence[T], name: str) -> Iterable[T]:
        return track(items, name)

    @contextmanager
    def running(self, steps: int, done: int) -> Iterator[None]:
        with TrainingProgress(steps, done) as self.bar:
            yield

    def step(self, report: StepReport) -> None:
        self.bar.update(report)


class TrainingProgress:
    """Live loss, WER, speed, padding, memory, waiting and remaining time of a run.

    On an output that cannot be redrawn, it prints a line every 100 steps.
    """

    WIDTH = 50  # number of steps that the figures are means of
    EVERY = 100

    def __init__(self, steps: int, done: int = 0):
        self.recent: deque[StepReport] = deque(maxlen=self.WIDTH)
        self.bar = Progress(
            TextColumn("training      "),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> "TrainingProgress":
        if console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, report: StepReport) -> None:
        """Show a step."""
        self.recent.append(report)
        text = self.describe(self.recent)
        self.bar.update(self.task, completed=report.step, total=report.steps, description=text)
        if not console.is_terminal and report.step % self.EVERY == 0:
            console.print(f"step {report.step} of {report.steps}  {text}", highlight=False)

    @staticmethod
    def describe(recent: Iterable[StepReport]) -> str:
        """Return means over the given steps, in a line."""
        reports = list(recent)
        seconds = sum(r.seconds for r in reports)
        audio = sum(r.audio_seconds for r in reports)
        loss = sum(r.loss for r in reports) / len(reports)
        room = sum(r.audio_seconds / max(1e-9, 1 - r.padding) for r in reports)
        padding = 1 - audio / room if room else 0.0  # no utterance could be used
        wait = sum(r.data_wait_seconds for r in reports) / seconds
        last = reports[-1]
        parts = [f"loss {loss:.3f}"]
        parts += [f"WER {last.wer:.1%}"] if last.wer is not None else []
        parts += [f"{audio / seconds:.0f} h/h", f"padding {padding:.1%}"]
        filled = sum(r.memory_filled for r in reports) / len(reports)
        parts.append(f"memory {last.memory_peak or filled:.0%}")
        if len(last.rank_seconds) > 1:  # the slowest rank over the mean
            parts.append(f"waiting {sum(r.waiting for r in reports) / len(reports):.2f}")
        return "  ".join([*parts, f"data wait {wait:.1%}"])


class TranscriptionProgress:
    """Decoded audio, RTFx and remaining time. On an output that cannot be redrawn, a line every half minute."""

    EVERY_SECONDS = 30.0

    def __init__(self, label: str, utterances: int, seconds: float, hidden: bool = False):
        """Start at 0 of ``seconds`` of audio; ``hidden`` shows nothing."""
        self.label, self.utterances, self.seconds, self.hidden = label, utterances, seconds, hidden
        self.decoded = self.failed_seconds = 0.0
        self.finished = self.failed = 0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} s of audio  {task.fields[speed]}"),
            TimeElapsedColumn(),
            console=console,
            disable=hidden or not console.is_terminal,
        )
        self.task = self.bar.add_task(label, total=seconds, speed="")

    def __enter__(self) -> "TranscriptionProgress":
        self.begun = self.said = time.perf_counter()
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def finish(self, seconds: float, failed: bool) -> None:
        """Count an utterance as finished, which has ``seconds`` of audio."""
        self.finished += 1
        self.failed += failed
        self.failed_seconds += seconds if failed else 0.0

    def advance(self, decoded: float) -> None:
        """Show the seconds of audio decoded so far, including those of utterances that failed."""
        self.decoded = decoded
        now = time.perf_counter()
        speed = self.speed(now - self.begun)
        self.bar.update(self.task, completed=decoded, speed=speed)
        if not (self.hidden or console.is_terminal) and now - self.said >= self.EVERY_SECONDS:
            self.said = now
            done = f"{decoded:,.0f} of {self.seconds:,.0f} s of audio ({decoded / max(self.seconds, 1e-9):.0%})"
            text = f"{self.label}: {done}, {self.finished:,} of {self.utterances:,} finished  {speed}"
            console.print(text, highlight=False, soft_wrap=True)

    def speed(self, seconds: float) -> str:
        """Return RTFx, remaining time and failures after ``seconds`` of work."""
        rtfx = (self.decoded - self.failed_seconds) / max(seconds, 1e-9)
        left = seconds * (self.seconds - self.decoded) / self.decoded if self.decoded else None
        parts = [f"RTFx {rtfx:,.1f}"]
        parts += [f"{clock(left)} left"] if left is not None else []
        parts += [f"{self.failed:,} failed"] if self.failed else []
        return "  ".join(parts)


def clock(seconds: float) -> str:
    """Return hours, minutes and seconds, as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
