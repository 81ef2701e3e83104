"""Metrics where people look at them: TensorBoard, Weights & Biases, trackio. metrics.jsonl has them in any case."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from canter.extras import needed_by, require
from canter.fields import to_mapping
from canter.training.config import TrainConfig
from canter.training.run.folder import Run

Track = Callable[[int, Mapping[str, Any]], None]


@contextmanager
def tracked(config: TrainConfig, run: Run, step: int) -> Iterator[Track]:
    """``track(step, metrics)`` for all trackers of the configuration, for a run that goes on at ``step``.

    Raises MissingExtraError for one that is not installed.
    """
    with ExitStack() as stack:
        open_ones = [stack.enter_context(TRACKERS[name](config, run, step)) for name in config.track]

        def track(step: int, metrics: Mapping[str, Any]) -> None:
            numbers = {
                ("" if name.startswith("valid_") else "train_") + name: value
                for name, value in metrics.items()
                if isinstance(value, int | float) and math.isfinite(value) and name not in ("step", "steps")
            }
            for one in open_ones:
                one(step, numbers)

        yield track


@contextmanager
def _tensorboard(config: TrainConfig, run: Run, step: int) -> Iterator[Track]:
    from torch.utils.tensorboard import SummaryWriter

    # what an earlier start logged past its last checkpoint is hidden: those steps are taken again
    with SummaryWriter(str(run.folder / "tensorboard"), purge_step=step + 1) as writer:

        def track(step: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name.replace("_", "/", 1), value, step)

        yield track


@contextmanager
def _wandb(config: TrainConfig, run: Run, step: int) -> Iterator[Track]:
    with needed_by("--track wandb"):
        import wandb  # pyright: ignore[reportMissingImports]  # an extra
    name = run.folder.resolve().name
    started = wandb.init(
        project="canter",
        name=name,
        id=hashlib.blake2b(str(run.folder.resolve()).encode(), digest_size=6).hexdigest(),
        resume="allow",
        dir=str(run.folder),
        config=to_mapping(config),
    )
    try:
        yield lambda step, numbers: started.log(dict(numbers), step=step)
    finally:
        started.finish()


@contextmanager
def _trackio(config: TrainConfig, run: Run, step: int) -> Iterator[Track]:
    with needed_by("--track trackio"):
        import trackio  # pyright: ignore[reportMissingImports]  # an extra
    trackio.init(project="canter", name=run.folder.resolve().name, config=to_mapping(config), resume="allow")
    try:
        yield lambda step, numbers: trackio.log(dict(numbers), step=step)
    finally:
        trackio.finish()


def check(names: Iterable[str]) -> None:
    """Raise MissingExtraError for a tracker that is not installed."""
    for name in names:
        require(name, f"--track {name}")


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
