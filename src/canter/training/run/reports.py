"""What a step tells: this rank's part of it, and the whole."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np

from canter.errors import CheckpointError
from canter.models.batch import Batch


@dataclass(frozen=True)
class StepReport:
    """One optimiser step over all ranks, as it goes to metrics.jsonl and to the progress bar."""

    step: int
    steps: int
    """Of the run."""
    epoch: int
    loss: float
    loss_ctc: float
    loss_attention: float | None
    learning_rate: float
    gradient_norm: float
    seconds: float
    data_wait_seconds: float
    """On average over ranks."""
    audio_seconds: float
    utterances: int
    batch: int
    frames_max: int
    tokens_max: int
    padding: float
    """Share of the step's samples, what the model pads to included, that is padding."""
    memory_filled: float
    """Predicted bytes of a micro-batch as a share of the budget's limit, on average."""
    memory_peak: float
    """Measured peak as a share of the GPU's memory, of the fullest rank; 0 on a CPU."""
    waiting: float
    """Seconds of the slowest rank over the ranks' mean."""
    rank_seconds: tuple[float, ...]
    """Computing, of each rank."""
    wer: float | None = None
    """Of the last validation."""


@dataclass(frozen=True)
class Part:
    """What one rank did in a step; all numbers, so that ranks can exchange it."""

    attention: float
    ctc: float
    seconds: float
    wait: float
    samples: float
    room: float
    utterances: float
    batch: float
    frames: float
    tokens: float
    skipped: float
    cuts: float
    lost_tokens: float
    """Targets of utterances that did not fit in memory even alone, of each loss."""
    lost_characters: float
    memory_peak: float
    stopping: float
    """Whether it was asked to stop."""

    @classmethod
    def of(cls, batches: Sequence[Batch], padded: int = 0, **values: float) -> "Part":
        """Of the micro-batches that could be loaded; ``padded``: samples to which the model pads every utterance."""
        return cls(
            samples=sum(int(b.audio_lengths.sum()) for b in batches),
            room=sum(len(b.rows) * max(padded, b.audio.shape[1]) for b in batches),
            utterances=sum(len(b.rows) for b in batches),
            batch=max((len(b.rows) for b in batches), default=0),
            tokens=max((b.tokens.shape[1] for b in batches), default=0),
            **values,
        )

    def values(self) -> list[float]:
        return [float(value) for value in astuple(self)]


class Parts:
    """All ranks' parts: ``parts.ctc`` is (ranks,) float64."""

    def __init__(self, table: np.ndarray):
        for name, column in zip(Part.__dataclass_fields__, table.T, strict=True):
            setattr(self, name, column)

    def __getattr__(self, name: str) -> np.ndarray:  # only for names that are no part's
        raise AttributeError(name)


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    """Steps taken."""
    epoch: int = 0
    position: dict[str, Any] | None = None
    """Of the plan, within the epoch; none: at its start."""
    seconds: float = 0.0
    """Spent in training steps, over all starts."""
    audio_seconds: float = 0.0
    utterances: int = 0
    skipped: int = 0
    bad: int = 0
    """Steps in a row, up to this one, that were left out for a loss or gradient that is not finite."""
    wer: float | None = None
    """Of the last validation."""
    plan: str = ""
    """Fingerprint of the plan that the run began with."""
    tightenings: list[list[float]] = field(default_factory=list)
    """See ``Steps``."""

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_state(cls, values: Any, source: Any) -> "Progress":
        """Return the inverse of ``state``. Raises CheckpointError, naming ``source``, for fields that are unknown or of
        another type."""
        kinds: dict[str, tuple[type, ...]] = {
            name: (type(value),) for name, value in vars(cls()).items() if value is not None
        }
        kinds |= {"position": (dict, type(None)), "wer": (float, int, type(None))}
        for name in ("seconds", "audio_seconds"):
            kinds[name] = (float, int)
        if not isinstance(values, dict):
            raise CheckpointError(f"{source} holds a {type(values).__name__}, not a JSON object")
        for name, value in values.items():
            if name not in kinds:
                raise CheckpointError(f"{source}: unknown field {name!r}; was it written by a newer Canter?")
            if not isinstance(value, kinds[name]) or isinstance(value, bool):
                raise CheckpointError(f"{source}: {name} is {value!r}; the training state is damaged")
        return cls(**values)
