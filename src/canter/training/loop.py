"""The training loop: the plan's steps, one after another, on one process."""

import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from canter.errors import CanterError
from canter.models.augment import SpecAugmentConfig, spec_augment
from canter.models.files import read_tensors
from canter.models.fitting import fit_tensors
from canter.models.model import Batch, SpeechModel
from canter.models.norm import merge_pending
from canter.planning.plan import Plan, Position
from canter.training.config import LossConfig, TrainConfig
from canter.training.data import Address, Loaded, MicroBatches, load_ahead
from canter.training.optimizers import Optimizers
from canter.training.run import Run

UNTIMED = 10  # first steps, which wait for workers to start


@dataclass(frozen=True)
class StepReport:
    """One optimiser step, as it goes to metrics.jsonl and to the progress bar."""

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
    audio_seconds: float
    utterances: int
    batch: int
    frames_max: int
    tokens_max: int
    padding: float
    """Share of the step's samples that is padding."""


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

    def state(self) -> dict[str, Any]:
        return dict(vars(self))


class Trainer:
    """Takes a model through the steps of a plan, and can stop and go on anywhere.

    ``validate(model) -> metrics`` is called after every ``valid_every`` steps and at the end; ``report`` is told each
    step. Randomness of a micro-batch comes from (seed, step, its place in the step).
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
        validate: Callable[[SpeechModel, int], dict[str, Any]] | None = None,
        report: Callable[[StepReport], None] = lambda _: None,
    ):
        self.config, self.run, self.model, self.plan, self.data = config, run, model, plan, data
        self.steps, self.precision, self.validate, self.report = steps, precision, validate, report
        self.device = next(model.parameters()).device
        self.optimizers = Optimizers(model, config.optimizer, steps)
        self.augment = SpecAugmentConfig(**vars(config.augment))
        self.progress = Progress()
        self.after: dict[int, tuple[int, Position]] = {}  # step -> epoch and position once it is done
        self.timed: list[tuple[float, float]] = []  # seconds of each step, as predicted and as taken
        self.mean_seconds = predicted_seconds / steps
        self.settle_at = self._next_settling()

    def restore(self) -> bool:
        """Goes back to the newest checkpoint of the run; false where there is none."""
        if not self.run.checkpoints:
            return False
        newest = self.run.checkpoints[-1]
        state, optimizers = self.run.restore(newest)
        weights = newest / "model.safetensors"
        fit_tensors(self.model, read_tensors(weights), weights)
        self.optimizers.load_state_dict(optimizers)
        self.progress = Progress(**state)
        self.run.forget_after(self.progress.step)
        self.settle_at = self._next_settling()
        return True

    def addresses(self) -> Iterator[Address]:
        """The micro-batches still to come."""
        progress = self.progress
        step, epoch = progress.step, progress.epoch
        start = Position.from_json(progress.position) if progress.position else None
        while step < self.steps:
            plan = self.plan.at_epoch(epoch)
            began = step
            for position, micro_batches in plan.steps(start):
                if step >= self.steps:
                    return
                self.after[step] = (epoch, position)
                for number, rows in enumerate(micro_batches):
                    yield Address(step, number, number == len(micro_batches) - 1, rows)
                step += 1
            if step == began and start is None:
                raise CanterError("the plan has no step: every utterance is too long or otherwise left out")
            epoch, start = epoch + 1, None

    def train(self) -> Progress:
        """Runs to the last step, or until interrupted; either way the last step is saved."""
        loader = load_ahead(self.data, self.addresses(), self.config.workers, pin=self.device.type == "cuda")
        self.model.train()
        with _finish_step_on_signals() as stopping:
            while self.progress.step < self.steps and not stopping.is_set():
                self.report(self._step(loader))
                done = self.progress.step
                if done == self.settle_at:
                    self._settle_steps()
                if done % self.config.valid_every == 0 and done < self.steps:
                    self.checkpoint()
            if self.progress.step > 0:
                self.checkpoint(final=not stopping.is_set())
        if stopping.is_set():
            raise KeyboardInterrupt
        return self.progress

    def checkpoint(self, final: bool = True) -> None:
        """Saves, and validates unless the run is being interrupted."""
        done = self.progress.step
        state, optimizers = self.progress.state(), self.optimizers.state_dict()
        folder = self.run.save(self.model, self.data.characters, state, optimizers, self.config.keep)
        if self.validate is None or not final:
            return
        self.model.eval()
        with torch.inference_mode():
            metrics = self.validate(self.model, done)
        self.model.train()
        self.run.log(kind="valid", step=done, **metrics)
        best = self.run.best()
        if best is None or metrics["wer"] <= best["wer"]:
            self.run.set_best(folder, metrics["wer"])

    def _step(self, loader: Iterator[Loaded]) -> StepReport:
        began = time.perf_counter()
        step, wait, skipped = self.progress.step, 0.0, 0
        loaded: list[Loaded] = []
        while not loaded or not loaded[-1].address.last:
            waited = time.perf_counter()
            loaded.append(next(loader))
            wait += time.perf_counter() - waited
            self.run.skip(loaded[-1].skipped)
            skipped += len(loaded[-1].skipped)
        batches = [one.batch for one in loaded if one.batch is not None]
        alone = step < self.config.loss.ctc_alone * self.steps
        sums = Sums()
        counts = Counts.of(batches)
        for one in loaded:
            if one.batch is not None:
                torch.manual_seed(_seed(self.config.seed, step, one.address.number))
                batch = one.batch.to(self.device)
                sums.add(self._backward(batch, counts, alone, self.after[step][0]))
        merge_pending(self.model)
        rate, norm = self.optimizers.step(step)
        ctc = sums.ctc / max(1, counts.characters)
        attention = None if alone else sums.attention / max(1, counts.tokens)
        loss = _weighted(self.config.loss, ctc, attention)
        if not math.isfinite(loss):
            raise CanterError(
                f"step {step + 1}: the loss is {loss}; lower --optimizer.learning-rate, or look at the audio of rows "
                f"{loaded[0].address.rows[:5].tolist()} ... of lengths.arrow"
            )
        samples = sum(int(b.audio_lengths.sum()) for b in batches)
        room = sum(b.audio.numel() for b in batches)
        report = StepReport(
            step=step + 1,
            steps=self.steps,
            epoch=self.after[step][0],
            loss=loss,
            loss_ctc=ctc,
            loss_attention=attention,
            learning_rate=rate,
            gradient_norm=norm,
            seconds=time.perf_counter() - began,
            data_wait_seconds=wait,
            audio_seconds=samples / self.data.sample_rate,
            utterances=sum(len(b.rows) for b in batches),
            batch=max((len(b.rows) for b in batches), default=0),
            frames_max=max(
                (self.model.encoder_frames(b.audio.shape[1] / self.data.sample_rate) for b in batches),
                default=0,
            ),
            tokens_max=max((b.tokens.shape[1] for b in batches), default=0),
            padding=1 - samples / room if room else 0.0,
        )
        if self.settle_at is not None:
            self.timed.append((self._predicted_seconds(batches), report.seconds))
        self._advance(report, skipped)
        return report

    def _predicted_seconds(self, batches: list[Batch]) -> float:
        """Of a step of these micro-batches, by the budget."""
        budget, rate = self.plan.budgets[0][1], self.data.sample_rate
        shapes = [(len(b.rows), budget.frames(b.audio.shape[1] / rate), b.tokens.shape[1]) for b in batches]
        return sum(budget.step_seconds(*shape) for shape in shapes)

    def _next_settling(self) -> int | None:
        """The step after which the number of steps is set anew, where it follows from --minutes: early, and once the
        decoder is trained too. None where it stands."""
        shares = (0.02, self.config.loss.ctc_alone + 0.08)
        settled = self.run.settled().get("timed", 0)
        if self.config.minutes is None or self.config.steps is not None or settled >= len(shares):
            return None
        return max(self.progress.step + 2 * UNTIMED, round(shares[settled] * self.steps))

    def _settle_steps(self) -> None:
        """Sets the number of steps anew by the steps last timed: with data decoded beside it and other work on the
        machine, a step takes longer than in a probe."""
        recent = self.timed[UNTIMED:][-max(UNTIMED, self.steps // 20) :]
        predicted, taken = map(sum, zip(*recent, strict=True))
        left = (self.config.minutes or 0) * 60 - self.progress.seconds
        mean = self.mean_seconds * taken / max(predicted, 1e-9)
        self.steps = self.optimizers.steps = self.progress.step + max(1, round(left / mean))
        settled = self.run.settled()
        self.run.settle(settled | {"steps": self.steps, "timed": settled.get("timed", 0) + 1})
        self.settle_at = self._next_settling()

    def _backward(self, batch: Batch, counts: "Counts", alone: bool, epoch: int) -> "Sums":
        device = self.device.type
        features = self._features(batch, epoch)
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.model.loss(
                batch,
                attention=not alone,
                label_smoothing=self.config.loss.label_smoothing,
                features=features,
            )
            ctc = loss.ctc / max(1, counts.characters)
            attention = None if alone else loss.attention / max(1, counts.tokens)
            _weighted(self.config.loss, ctc, attention).backward()
        return Sums(float(loss.attention.detach()), float(loss.ctc.detach()))

    def _features(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """Features (B, F, M), augmented, and their lengths (B,)."""
        features, lengths = self.model.features(batch.audio, batch.audio_lengths)
        if self.augment.frequency_masks or self.augment.time_masks:
            seeds = [_seed(self.config.seed, epoch, row) for row in batch.rows.tolist()]
            features = spec_augment(features, lengths, seeds, self.augment)
        return features, lengths

    def _advance(self, report: StepReport, skipped: int) -> None:
        progress = self.progress
        epoch, position = self.after.pop(progress.step)
        progress.step, progress.epoch, progress.position = report.step, epoch, position.as_json()
        progress.seconds += report.seconds
        progress.audio_seconds += report.audio_seconds
        progress.utterances += report.utterances
        progress.skipped += skipped
        self.run.log(kind="train", **vars(report))
        seen = progress.utterances + progress.skipped
        if progress.skipped > max(20, self.config.skip_limit * seen):
            raise CanterError(
                f"{progress.skipped} of {seen} utterances could not be used (see {self.run.folder}/skipped.jsonl); "
                "mend the manifest, or allow more with --skip-limit"
            )


@dataclass(frozen=True)
class Counts:
    """Targets of a step that bear loss, known before any of it is computed."""

    tokens: int
    characters: int

    @classmethod
    def of(cls, batches: list[Batch]) -> "Counts":
        tokens = sum(int((b.token_lengths - b.prompt_lengths).sum()) for b in batches)
        return cls(tokens, sum(int(b.character_lengths.sum()) for b in batches))


@dataclass
class Sums:
    """Losses of a step, summed over its micro-batches."""

    attention: float = 0.0
    ctc: float = 0.0

    def add(self, other: "Sums") -> None:
        self.attention += other.attention
        self.ctc += other.ctc


def _weighted(config: LossConfig, ctc: Any, attention: Any) -> Any:
    if attention is None:
        return ctc
    return config.ctc_weight * ctc + (1 - config.ctc_weight) * attention if config.ctc_weight else attention


def _seed(*parts: int) -> int:
    """A seed from numbers, the same on every machine."""
    digest = hashlib.blake2b(np.array(parts, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


@contextmanager
def _finish_step_on_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM let the step in hand finish; a second one stops at once."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def stop(number: int, frame: Any) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
