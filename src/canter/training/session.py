"""From a configuration to a finished run: prepare, restore, train."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from canter.corpus.manifest import Utterance
from canter.corpus.sources import open_source
from canter.training.config import TrainConfig
from canter.training.loop import Progress, StepReport, Trainer
from canter.training.prepare import Prepared, prepare
from canter.training.validation import spread_over, validator

Watch = Callable[[int, int], AbstractContextManager[Callable[[StepReport], None]]]


@dataclass(frozen=True)
class Finished:
    """A run that took its last step."""

    prepared: Prepared
    progress: Progress


def train(
    config: TrainConfig,
    watch: Watch,
    say: Callable[[str], None] = lambda _: None,
    track: Callable[[list, str], Iterable] = lambda items, _: items,
) -> Finished:
    """Trains, or goes on with, the run of ``config``.

    ``watch(steps, done)`` is entered around the steps and told each; ``say`` gets lines, ``track`` short loops.
    Raises KeyboardInterrupt, once all is saved, where the run was asked to stop.
    """
    prepared = prepare(config, say, track)
    validate = None
    if config.valid:
        rows = [row for path in config.valid for row in open_source(path) if isinstance(row, Utterance)]
        rate = prepared.data.sample_rate
        chosen = spread_over(rows, config.valid_utterances)
        validate = validator(chosen, prepared.tokenizer, rate, prepared.precision)
    trainer = Trainer(
        config,
        prepared.run,
        prepared.model,
        prepared.plan,
        prepared.data,
        prepared.steps,
        precision=prepared.precision,
        predicted_seconds=prepared.predicted_seconds,
        validate=validate,
    )
    if trainer.restore():
        say(f"continuing at step {trainer.progress.step} of {prepared.steps}")
    else:
        say(f"{prepared.steps} steps, about {prepared.predicted_seconds / 60:.1f} minutes by the budget")
    with watch(prepared.steps, trainer.progress.step) as report:
        trainer.report = report
        progress = trainer.train()
    return Finished(prepared, progress)
