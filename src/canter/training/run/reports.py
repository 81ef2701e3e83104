"""Reports of a run: its steps and progress, log files, unusable utterances, experiment trackers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from canter.corpus.index import LengthIndex
from canter.corpus.utterance import Problem
from canter.errors import CanterError, CheckpointError, ConfigError
from canter.extras import needed_by, require
from canter.fields import from_mapping
from canter.files import write_text
from canter.planning.lengths import OVER_RATE, rate_limit_at
from canter.planning.plan import Plan
from canter.ranks import Ranks
from canter.redaction import redacted

MIN_SKIPPED = 20  # unusable utterances that are allowed, whatever their fraction
Tracker = Callable[[int, Mapping[str, object]], None]


@dataclass(frozen=True)
class StepReport:
    """Metrics of one optimiser step over all ranks, as metrics.jsonl and the progress bar show them."""

    step: int
    steps: int
    """Number of steps of the run."""
    epoch: int
    loss: float
    loss_ctc: float
    loss_attention: float | None
    learning_rate: float
    gradient_norm: float
    seconds: float
    data_wait_seconds: float
    """Mean over ranks."""
    audio_seconds: float
    utterances: int
    batch: int
    frames_max: int
    tokens_max: int
    padding: float
    """Fraction of the step's samples that is padding, including what the model itself pads to."""
    memory_filled: float
    """Mean fraction of the budget's limit that a micro-batch is predicted to take."""
    memory_peak: float
    """Measured peak as a fraction of the GPU's memory, on the fullest rank; 0 on a CPU."""
    waiting: float
    """Compute seconds of the slowest rank over the mean of the ranks."""
    rank_seconds: tuple[float, ...]
    """Compute seconds of each rank."""
    wer: float | None = None
    """WER of the last validation."""
    loss_teacher: float | None = None
    """Divergence from the teacher per target; None without one."""


@dataclass
class Progress:
    """State of a run that its checkpoints keep."""

    step: int = 0
    """Number of steps taken."""
    epoch: int = 0
    position: dict | None = None
    """Position of the plan within the epoch; None at its start."""
    seconds: float = 0.0
    """Time spent in training steps, over all starts."""
    audio_seconds: float = 0.0
    utterances: int = 0
    skipped: int = 0
    bad: int = 0
    """Consecutive steps, up to this one, that were skipped for a non-finite loss or gradient."""
    wer: float | None = None
    """WER of the last validation."""
    plan: str = ""
    """Fingerprint of the plan."""
    tightenings: list = field(default_factory=list)
    """Budgets that out-of-memory errors made smaller; see `canter.planning.sampler.Stepper`."""

    def add(self, report: StepReport) -> None:
        """Add a step."""
        self.step, self.epoch = report.step, report.epoch
        self.seconds += report.seconds
        self.audio_seconds += report.audio_seconds
        self.utterances += report.utterances

    def state(self) -> dict[str, object]:
        return dict(vars(self))

    @classmethod
    def from_state(cls, values: object, source: object) -> Progress:
        """Return the inverse of ``state``. Raise CheckpointError, naming ``source``, for unknown fields and types."""
        return from_mapping(cls, values, str(source), error=CheckpointError)


# -- log files --


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager that raises ConfigError, naming ``path``, if it cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot write there ({error.strerror}); make room or choose another --output"
        ) from None


@dataclass(frozen=True)
class RunLog:
    """Log files of a run folder, with a line per step. Only rank 0 writes."""

    folder: Path
    writes: bool = True

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def skipped(self) -> Path:
        return self.folder / "skipped.jsonl"

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.metrics, self.folder / "utterances.jsonl", self.skipped)

    def add(self, **values: object) -> None:
        """Append a line to the metrics."""
        self._append(self.metrics, [values | {"time": time.time()}])

    def event(self, step: int, what: str, **values: object) -> None:
        """Append something unusual to the metrics."""
        self.add(kind="event", step=step, what=what, **values)

    def add_utterances(self, step: int, epoch: int, micro_batches: Sequence[np.ndarray]) -> None:
        """Append the rows of the length index that a step consists of, by micro-batch."""
        rows = [rows.tolist() for rows in micro_batches]
        self._append(self.folder / "utterances.jsonl", [{"step": step, "epoch": epoch, "rows": rows}])

    def add_skipped(self, step: int, problems: Iterable[Problem]) -> None:
        """Append the unusable utterances of a step; ``line`` is the row of the length index."""
        lines = [{"file": p.file, "line": p.line, "reason": p.reason, "step": step} for p in problems]
        self._append(self.skipped, lines)

    def add_validation(
        self, step: int, metrics: Mapping[str, object], transcripts: Sequence[Mapping[str, object]]
    ) -> None:
        """Write the transcripts of a validation to validation/step-NNNNNN.jsonl, then append its metrics.

        Without the line of metrics, a resumed run validates again.
        """
        if transcripts and self.writes:
            path = self.folder / "validation" / f"step-{step:06d}.jsonl"
            with writing(path):
                write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in transcripts))
        self.add(kind="valid", step=step, **metrics)

    def has_validation(self, step: int) -> bool:
        """Return whether the metrics have a validation at this step."""
        if not self.metrics.exists():
            return False
        with self.metrics.open(encoding="utf-8", errors="replace") as file:
            return any(f'"kind": "valid", "step": {step},' in line for line in file)

    def _append(self, path: Path, lines: Sequence[Mapping[str, object]]) -> None:
        if lines and self.writes:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(text)

    def forget_after(self, step: int, warn: Callable[[str], None] = lambda _: None) -> None:
        """Drop lines of steps after ``step``, which are taken again, and a last line that is torn.

        Damaged lines before that are kept, with all lines after them, and ``warn`` gets a message.
        """
        for path in self.files if self.writes else ():
            if path.exists():
                with writing(path):
                    size, damaged = _bytes_up_to(path, step)
                if damaged:
                    lines = f"line {damaged[0]} is" if len(damaged) == 1 else f"lines {_some(damaged)} are"
                    warn(f"{path}: {lines} damaged, and kept as found; the run itself does not need them")
                with writing(path):
                    os.truncate(path, size)


def _bytes_up_to(path: Path, step: int) -> tuple[int, list[int]]:
    """Return (size, numbers of damaged lines) of a log up to the last complete line of a step up to ``step``."""
    size = place = 0
    damaged: list[int] = []
    pending: list[int] = []  # damaged lines that count only if a line of such a step follows
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place += len(line)
            try:
                kept = json.loads(line).get("step", 0) <= step and line.endswith(b"\n")
            except (ValueError, AttributeError, TypeError, RecursionError):
                pending.append(number)
                continue
            if kept:
                size, damaged = place, damaged + pending
                pending = []
    return size, damaged


def _some(numbers: Sequence[int], limit: int = 5) -> str:
    text = ", ".join(map(str, numbers[:limit]))
    return f"{text} and {len(numbers) - limit} more" if len(numbers) > limit else text


# -- unusable utterances --


def list_left_out(path: Path, plan: Plan, index: LengthIndex) -> int:
    """Write a line for each utterance that the plan cannot use, with its row and the reason; return their number."""
    lines = []
    for row, kind in plan.left_out():
        seconds, tokens = float(index.seconds[row]), int(index.tokens[row])
        reason = f"{kind}: {seconds:.2f} s, {tokens} tokens"
        if kind == OVER_RATE:
            limit = float(rate_limit_at(index.seconds[row], plan.rate_limits))
            reason += f", {tokens / seconds:.1f} a second, at most {limit:.1f}"
        lines.append({"file": redacted(index.utterance(row).audio_filepath), "line": row, "reason": reason})
    write_text(path, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return len(lines)


def list_problems(path: Path, problems: Sequence[Problem], warn: Callable[[str], None], rows: str) -> None:
    """Write the ``rows`` ("validation rows") that cannot be used, and warn of their number and the first."""
    if problems:
        write_text(path, (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in problems))
        warn(f"{len(problems)} {rows} left out, listed in {path}: {problems[0]}")
    else:
        path.unlink(missing_ok=True)


def check_skipped(log: RunLog, progress: Progress, limit: float, ranks: Ranks, *, ended: bool = False) -> None:
    """Raise CanterError with the most frequent reasons if more than ``limit`` of the utterances were unusable.

    A few are allowed whatever their fraction, unless the run has ended and used none.
    """
    seen = progress.utterances + progress.skipped
    few = MIN_SKIPPED if progress.utterances or not ended else 0
    if progress.skipped <= max(few, limit * seen):
        return
    reasons = ranks.broadcast_object(frequent_reasons(log.skipped) if ranks.first else "")
    raise CanterError(
        f"{progress.skipped} of {seen} utterances could not be used (see {log.skipped}): {reasons}; correct the "
        "manifest, or allow more with max_skipped in the configuration file"
    )


def frequent_reasons(listed: Path, limit: int = 4) -> str:
    """Return the most frequent reasons in a skipped.jsonl, with their counts."""
    kinds: Counter[str] = Counter()
    with listed.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                kinds[problem_kind(row["reason"], row["file"])] += 1
            except (ValueError, KeyError, TypeError, AttributeError):
                kinds["unreadable line of this list"] += 1
    parts = [f"{count} x {kind}" for kind, count in kinds.most_common(limit)]
    more = len(kinds) - limit
    return ", ".join(parts) + (f" and {more} other reasons" if more > 0 else "")


def problem_kind(reason: str, file: str) -> str:
    """Return a reason without its file, its numbers and the advice after it: 'is empty (N bytes)'."""
    bare = reason.replace(file, "").lstrip(": ").split(";")[0]
    return re.sub(r"\d+(\.\d+)?", "N", bare)[:80].strip()


# -- experiment trackers --


@contextmanager
def open_trackers(names: Sequence[str], folder: Path, settings: Mapping[str, object], step: int) -> Iterator[Tracker]:
    """Context manager that yields a function for (step, metrics), which passes numbers on to all trackers.

    settings: the run's configuration as plain values. step: the step from which the run starts or resumes.
    """
    with ExitStack() as stack:
        trackers: list[Tracker] = []
        for name in names:
            tracker, close = TRACKERS[name](folder, settings, step)
            trackers.append(tracker)
            stack.callback(close)

        def track(step: int, metrics: Mapping[str, object]) -> None:
            numbers = {
                ("" if name.startswith("valid_") else "train_") + name: value
                for name, value in metrics.items()
                if isinstance(value, int | float) and math.isfinite(value) and name not in ("step", "steps")
            }
            for tracker in trackers:
                tracker(step, numbers)

        yield track


def check_trackers(names: Iterable[str]) -> None:
    """Raise MissingExtraError for a tracker that is not installed."""
    for name in names:
        require(name, f"--track {name}")


def _tensorboard(folder: Path, settings: Mapping[str, object], step: int) -> tuple[Tracker, Callable[[], object]]:
    from torch.utils.tensorboard import SummaryWriter

    # steps that an earlier start logged after its last checkpoint are taken again, and hidden
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def track(step: int, numbers: Mapping[str, object]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name.replace("_", "/", 1), value, step)

    return track, writer.close


def _wandb(folder: Path, settings: Mapping[str, object], step: int) -> tuple[Tracker, Callable[[], object]]:
    with needed_by("--track wandb"):
        import wandb  # pyright: ignore[reportMissingImports]  # an extra
    path = folder.resolve()
    identity = hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()
    started = wandb.init(
        project="canter", name=path.name, id=identity, resume="allow", dir=str(folder), config=dict(settings)
    )
    return lambda step, numbers: started.log(dict(numbers), step=step), started.finish


def _trackio(folder: Path, settings: Mapping[str, object], step: int) -> tuple[Tracker, Callable[[], object]]:
    with needed_by("--track trackio"):
        import trackio  # pyright: ignore[reportMissingImports]  # an extra
    trackio.init(project="canter", name=folder.resolve().name, config=dict(settings), resume="allow")
    return lambda step, numbers: trackio.log(dict(numbers), step=step), trackio.finish


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
