"""The recipe of a training run: manifest, length index, memory budget, plan, steps, checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from canter.errors import ConfigError
from canter.events import QUIET, Events
from canter.planning.budget import Budget
from canter.ranks import SINGLE_RANK, Ranks, process_group
from canter.runtime import choose_device, keep_freed_memory, map_large_blocks, raise_file_limit
from canter.text import load_tokenizer
from canter.training.config import TrainConfig
from canter.training.defaults import decided, describe_defaults
from canter.training.feed.augment import describe_augmentation, find_augment_files
from canter.training.feed.corpus import find_index, find_tokenizer, load_data, validation_rows
from canter.training.loop import PreparedRun, Trainer
from canter.training.measure import check_memory
from canter.training.run.checkpoints import Checkpoints
from canter.training.run.folder import BEGUN_WITH, RunFolder, claimed, is_first_version, with_first_batch_seconds
from canter.training.run.reports import Progress, StepReport, check_trackers, list_left_out, list_problems
from canter.training.run.upload import restore_upload
from canter.training.schedule import choose_schedule, find_budget, strategy_of
from canter.training.subject import (
    build_model,
    check_freeze,
    choose_subject,
    load_initial,
    load_teacher,
    set_decoding_limits,
)


@dataclass(frozen=True)
class FinishedRun:
    """A run that took its last step."""

    prepared: PreparedRun
    progress: Progress
    first: bool = True
    """True on rank 0."""


def run_training(config: TrainConfig, events: Events[StepReport] = QUIET) -> FinishedRun:
    """Train, or resume, the run of ``config``; under ``torchrun`` or ``srun`` together with the other ranks.

    Only rank 0 calls ``events``. Raises ConfigError for settings that cannot be used, ManifestError for data that
    cannot be used, and KeyboardInterrupt, once everything is saved, if the run was asked to stop.
    """
    raise_file_limit()
    with (
        process_group(config.device, config.rank_timeout) as ranks,
        claimed(config.output) if ranks.first else nullcontext(),
    ):
        if not ranks.first:
            events = QUIET
        prepared = ranks.rank_0_first(lambda: prepare_training(config, events, ranks))
        run, schedule = prepared.run, prepared.schedule
        left_out = run.folder / "left_out.jsonl"
        if ranks.first and (run.changed or not left_out.exists()):
            count = list_left_out(left_out, schedule.plan, prepared.data.index)
            if count:
                events.message(
                    f"{count} of {len(prepared.data.index)} utterances are in no batch, listed in {left_out}"
                )
        trainer = Trainer(prepared, ranks, events)
        if trainer.restore():
            events.message(f"continuing at step {trainer.progress.step} of {schedule.steps}")
            for change in run.changed:
                events.message(f"changed from here on: {change}")
        else:
            minutes = schedule.steps * schedule.step_seconds / 60
            events.message(f"{schedule.steps} steps, about {minutes:.1f} minutes by the budget")
        if config.check_memory and trainer.progress.step < schedule.steps:
            check_memory(trainer.training_step, *trainer.next_window(), schedule.budget, events)
        return FinishedRun(prepared, trainer.train(), ranks.first)


def prepare_training(
    config: TrainConfig, events: Events[StepReport] = QUIET, ranks: Ranks = SINGLE_RANK
) -> PreparedRun:
    """Make or find everything that the run of ``config`` needs before its first step, in its folder.

    Rank 0 must finish first: other ranks only read. Raises ConfigError for settings that cannot be used, and
    ManifestError for a manifest that cannot be used.
    """
    if ranks.first:
        restore_upload(decided(config), events)
    config = with_first_batch_seconds(config, events)
    defaults, config = describe_defaults(config), decided(config)
    check_settings(config)
    if defaults:
        events.message(defaults)
    rows = validation_rows(config)
    run = RunFolder.open(config, writes=ranks.first)
    record = run.recorded()
    if ranks.first:
        run.verify(config.allow_changes, events.message)
        Checkpoints(run.folder / "checkpoints", config.keep_checkpoints).tidy(events.message)

    # manifest -> tokenizer -> model and teacher
    initial = load_initial(config, events, run.checkpoints)
    tokenizer, characters = find_tokenizer(config, run.folder, initial, events)
    model = initial or build_model(config, tokenizer, characters)
    model.tokenizer = tokenizer
    teacher = load_teacher(config, model)

    # length index -> micro-batches
    index = find_index(config, run.folder, tokenizer, events, verify=ranks.first)
    files, unusable = find_augment_files(config, run.folder, events, writes=ranks.first)
    data, problems = load_data(config, model, index, characters, rows, files)
    if ranks.first:
        list_problems(run.folder / "valid.skipped.jsonl", problems, events.message, "validation rows")
    if ranks.first and unusable:
        list_problems(run.folder / "augment.skipped.jsonl", unusable, events.message, "rows of noise")
    if augmented := describe_augmentation(config.augment, files):
        events.message(augmented)

    # budget -> plan
    if choose_device(config.device).type == "cpu":
        keep_freed_memory()
    subject = choose_subject(config, model, record, events, teacher)
    micro_batches = record.get("micro_batches_per_step") or config.micro_batches_per_step or ranks.size
    budget = find_budget(config, run.folder, subject, index, micro_batches, events)
    if subject.device.type == "cpu" and "mmap_threshold" in budget.measured_on:
        map_large_blocks(int(budget.measured_on["mmap_threshold"]))  # memory must behave as it was measured
    set_decoding_limits(model, subject.usable(index), budget, scratch=initial is None)
    schedule = choose_schedule(config, run, subject, index, budget, micro_batches, ranks.size, events)
    decisions = {"precision": subject.precision, "threads": subject.threads, **schedule.decisions}
    if is_first_version(record):
        record.setdefault(BEGUN_WITH, config.batch_seconds)
    run.record(record | decisions)
    return PreparedRun(config, run, data, subject, schedule)


def check_settings(config: TrainConfig) -> None:
    """Check everything that is cheap to check, before anything is read or measured.

    Raises BudgetError, ConfigError, ManifestError or PlanError for what cannot be used.
    """
    if not config.manifest:
        raise ConfigError("no training data: name --manifest FILE, or a configuration file that does")
    if strategy_of(config).packed and config.compile:
        raise ConfigError(
            "--compile compiles layers for padded micro-batches; leave it out, or choose another --strategy"
        )
    check_trackers(config.track)
    choose_device(config.device)
    if config.budget is not None and not (config.output / "budget.json").exists():
        Budget.load(config.budget)
    if config.tokenizer is not None and not (config.output / "tokenizer").exists():
        load_tokenizer(config.tokenizer)
    if config.init is None:
        check_freeze(config)
