"""From a configuration to a finished run: prepare, restore, train; on one process or on as many as there are."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canter.loading import load_model
from canter.training.config import TrainConfig
from canter.training.distributed.ranks import joined
from canter.training.feed.skipped import list_left_out
from canter.training.feed.waiting import raise_file_limit
from canter.training.loop import Trainer
from canter.training.prepare import Prepared, prepare
from canter.training.run.folder import claimed
from canter.training.run.reports import Progress, StepReport
from canter.training.run.trackers import tracked
from canter.training.step.rehearsal import rehearse
from canter.training.validation import spread_over, validator

Watch = Callable[[int, int], AbstractContextManager[Callable[[StepReport], None]]]


@dataclass(frozen=True)
class Finished:
    """A run that took its last step."""

    prepared: Prepared
    progress: Progress
    first: bool = True
    """Whether this is the first rank, the one that tells of it."""


def train(
    config: TrainConfig,
    watch: Watch,
    say: Callable[[str], None] = lambda _: None,
    track: Callable[[list, str], Iterable] = lambda items, _: items,
    load: Callable[[Path], Any] = load_model,
) -> Finished:
    """Trains, or goes on with, the run of ``config``; under ``torchrun`` or ``srun`` together with the other ranks.

    ``watch(steps, done)`` is entered around the steps and told each; ``say`` gets lines, ``track`` short loops; all of
    it on the first rank alone. ``load`` reads --init (see ``prepare``). Raises KeyboardInterrupt, once all is
    saved, where the run was asked to stop.
    """
    raise_file_limit()
    with (
        joined(config.device, config.rank_timeout) as ranks,
        claimed(config.output) if ranks.first else nullcontext(),
    ):
        if not ranks.first:
            watch, say, track = _unwatched, lambda _: None, lambda items, _: items
        prepared = ranks.in_turn(lambda: prepare(config, say, track, ranks, load))
        listed = prepared.run.folder / "left_out.jsonl"
        if ranks.first and (prepared.run.changed or not listed.exists()):
            count = list_left_out(listed, prepared.index, prepared.plan)
            if count:
                say(f"{count} of {len(prepared.index)} utterances are in no batch, listed in {listed}")
        validate = None
        if config.valid:
            rate = prepared.data.sample_rate
            limits = prepared.data.longest_seconds, prepared.data.most_tokens
            chosen = spread_over(prepared.valid, config.valid_utterances)
            validate = validator(chosen, prepared.tokenizer, rate, prepared.precision, ranks, say, *limits)
        trainer = Trainer(
            prepared.config,
            prepared.run,
            prepared.model,
            prepared.plan,
            prepared.data,
            prepared.steps,
            precision=prepared.precision,
            predicted_seconds=prepared.predicted_seconds,
            budget=prepared.budget,
            ranks=ranks,
            validate=validate,
            say=say,
        )
        if trainer.restore():
            say(f"continuing at step {trainer.progress.step} of {prepared.steps}")
            for change in prepared.run.changed:
                say(f"changed from here on: {change}")
        else:
            minutes = prepared.predicted_seconds / 60
            say(f"{prepared.steps} steps, about {minutes:.1f} minutes by the budget")
        done = trainer.progress.step
        if config.largest_first and done < prepared.steps:
            rehearse(trainer, prepared.budget, say)
        trackers = tracked(prepared.config, prepared.run, done) if ranks.first else nullcontext(lambda *_: None)
        with trackers as trainer.track, watch(prepared.steps, done) as trainer.report:
            progress = trainer.train()
        return Finished(prepared, progress, ranks.first)


def _unwatched(steps: int, done: int) -> AbstractContextManager[Callable[[StepReport], None]]:
    return nullcontext(lambda _: None)
