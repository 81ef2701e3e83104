"""The training loop: the plan's steps, one after another, shared out to the ranks there are."""

import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from canter.corpus.manifest import Problem
from canter.errors import CanterError, CheckpointError
from canter.models.batch import Batch
from canter.models.model import SpeechModel
from canter.planning.budget import Budget
from canter.planning.elastic import share_out
from canter.planning.plan import Plan
from canter.runtime import is_out_of_memory
from canter.training.config import TrainConfig
from canter.training.distributed.ranks import ALONE, Ranks
from canter.training.feed.data import Loaded, MicroBatches, load_ahead
from canter.training.feed.skipped import check_share
from canter.training.feed.steps import PlannedStep, Steps
from canter.training.feed.waiting import Patience, StoppedWaitingError
from canter.training.run.checkpoints import Checkpoints, read_snapshot
from canter.training.run.folder import Run
from canter.training.run.pace import Pace
from canter.training.run.reports import Part, Parts, Progress, StepReport
from canter.training.run.signals import finish_step_on_signals
from canter.training.run.state import put_back, take_snapshot
from canter.training.step.gradient import ComputedGradient, TargetCounts, TrainingStep, weighted_loss
from canter.training.step.optimizers import Schedule
from canter.training.step.weights import compile_layers, freeze, to_training


@dataclass(frozen=True)
class LoadedStep:
    """This rank's micro-batches of a step."""

    loaded: list[Loaded]
    counts: TargetCounts
    """Targets of the step over all ranks."""
    wait: float
    """Seconds that the rank waited for them."""
    began: float
    """When it began to, by ``time.perf_counter``."""


class Trainer:
    """Takes a model through the steps of a plan, and can stop and go on anywhere.

    ``validate(model, step) -> metrics`` is called after every ``valid_every`` steps and at the end, by all ranks;
    ``report`` is told each step, ``track`` the metrics of steps and validations, ``say`` anything unusual. Randomness
    of a micro-batch comes from (seed, step, its place in the step), never from the rank. ``budget`` is that of the
    memory there is, where the plan's is another (``limited``).
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        model: SpeechModel,
        plan: Plan,
        data: MicroBatches,
        steps: int,
        *,
        precision: str,
        predicted_seconds: float = 0.0,
        budget: Budget | None = None,
        ranks: Ranks = ALONE,
        validate: Callable[[SpeechModel, int], dict[str, Any]] | None = None,
        report: Callable[[StepReport], None] = lambda _: None,
        track: Callable[[int, Mapping[str, Any]], None] = lambda *_: None,
        say: Callable[[str], None] = lambda _: None,
    ):
        self.config, self.run, self.model, self.data, self.steps = config, run, model, data, steps
        self.ranks, self.validate, self.report, self.track, self.say = ranks, validate, report, track, say
        self.device = next(model.parameters()).device
        self.precision = precision
        if config.freeze:
            say(f"{freeze(model, config.freeze):,} parameters stay as they are")
        ranks.same([*model.parameters(), *model.buffers()])
        self.shards = None
        if ranks.size > 1 and config.parallel == "shard":
            from canter.training.distributed.shards import Shards

            self.shards = Shards(model, self.device, ranks)
        if config.compile:
            compile_layers(model)
        settled = run.settled()
        self.schedule = Schedule(settled.get("scheduled", steps), settled.get("schedule", ()))
        self.training_step = TrainingStep(config, model, precision, steps, self.schedule, ranks, self.shards)
        self.gradient, self.optimizers = self.training_step.gradient, self.training_step.optimizers
        self.average = self.training_step.average
        self.upcoming = Steps(plan, ranks, budget)
        self.checkpoints = Checkpoints(run.folder / "checkpoints", config.keep, run.logs)
        self.progress = Progress(plan=plan.fingerprint)
        self.saved = -1  # the step of the last checkpoint
        self.reopen = False  # data is to be loaded anew, by a smaller budget, from the next window on
        self.drawn = False  # all that was to be loaded has been asked for
        self.stopping: Callable[[], bool] = lambda: False  # whether this rank was asked to stop
        self.pace = Pace(config, predicted_seconds / steps, settled.get("timed", 0))
        self.pace.plan(0, steps)

    def restore(self) -> bool:
        """Goes back to the newest checkpoint of the run; false where there is none."""
        newest = self.ranks.agreed(next(iter(reversed(self.checkpoints.whole())), None))
        if newest is None:
            if self.ranks.first:
                self.run.forget_after(0, self.say)  # steps of a run that ended before it saved any
            return False
        snapshot = read_snapshot(newest, self.model)
        self.progress = Progress.from_state(snapshot.state, newest / "training" / "state.json")
        if self.progress.plan not in ("", self.upcoming.plan.fingerprint):
            if not self.config.allow_changes:
                raise CheckpointError(
                    f"{newest} was made with another plan ({self.progress.plan}, this one is "
                    f"{self.upcoming.plan.fingerprint}): was lengths.arrow or budget.json of the run changed? "
                    "Put them back, or take the epoch in hand from its start with --allow-changes"
                )
            self.progress.position, self.progress.tightenings = None, []
        self.progress.plan = self.upcoming.plan.fingerprint
        put_back(snapshot, self.model, self.optimizers, self.average, newest / "model.safetensors")
        self.upcoming.tightenings = self.progress.tightenings
        self.saved = self.progress.step
        if self.ranks.first:
            self.run.forget_after(self.progress.step, self.say)
            if self.run.changed:
                self._event("changed", settings=self.run.changed)
        self.pace.plan(self.progress.step, self.steps)
        return True

    def train(self) -> Progress:
        """Runs to the last step, or until interrupted; either way the last step is saved."""
        config, progress = self.config, self.progress
        to_training(self.model)
        loader = None
        try:
            with finish_step_on_signals() as stopping:
                self.stopping = stopping.is_set
                if progress.step and self._validates(progress.step) and not self._validated():
                    self._validate()  # the run was killed before it was through
                loader, stopped, failed = self._open(), False, ""
                while progress.step < self.steps and not stopped:
                    loaded, failed, stopped = self._load(loader)
                    if stopped:
                        break
                    planned, stopped = self._step(loaded)
                    done = progress.step
                    if done == self.pace.at:
                        self._settle_steps()
                        if self.drawn:  # up to what was the last step then
                            loader.close()
                            loader = self._open()
                    if self.reopen and planned.after.window != planned.window:
                        loader.close()
                        loader, self.reopen = self._open(), False
                    if done < self.steps and not stopped:
                        if done % (config.save_every or config.valid_every) == 0 or self._validates(done):
                            self._save()
                        if self._validates(done):
                            self._validate()
                if stopped and not failed:
                    self.say(f"asked to stop: step {progress.step} is the last, and saved")
                if progress.step > self.saved and progress.step > 0:
                    self._save()
                if not stopped and not self._validated():
                    self._validate()
                self.checkpoints.wait()
                self.ranks.table([0.0])  # a launcher ends those that are left once one has gone
                if failed:
                    raise CanterError(failed)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise CanterError(
                f"step {progress.step + 1}: memory ran out outside of a micro-batch ({str(error)[:200]}), where "
                "nothing can be cut; lower limit_bytes in the run's budget.json and add --allow-changes, or take a "
                "smaller model"
            ) from error
        finally:
            if loader is not None:
                loader.close()
            self.checkpoints.wait()
        if stopped:
            raise KeyboardInterrupt
        return progress

    def first_window(self) -> tuple[Plan, int]:
        """Return the plan of the next step, and the window that the step is in."""
        plan = self.upcoming.plan_of(self.progress.epoch)
        place = self.upcoming.position(self.progress.position, plan)
        window = place.window if place is not None else 0
        return plan, 0 if window == plan.windows.count else window  # the epoch is through

    # -- one step --

    def _open(self) -> Generator[Loaded]:
        """Micro-batches from the next step on, loaded ahead."""
        progress, self.drawn = self.progress, False
        addresses = self.upcoming.addresses(progress.position, progress.epoch, progress.step)
        return load_ahead(
            self.data,
            self._until_the_end(addresses),
            self.config.workers,
            pin=self.device.type == "cuda",
            patience=Patience(self.config.data_timeout, lambda: self.stopping(), self._tell),
            held=math.ceil(self.upcoming.plan.micro_batches_per_step / self.ranks.size),
        )

    def _tell(self, line: str) -> None:
        """Print what concerns this rank, whichever it is."""
        if self.ranks.first:
            self.say(line)
        else:
            print(f"canter: rank {self.ranks.rank}: {line}", file=sys.stderr, flush=True)

    def _until_the_end(self, addresses: Iterator[Any]) -> Iterator[Any]:
        for address in addresses:
            if address.step >= self.steps:
                self.drawn = True
                return
            yield address

    def _load(self, loader: Iterator[Loaded]) -> tuple[LoadedStep, str, bool]:
        """Load the micro-batches of the next step; return them, why a rank could not load its own, and whether the run
        ends before this step: for that reason, or because a rank that was asked to stop waits for data.

        The ranks agree on it, so that none waits for one that has no data, and what is done so far can be saved.
        """
        began = time.perf_counter()
        loaded: list[Loaded] = []
        failed, stopped = "", False
        try:
            while not loaded or not loaded[-1].address.last:
                loaded.append(next(loader))
        except StoppedWaitingError:
            stopped = True
        except CanterError as error:
            if self.progress.step == 0:
                raise  # there is nothing to save
            failed = str(error)
        wait = time.perf_counter() - began
        own = TargetCounts.of([one.batch for one in loaded if one.batch is not None])
        table = self.ranks.table([own.tokens, own.characters, stopped or bool(failed), bool(failed)])
        tokens, characters, ends, faults = table.sum(0).astype(int).tolist()
        if faults:
            said = [one for one in self.ranks.objects(failed) if one]
            failed = said[0]
        return LoadedStep(loaded, TargetCounts(tokens, characters), wait, began), failed, bool(ends)

    def _step(self, ready: LoadedStep) -> tuple[PlannedStep, bool]:
        """Take a step; return it, and whether a rank was asked to stop."""
        began, step = ready.began, self.progress.step
        loaded, counts = ready.loaded, ready.counts
        batches = [one.batch for one in loaded if one.batch is not None]
        planned = self.upcoming.taken(step)
        alone = self.schedule.position(step) < (self.config.loss.ctc_alone or 0.0) * self.schedule.steps
        if self.shards:
            self.shards.gather()
        computed = self.gradient.compute(loaded, counts, step, alone)
        problems = [problem for one in loaded for problem in one.skipped]
        problems += self._unfit(loaded, computed)
        lost = TargetCounts(0, 0)
        if computed.unfit:
            own = TargetCounts.of(batches)
            batches = [some for one in batches if (some := one.without(computed.unfit)) is not None]
            used = TargetCounts.of(batches)
            lost = own.less(used.tokens, used.characters)
        part = Part.of(
            batches,
            lost_tokens=lost.tokens,
            lost_characters=lost.characters,
            attention=computed.attention,
            ctc=computed.ctc,
            seconds=computed.seconds,
            wait=ready.wait,
            frames=max((self._frames(b) for b in batches), default=0),
            padded=round(self.model.padded_seconds * self.data.sample_rate),
            skipped=len(problems),
            cuts=len(computed.splits) + len(computed.unfit),
            memory_peak=self._memory_peak(),
            stopping=float(self.stopping()),
        )
        parts = Parts(self.ranks.table(part.values()))
        left = counts.less(parts.lost_tokens.sum(), parts.lost_characters.sum())
        loss, ctc, attention = self._losses(parts, left, alone)
        self.gradient.correct(counts, left, alone)
        update = self.training_step.update(
            step, computed.numbers, len(planned.rows), ctc_only=alone, finite=math.isfinite(loss)
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
            seconds=time.perf_counter() - began,
            data_wait_seconds=float(parts.wait.mean()),
            audio_seconds=float(parts.samples.sum()) / self.data.sample_rate,
            utterances=int(parts.utterances.sum()),
            batch=int(parts.batch.max()),
            frames_max=int(parts.frames.max()),
            tokens_max=int(parts.tokens.max()),
            padding=float(1 - parts.samples.sum() / parts.room.sum()) if parts.room.sum() else 0.0,
            memory_filled=planned.filled,
            memory_peak=float(parts.memory_peak.max()),
            waiting=float(parts.seconds.max() / max(1e-9, parts.seconds.mean())),
            rank_seconds=tuple(round(float(s), 5) for s in parts.seconds),
            wer=self.progress.wer,
        )
        self.pace.took(max(predicted), report.seconds)
        self._account(report, planned, update.finite)
        self._skip(step + 1, problems, int(parts.skipped.sum()))
        if parts.cuts.any():
            self._tighten(step, planned, computed)
        self.report(report)
        return planned, bool(parts.stopping.any())

    def _losses(self, parts: Any, counts: TargetCounts, alone: bool) -> tuple[float, float, float | None]:
        """(loss, CTC, attention) of the step, over all ranks."""
        ctc = float(parts.ctc.sum()) / max(1, counts.characters)
        attention = None if alone else float(parts.attention.sum()) / max(1, counts.tokens)
        return weighted_loss(self.config.loss, ctc, attention), ctc, attention

    def _account(self, report: StepReport, planned: PlannedStep, finite: bool) -> None:
        """Moves the progress on and logs the step. Raises CanterError after too many steps that are not finite."""
        progress = self.progress
        progress.step, progress.epoch = report.step, planned.epoch
        progress.position = planned.after.as_json()
        progress.seconds += report.seconds
        progress.audio_seconds += report.audio_seconds
        progress.utterances += report.utterances
        self.run.log(kind="train", **vars(report))
        if self.config.log_utterances:
            self.run.log_utterances(report.step, planned.epoch, planned.rows)
        self.track(report.step, vars(report))
        if finite:
            progress.bad = 0
            return
        progress.bad += 1
        rows = [int(row) for some in planned.rows for row in some]
        self._event("not finite", loss=report.loss, gradient_norm=report.gradient_norm, rows=rows)
        self.say(f"step {report.step}: loss {report.loss}, gradient {report.gradient_norm}: left out")
        if progress.bad >= self.config.bad_steps:
            raise CanterError(
                f"step {report.step}: the loss is {report.loss}, its gradient {report.gradient_norm}, and the "
                f"{progress.bad} steps up to here (--bad-steps) were left out for that; lower "
                f"--optimizer.learning-rate, or look at the audio of rows {rows[:5]} ... of lengths.arrow"
            )

    def _frames(self, batch: Batch) -> int:
        return self.model.encoder_frames(batch.audio.shape[1] / self.data.sample_rate)

    def _memory_peak(self) -> float:
        if self.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_reserved(self.device)
        return peak / torch.cuda.get_device_properties(self.device).total_memory

    # -- what goes wrong --

    def _unfit(self, loaded: list[Loaded], computed: ComputedGradient) -> list[Problem]:
        """Utterances that do not fit in memory even alone."""
        batches = [one.batch for one in loaded if one.batch is not None] if computed.unfit else []
        seconds = {
            row: samples / self.data.sample_rate
            for batch in batches
            for row, samples in zip(batch.rows.tolist(), batch.audio_lengths.tolist())
        }
        return [
            Problem(
                self.data.index.utterance(row).audio_filepath,
                row,
                f"{seconds[row]:.1f} s do not fit in memory even alone; cut the audio, or use a larger device",
            )
            for row in computed.unfit
        ]

    def _skip(self, step: int, problems: list[Problem], count: int) -> None:
        """Lists all ranks' unusable utterances. Raises CanterError past the share that is allowed."""
        if not count:
            return
        self.progress.skipped += count
        self.run.skip(step, [problem for some in self.ranks.objects(problems) for problem in some])
        check_share(self.run.folder / "skipped.jsonl", self.progress, self.config.skip_limit, self.ranks)

    def _tighten(self, step: int, planned: PlannedStep, computed: ComputedGradient) -> None:
        """Logs micro-batches that did not fit, and makes the budget smaller from the next window on."""
        cuts = [cut for some in self.ranks.objects(computed.splits) for cut in some]
        for cut in sorted(cuts, key=lambda cut: cut.number):
            limit = self.upcoming.tighten(planned, cut.number)
            self._event("out of memory", **cut.as_json(), size=len(planned.rows[cut.number]), limit=limit)
            self.say(
                f"step {step + 1}: micro-batch {cut.number} of {len(planned.rows[cut.number])} utterances did not fit "
                f"in memory and was cut in {max(cut.parts, cut.decoder_parts)}; smaller ones from the next window on"
            )
        self.progress.tightenings = self.upcoming.tightenings
        self.reopen = True

    def _event(self, what: str, **values: Any) -> None:
        self.run.log(kind="event", step=self.progress.step, what=what, **values)

    # -- between steps --

    def _settle_steps(self) -> None:
        """Estimate the number of steps again, from the time that steps took; the learning rate goes on from where it
        is."""
        progress = self.progress
        steps = self.pace.steps(progress.step, self.steps, progress.seconds)
        self.steps = self.ranks.agreed(steps)
        self.schedule.stretch(progress.step, self.steps)
        self.run.settle(
            self.run.settled()
            | {
                "steps": self.steps,
                "timed": self.pace.settled,
                "scheduled": self.schedule.steps,
                "schedule": self.schedule.stretches,
            }
        )
        self.pace.plan(progress.step, self.steps)

    def _validates(self, step: int) -> bool:
        return self.validate is not None and step % self.config.valid_every == 0

    def _validated(self) -> bool:
        """Whether the step reached has its validation already, or there is none to be had."""
        if self.validate is None or self.progress.step == 0:
            return True
        return self.ranks.agreed(self.ranks.first and self.run.validated(self.progress.step))

    def _save(self) -> None:
        """Copies everything and has it written while the run goes on."""
        self.saved = self.progress.step
        state = self.progress.state()
        snapshot = take_snapshot(state, self.model, self.optimizers, self.average, self.ranks)
        if snapshot is not None:
            self.checkpoints.save(snapshot, self.model, self.data.characters)

    def _validate(self) -> None:
        """WER of the model as it is, or of its average; the best checkpoint is the one of the lowest (of the highest
        BLEU, where translations are validated)."""
        assert self.validate is not None
        done = self.progress.step
        self.model.eval()
        weights = self.average.in_place_of(self.model) if self.average else nullcontext()
        with weights, torch.inference_mode():
            if self.shards:
                self.shards.gather()
            metrics = self.validate(self.model, done)
            if self.shards:
                self.shards.scatter()
        to_training(self.model)
        self.progress.wer = metrics["wer"]
        transcripts = metrics.pop("transcripts", ())
        if not self.ranks.first:
            return
        self.checkpoints.wait()
        if self.checkpoints.is_best(metrics):
            self.checkpoints.set_best(done, metrics)
        self.run.keep_transcripts(done, transcripts)
        self.run.log(kind="valid", step=done, **metrics)  # the last of it: without this line it is done again
        self.track(done, {f"valid_{k}": v for k, v in metrics.items() if isinstance(v, int | float)})
