"""Progress bars on standard error: a live line for training, a plain one for anything else."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from canter.training.reports import StepReport

console = Console(stderr=True)


def _bar(name: str) -> Progress:
    return Progress(
        TextColumn(f"{name:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def track(items: list, name: str) -> Iterator:
    """Yields ``items`` under a progress bar."""
    with _bar(name) as bar:
        yield from bar.track(items)


@contextmanager
def counting(name: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that is told (done, of how many)."""
    with _bar(name) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def say(text: str) -> None:
    """A line on standard error."""
    console.print(text, highlight=False)


class TrainingProgress:
    """Live loss, WER, speed, padding, memory, waiting and time left of a run; on a terminal that cannot be redrawn, a
    line every 100 steps."""

    WIDTH = 50  # steps that the figures shown are means of
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

    def __call__(self, report: StepReport) -> None:
        self.recent.append(report)
        text = self.describe(self.recent)
        self.bar.update(self.task, completed=report.step, total=report.steps, description=text)
        if not console.is_terminal and report.step % self.EVERY == 0:
            console.print(f"step {report.step} of {report.steps}  {text}", highlight=False)

    @staticmethod
    def describe(recent: Iterable[StepReport]) -> str:
        """Means over the steps given, in a line."""
        reports = list(recent)
        seconds = sum(r.seconds for r in reports)
        audio = sum(r.audio_seconds for r in reports)
        loss = sum(r.loss for r in reports) / len(reports)
        room = sum(r.audio_seconds / max(1e-9, 1 - r.padding) for r in reports)
        padding = 1 - audio / room if room else 0.0  # nothing that the steps were to have could be used
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
