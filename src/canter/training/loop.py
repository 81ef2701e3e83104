"""The training loop: optimiser steps in the order of the plan, validations and checkpoints between them."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import cast

import numpy as np
import torch

from canter.corpus.utterance import Problem
from canter.errors import CanterError, CheckpointError
from canter.events import QUIET, Events
from canter.fields import to_mapping
from canter.models.batch import Batch
from canter.models.hub import ADAPTER_WEIGHTS, WEIGHTS
from canter.models.model import SpeechModel
from canter.models.protocol import module_of
from canter.planning.elastic import share_out
from canter.planning.plan import Plan
from canter.planning.sampler import PlannedStep
from canter.ranks import SINGLE_RANK, Ranks
from canter.runtime import is_out_of_memory
from canter.text.characters import Characters
from canter.training.config import TrainConfig
from canter.training.feed.corpus import TrainingData
from canter.training.feed.data import Address, Loaded, Patience, Steps, StoppedWaitingError, load_ahead
from canter.training.run.card import TrainedOn, model_card
from canter.training.run.checkpoints import Checkpoints, Scores, read_snapshot, restore_snapshot, take_snapshot
from canter.training.run.folder import RunFolder
from canter.training.run.reports import Progress, StepReport, Tracker, check_skipped, open_trackers
from canter.training.run.upload import Uploads
from canter.training.schedule import Pace, TrainingSchedule
from canter.training.step.gradient import ComputedGradient, TargetCounts, TrainingStep, weighted_loss
from canter.training.step.optimizers import Schedule
from canter.training.step.weights import compile_layers, freeze, to_training
from canter.training.subject import Subject

SAMPLED = 100  # rows of the training data whose languages the model card names
SAME_SIGNAL = 1.0  # seconds within which signals are one: 'timeout', 'uv run' and batch systems pass them twice


@dataclass(frozen=True)
class PreparedRun:
    """Everything that a run needs before its first step."""

    config: TrainConfig
    run: RunFolder
    data: TrainingData
    subject: Subject
    schedule: TrainingSchedule


@dataclass(frozen=True)
class LoadedStep:
    """One rank's micro-batches of a step."""

    loaded: list[Loaded]
    counts: TargetCounts
    """Targets of the step over all ranks."""
    wait: float
    """Seconds that this rank waited for data."""
    began: float
    """Start of the wait, by ``time.perf_counter``."""
    ends: bool
    """True if the run ends before this step: a rank cannot load its data, or was asked to stop while it waited."""
    error: str
    """Reason of the first rank that cannot load its data."""

    @property
    def batches(self) -> list[Batch]:
        return [one.batch for one in self.loaded if one.batch is not None]


class Trainer:
    """Optimiser steps of a run, which can be interrupted after any step and resumed.

    The randomness of a micro-batch depends on (seed, step, its number in the step), never on the rank.
    """

    def __init__(self, prepared: PreparedRun, ranks: Ranks = SINGLE_RANK, events: Events[StepReport] = QUIET):
        self.prepared = prepared
        config, subject, schedule = prepared.config, prepared.subject, prepared.schedule
        self.config, self.subject, self.ranks, self.events = config, subject, ranks, events
        self.run, self.log = prepared.run, prepared.run.log
        self.data, self.model, self.device = prepared.data.micro_batches, subject.model, subject.device
        self.module = module_of(self.model)
        self.steps = schedule.steps
        self.validate = None
        if config.valid:
            from canter.training.validation import Validator, spread_over

            chosen = spread_over(prepared.data.valid, config.valid_utterances)
            self.validate = Validator(chosen, self.data, subject.precision, ranks, events)
        if config.freeze and self.model.adapter is None:
            events.message(f"{freeze(self.module, config.freeze):,} parameters are frozen")
        ranks.broadcast([*self.model.parameters(), *self.model.buffers()])
        self.shards = None
        if ranks.size > 1 and config.parallel == "shard":
            from canter.training.distributed.shards import Shards

            self.shards = Shards(self.model, self.device, ranks)
        if config.compile:
            compile_layers(cast(SpeechModel, self.model))
        record = self.run.recorded()
        self.schedule = Schedule(record.get("scheduled", self.steps), record.get("schedule", ()))
        self.training_step = TrainingStep(
            config, self.model, subject.precision, self.steps, self.schedule, ranks, self.shards, subject.teacher
        )
        self.gradient, self.optimizers = self.training_step.gradient, self.training_step.optimizers
        self.average = self.training_step.average
        self.upcoming = Steps(schedule.plan, ranks, schedule.budget)
        self.uploads = Uploads(self.run.folder, config.upload, events) if config.upload and ranks.first else None
        written = self.uploads.start if self.uploads else lambda: None
        self.checkpoints = Checkpoints(
            self.run.folder / "checkpoints", config.keep_checkpoints, self.log.files, written
        )
        self.progress = Progress(plan=schedule.plan.fingerprint)
        self.saved = -1  # step of the last checkpoint
        self.reopen = False  # load data again, for a smaller budget, from the next window on
        self.drawn = False  # the data of all steps has been requested
        self.stopping = threading.Event()  # set when this rank is asked to stop
        self.unaugmented: set[str] = set()  # files of noise that could not be read, and were named
        self.track: Tracker = lambda step, numbers: None
        self.pace = Pace(config, schedule.step_seconds, record.get("timed", 0))
        self.pace.plan(0, self.steps)

    def restore(self) -> bool:
        """Restore the newest checkpoint of the run; return False if there is none."""
        newest = self.ranks.broadcast_object(next(iter(reversed(self.checkpoints.complete())), None))
        if newest is None:
            if self.ranks.first:
                self.log.forget_after(0, self.events.message)  # the run ended before it saved these steps
            return False
        snapshot = read_snapshot(newest, self.model)
        plan = self.upcoming.plan.fingerprint
        self.progress = Progress.from_state(snapshot.state, newest / "training" / "state.json")
        if self.progress.plan not in ("", plan):
            if not self.config.allow_changes:
                raise CheckpointError(
                    f"{newest} was made with another plan ({self.progress.plan}, this one is {plan}): was "
                    "lengths.arrow or budget.json of the run changed? Restore them, or start the current epoch again "
                    "with --allow-changes"
                )
            self.progress.position, self.progress.tightenings = None, []
        self.progress.plan = plan
        weights = newest / (WEIGHTS if self.model.adapter is None else ADAPTER_WEIGHTS)
        restore_snapshot(snapshot, self.model, self.optimizers, self.average, weights)
        self.upcoming.tightenings = self.progress.tightenings
        self.saved = self.progress.step
        if self.ranks.first:
            self.log.forget_after(self.progress.step, self.events.message)
            if self.run.changed:
                self.log.event(self.progress.step, "changed", settings=self.run.changed)
        self.pace.plan(self.progress.step, self.steps)
        return True

    def train(self) -> Progress:
        """Train to the last step, or until interrupted; the last step taken is saved.

        Raises KeyboardInterrupt, once everything is saved, if the run was asked to stop.
        """
        progress = self.progress
        to_training(self.module)
        trackers = self.config.track if self.ranks.first else ()
        loader = None
        try:
            with (
                open_trackers(trackers, self.run.folder, to_mapping(self.config), progress.step) as self.track,
                self.events.running(self.steps, progress.step),
                finish_step_on_signals() as self.stopping,
            ):
                if progress.step and self._is_validation(progress.step) and not self._is_validated():
                    self._validate()  # the run was killed during it
                loader, stopped, failure = self._open(), False, ""
                while progress.step < self.steps and not stopped:
                    ready = self._load(loader)
                    if ready.ends:
                        stopped, failure = True, ready.error
                        break
                    planned, stopped = self._step(ready)
                    loader = self._maintain(loader, planned)
                    if progress.step < self.steps and not stopped:
                        self._save_and_validate()
                if stopped and not failure:
                    self.events.message(f"asked to stop: step {progress.step} is the last, and saved")
                if progress.step > self.saved and progress.step > 0:
                    self._save()
                if not stopped and not self._is_validated():
                    self._validate()
                if self.validate is None and self.ranks.first and progress.step > 0:
                    self.checkpoints.add_card(progress.step, self._card(None))
                self.checkpoints.wait()
                if self.uploads:
                    self.uploads.finish()
                self.ranks.all_gather([0.0])  # a launcher ends the other ranks once one has ended
            if failure:
                raise CanterError(failure)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise CanterError(
                f"step {progress.step + 1}: memory ran out outside of a micro-batch ({str(error)[:200]}), which cannot "
                "be split; lower limit_bytes in the run's budget.json and add --allow-changes, or use a smaller model"
            ) from error
        finally:
            if loader is not None:
                loader.close()
            self.checkpoints.wait()
        if stopped:
            raise KeyboardInterrupt
        return progress

    # -- data --

    def next_window(self) -> tuple[Plan, int]:
        """Return the plan of the next step, and the step's window."""
        plan = self.upcoming.plan_of(self.progress.epoch)
        place = self.upcoming.position(self.progress.position, plan)
        window = place.window if place is not None else 0
        return plan, 0 if window == plan.windows.count else window  # the epoch may be complete

    def _open(self) -> Generator[Loaded]:
        """Load micro-batches ahead, from the next step on."""
        self.drawn = False
        return load_ahead(
            self.data,
            self._addresses(),
            self.config.workers,
            pin=self.device.type == "cuda",
            patience=Patience(self.config.data_timeout, lambda: self.stopping.is_set(), self._warn),
            held=math.ceil(self.upcoming.plan.micro_batches_per_step / self.ranks.size),
        )

    def _addresses(self) -> Iterator[Address]:
        progress = self.progress
        for address in self.upcoming.addresses(progress.position, progress.epoch, progress.step):
            if address.step >= self.steps:
                self.drawn = True
                return
            yield address

    def _warn(self, message: str) -> None:
        """Print a message of this rank, whichever it is."""
        if self.ranks.first:
            self.events.message(message)
        else:
            print(f"canter: rank {self.ranks.rank}: {message}", file=sys.stderr, flush=True)

    def _load(self, loader: Iterator[Loaded]) -> LoadedStep:
        """Load this rank's micro-batches of the next step.

        The ranks agree on whether the run ends before it, so that none waits for one that has no data, and the steps
        so far can be saved.
        """
        began = time.perf_counter()
        loaded: list[Loaded] = []
        error, stopped = "", False
        try:
            while not loaded or not loaded[-1].address.last:
                loaded.append(next(loader))
        except StoppedWaitingError:
            stopped = True
        except CanterError as caught:
            if self.progress.step == 0:
                raise  # there is nothing to save
            error = str(caught)
        wait = time.perf_counter() - began
        mine = TargetCounts.of([one.batch for one in loaded if one.batch is not None])
        table = self.ranks.all_gather([mine.tokens, mine.characters, stopped or bool(error), bool(error)])
        tokens, characters, ends, errors = table.sum(0).astype(int).tolist()
        if errors:
            error = next(one for one in self.ranks.all_gather_objects(error) if one)
        return LoadedStep(loaded, TargetCounts(tokens, characters), wait, began, bool(ends), error)

    # -- one step --

    def _step(self, ready: LoadedStep) -> tuple[PlannedStep, bool]:
        """Take a step; return it, and whether a rank was asked to stop."""
        step = self.progress.step
        planned = self.upcoming.taken(step)
        ctc_only = self.schedule.position(step) < (self.config.loss.ctc_warmup or 0.0) * self.schedule.steps
        if self.shards:
            self.shards.gather()
        computed = self.gradient.compute(ready.loaded, ready.counts, step, ctc_only)
        problems = [problem for one in ready.loaded for problem in one.skipped] + self._unfit(ready, computed)
        unaugmented = [problem for one in ready.loaded for problem in one.unaugmented]
        ranks = self.ranks.all_gather_named(self._numbers(ready, computed, len(problems), len(unaugmented)))
        counts = ready.counts.less(ranks["lost_tokens"].sum(), ranks["lost_characters"].sum())
        ctc = float(ranks["ctc"].sum()) / max(1, counts.characters)
        attention = None if ctc_only else float(ranks["attention"].sum()) / max(1, counts.tokens)
        teacher = None
        if self.gradient.teacher and not ctc_only:
            teacher = float(ranks["distillation"].sum()) / max(1, counts.tokens)
        loss = weighted_loss(self.config.loss, ctc, attention, teacher)
        self.gradient.correct(ready.counts, counts, ctc_only)
        update = self.training_step.update(
            step, computed.numbers, len(planned.rows), ctc_only=ctc_only, finite=math.isfinite(loss)
        )
        predicted = [float(planned.seconds[s].sum()) for s in share_out(planned.seconds, self.ranks.size)]
        report = StepReport(
            step=step + 1,
            steps=self.steps,
            epoch=planned.epoch,
            loss=loss,
            loss_ctc=ctc,
            loss_attention=attention,
            learning_rate=update.learning_rate,
            gradient_norm=update.gradient_norm,
            seconds=time.perf_counter() - ready.began,
            data_wait_seconds=float(ranks["wait"].mean()),
            audio_seconds=float(ranks["samples"].sum()) / self.data.sample_rate,
            utterances=int(ranks["utterances"].sum()),
            batch=int(ranks["batch"].max()),
            frames_max=int(ranks["frames"].max()),
            tokens_max=int(ranks["tokens"].max()),
            padding=float(1 - ranks["samples"].sum() / padded) if (padded := ranks["padded_samples"].sum()) else 0.0,
            memory_filled=planned.filled,
            memory_peak=float(ranks["memory_peak"].max()),
            waiting=float(ranks["seconds"].max() / max(1e-9, ranks["seconds"].mean())),
            rank_seconds=tuple(round(float(s), 5) for s in ranks["seconds"]),
            wer=self.progress.wer,
            loss_teacher=teacher,
        )
        self.pace.took(max(predicted), report.seconds)
        self._account(report, planned, update.finite)
        self._skip(step + 1, problems, int(ranks["skipped"].sum()))
        if ranks["unaugmented"].any():
            self._name_unaugmented(step + 1, unaugmented)
        if ranks["splits"].any():
            self._tighten(step, planned, computed)
        self.events.step(report)
        return planned, bool(ranks["stopping"].any())

    def _padded_samples(self, batch: Batch, least: int) -> int:
        """Return the samples that a micro-batch's layers see, padding included; ``least``: those of an utterance."""
        if self.gradient.packed:
            return int(batch.audio_lengths.clamp(min=least).sum())
        return len(batch.rows) * max(least, batch.audio.shape[1])

    def _numbers(
        self, ready: LoadedStep, computed: ComputedGradient, skipped: int, unaugmented: int
    ) -> dict[str, float]:
        """Return this rank's numbers of the step, to be gathered from all ranks."""
        batches, lost = ready.batches, TargetCounts(0, 0)
        if computed.unfit:
            loaded = TargetCounts.of(batches)
            batches = [some for one in batches if (some := one.without(computed.unfit)) is not None]
            used = TargetCounts.of(batches)
            lost = loaded.less(used.tokens, used.characters)
        memory_peak, rate = 0.0, self.data.sample_rate
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self.device)
            memory_peak = peak / torch.cuda.get_device_properties(self.device).total_memory
        padded = round(self.model.padded_seconds * rate)  # samples to which the model pads every utterance
        return {
            "attention": computed.attention,
            "ctc": computed.ctc,
            "distillation": computed.distillation,
            "seconds": computed.seconds,
            "wait": ready.wait,
            "samples": sum(int(b.audio_lengths.sum()) for b in batches),
            "padded_samples": sum(self._padded_samples(b, padded) for b in batches),
            "utterances": sum(len(b.rows) for b in batches),
            "batch": max((len(b.rows) for b in batches), default=0),
            "frames": max((self.model.encoder_frames(b.audio.shape[1] / rate) for b in batches), default=0),
            "tokens": max((b.tokens.shape[1] for b in batches), default=0),
            "skipped": skipped,
            "unaugmented": unaugmented,
            "splits": len(computed.splits) + len(computed.unfit),
            "lost_tokens": lost.tokens,
            "lost_characters": lost.characters,
            "memory_peak": memory_peak,
            "stopping": self.stopping.is_set(),
        }

    def _account(self, report: StepReport, planned: PlannedStep, finite: bool) -> None:
        """Add the step to progress and logs. Raise CanterError after too many non-finite steps."""
        progress = self.progress
        progress.add(report)
        progress.position = planned.after.as_json()
        self.log.add(kind="train", **vars(report))
        if self.config.log_utterances:
            self.log.add_utterances(report.step, planned.epoch, planned.rows)
        self._track(report.step, vars(report))
        progress.bad = 0 if finite else progress.bad + 1
        if finite:
            return
        rows = [int(row) for some in planned.rows for row in some]
        self.log.event(report.step, "not finite", loss=report.loss, gradient_norm=report.gradient_norm, rows=rows)
        self.events.message(f"step {report.step}: loss {report.loss}, gradient {report.gradient_norm}: skipped")
        if progress.bad >= self.config.max_bad_steps:
            raise CanterError(
                f"step {report.step}: the loss is {report.loss}, its gradient {report.gradient_norm}, and the last "
                f"{progress.bad} steps (max_bad_steps) were skipped for that; lower --optimizer.learning-rate, or "
                f"check the audio of rows {rows[:5]} ... of lengths.arrow"
            )

    def _track(self, step: int, metrics: Mapping[str, object]) -> None:
        self.track(step, metrics)
        self.events.metrics(step, metrics)

    # -- unusable utterances, and micro-batches that do not fit in memory --

    def _unfit(self, ready: LoadedStep, computed: ComputedGradient) -> list[Problem]:
        """Return a problem for each utterance that does not fit in memory as a batch of one."""
        seconds = {
            row: samples / self.data.sample_rate
            for batch in (ready.batches if computed.unfit else ())
            for row, samples in zip(batch.rows.tolist(), batch.audio_lengths.tolist())
        }
        return [
            Problem(
                self.data.index.utterance(row).audio_filepath,
                row,
                f"{seconds[row]:.1f} s do not fit in memory even as a batch of one; cut the audio, or use a larger "
                "device",
            )
            for row in computed.unfit
        ]

    def _skip(self, step: int, problems: list[Problem], count: int) -> None:
        """List the unusable utterances of all ranks. Raise CanterError if they are too many."""
        if count:
            self.progress.skipped += count
            everyone = self.ranks.all_gather_objects(problems)
            self.log.add_skipped(step, [problem for some in everyone for problem in some])
            check_skipped(
                self.log, self.progress, self.config.max_skipped, self.ranks, ended=self.progress.step == self.steps
            )

    def _name_unaugmented(self, step: int, problems: list[Problem]) -> None:
        """Name each file of noise that a rank could not read, once."""
        for problem in [one for some in self.ranks.all_gather_objects(problems) for one in some]:
            if problem.file not in self.unaugmented:
                self.unaugmented.add(problem.file)
                self.log.event(step, "unaugmented", file=problem.file, reason=problem.reason)
                self.events.message(
                    f"step {step}: {problem.reason}; utterances that drew it are trained without its noise or room"
                )

    def _tighten(self, step: int, planned: PlannedStep, computed: ComputedGradient) -> None:
        """Log micro-batches that did not fit, and lower the budget from the next window on."""
        splits = [split for some in self.ranks.all_gather_objects(computed.splits) for split in some]
        for split in sorted(splits, key=lambda split: split.number):
            size = len(planned.rows[split.number])
            limit = self.upcoming.tighten(planned, split.number)
            self.log.event(self.progress.step, "out of memory", **split.as_json(), size=size, limit=limit)
            self.events.message(
                f"step {step + 1}: micro-batch {split.number} of {size} utterances did not fit in memory and was split "
                f"in {max(split.parts, split.decoder_parts)}; smaller ones from the next window on"
            )
        self.progress.tightenings = self.upcoming.tightenings
        self.reopen = True

    # -- between steps --

    def _maintain(self, loader: Generator[Loaded], planned: PlannedStep) -> Generator[Loaded]:
        """Estimate the number of steps again when it is time; return the loader, a new one if the data changed."""
        reopen = False
        if self.progress.step == self.pace.at:
            self._estimate_steps()
            reopen = self.drawn  # it ends at the former last step
        if self.reopen and planned.after.window != planned.window:
            reopen, self.reopen = True, False
        if not reopen:
            return loader
        loader.close()
        return self._open()

    def _estimate_steps(self) -> None:
        """Estimate the number of steps from measured step times, and stretch the learning-rate schedule to it."""
        progress = self.progress
        steps = self.pace.steps(progress.step, self.steps, progress.seconds)
        self.steps = self.ranks.broadcast_object(steps)
        self.schedule.stretch(progress.step, self.steps)
        decisions = {
            "steps": self.steps,
            "timed": self.pace.estimates,
            "scheduled": self.schedule.steps,
            "schedule": self.schedule.stretches,
        }
        self.run.record(self.run.recorded() | decisions)
        self.pace.plan(progress.step, self.steps)

    def _save_and_validate(self) -> None:
        """Save a checkpoint and validate, if it is time for it."""
        step = self.progress.step
        if step % (self.config.save_every or self.config.valid_every) == 0 or self._is_validation(step):
            self._save()
        if self._is_validation(step):
            self._validate()

    def _is_validation(self, step: int) -> bool:
        return self.validate is not None and step % self.config.valid_every == 0

    def _is_validated(self) -> bool:
        """Return whether the current step has been validated, or needs no validation."""
        if self.validate is None or self.progress.step == 0:
            return True
        return self.ranks.broadcast_object(self.ranks.first and self.log.has_validation(self.progress.step))

    def _save(self) -> None:
        """Copy the training state, and have it written while training continues."""
        self.saved = self.progress.step
        state = self.progress.state()
        snapshot = take_snapshot(state, self.model, self.optimizers, self.average, self.ranks)
        if snapshot is not None:
            targets = self.data.ctc_targets
            alphabet = targets if isinstance(targets, Characters) else None
            self.checkpoints.save(snapshot, self.model, alphabet)

    def _card(self, metrics: Scores | None) -> str:
        """Return the model card of the current step, for a validation with ``metrics``."""
        index, progress = self.prepared.data.index, self.progress
        trained = TrainedOn(
            progress.step,
            progress.audio_seconds,
            float(np.sum(index.seconds, dtype=np.float64)),
            len(index),
            self.languages,
            sum(self.model.parts().values()),
        )
        return model_card(self.config, trained, metrics)

    @cached_property
    def languages(self) -> Sequence[str]:
        """Languages of a sample of the training data, and of the validation data."""
        data, size = self.prepared.data, len(self.prepared.data.index)
        try:
            rows = [data.index.utterance(row) for row in range(0, size, max(1, size // SAMPLED))]
        except CanterError:  # manifests that are gone end no run
            rows = []
        return sorted({lang for row in (*rows, *data.valid) if (lang := row.text_lang)})

    def _validate(self) -> None:
        """Validate the model, or its moving average, and mark the checkpoint if it is the best."""
        assert self.validate is not None
        step = self.progress.step
        self.model.eval()
        weights = self.average.in_place_of(self.module) if self.average else nullcontext()
        with weights, torch.inference_mode():
            if self.shards:
                self.shards.gather()
            validation = self.validate(self.model)
            if self.shards:
                self.shards.scatter()
        to_training(self.module)
        self.progress.wer = validation.metrics["wer"]
        if not self.ranks.first:
            return
        self.checkpoints.wait()
        if self.checkpoints.is_best(validation.metrics):
            self.checkpoints.set_best(step, validation.metrics, self._card(validation.metrics))
        self.log.add_validation(step, validation.metrics, validation.transcripts)
        numbers = {f"valid_{k}": v for k, v in validation.metrics.items() if isinstance(v, int | float)}
        self._track(step, numbers)


@contextmanager
def finish_step_on_signals() -> Iterator[threading.Event]:
    """Context manager in which SIGINT and SIGTERM set the event that it yields, so that the current step can finish.

    A later signal interrupts at once.
    """
    stopping = threading.Event()
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not stopping.is_set():
            first = time.monotonic()
            stopping.set()
        elif time.monotonic() - first > SAME_SIGNAL:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
