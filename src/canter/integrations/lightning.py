"""PyTorch Lightning (the package `pytorch-lightning`) under a plan: a module and a data module."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from canter.errors import PlanError
from canter.models.batch import Batch
from canter.models.norm import merge_pending
from canter.planning.plan import MicroBatch, Plan
from canter.planning.sampler import StepSampler
from canter.planning.windows import mix
from canter.training.feed.data import Address, MicroBatches, start_worker

logger = logging.getLogger(__name__)
Step = list[tuple[int, Batch | None]]
"""A process's part of a step: the place in the step of each micro-batch, and the batch; None bears no loss."""


class PlanDataModule(pl.LightningDataModule):
    """Gives the Trainer a plan's steps: a "batch" is this process's micro-batches of one step.

    Lightning counts steps; the data begins at the step it has counted to, so a run resumed with
    ``trainer.fit(..., ckpt_path=...)``, on any number of processes, takes the steps that were still to come. The
    checkpoint holds the plan's fingerprint, and another plan is refused. An epoch of Lightning is as many steps as
    the plan's first (see `StepSampler`).

    data: reads the rows of the plan's index. Utterances longer than its model takes are left out of the plan, unusable
        files of the batches, and named in the log.
    workers: processes that decode audio ahead.
    """

    def __init__(self, plan: Plan, data: MicroBatches, *, workers: int = 0):
        super().__init__()
        self.plan = plan.within(*(getattr(data, name, math.inf) for name in ("longest_seconds", "most_tokens")))
        self.data, self.workers = data, workers
        log_left_out(self.plan)

    def train_dataloader(self) -> DataLoader:
        trainer: Any = self.trainer
        steps = StepSampler(self.plan, trainer.global_rank, trainer.world_size)
        return _Loader(
            _StepData(self.data, steps),
            sampler=_StepNumbers(steps, lambda: trainer.global_step),
            batch_size=None,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(self.plan.seed),  # leaves the model's own randomness alone
            multiprocessing_context="forkserver" if self.workers else None,
            worker_init_fn=start_worker,
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if not isinstance(batch, list):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return [(number, None if one is None else one.to(device)) for number, one in batch]

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["plan"] != self.plan.fingerprint:
            raise PlanError(
                f"the checkpoint was trained by another plan ({state_dict['plan']}, this one is "
                f"{self.plan.fingerprint}): index, budget, strategy, seed, window and micro-batches per step must be "
                "those of the run"
            )


def log_left_out(plan: Plan) -> None:
    """Log how many utterances the model cannot take, and the first of them."""
    if plan.model is None:
        return
    left_out = plan.left_out()
    for row, reason in left_out[:3]:
        logger.warning("row %d is left out: %s", row, reason)
    logger.warning("%d of %d utterances are in no batch", len(left_out), len(plan.index))


class _Loader(DataLoader):
    """Says to Lightning that it can be resumed in the middle of an epoch: it is, by the steps the Trainer counts."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: see `_StepNumbers`."""


class _StepNumbers(DistributedSampler):
    """Each step's micro-batches from ``done()`` to the end of the pass it is in. Being a DistributedSampler keeps
    Lightning from sharing its steps out a second time."""

    def __init__(self, steps: StepSampler, done: Callable[[], int]):
        self.steps, self.done = steps, done

    def __iter__(self) -> Iterator[tuple[int, list[MicroBatch]]]:  # type: ignore[override]
        first, size = self.done(), self.steps.steps
        for step in range(first, (first // size + 1) * size):
            yield step, self.steps.micro_batches(step)

    def __len__(self) -> int:
        return self.steps.steps

    def set_epoch(self, epoch: int) -> None:
        """Nothing: steps are counted over the whole run."""


class _StepData(Dataset):
    def __init__(self, data: MicroBatches, steps: StepSampler):
        self.data, self.accumulation = data, steps.accumulation
        self.nothing = steps.micro_batches_per_step

    def __len__(self) -> int:
        return len(self.data.index)

    def __getitem__(self, key: tuple[int, list[MicroBatch]]) -> Step:
        step, mine = key
        found: Step = []
        for number, rows in mine:
            loaded = self.data[Address(step, number, False, np.asarray(rows))]
            for problem in loaded.skipped:
                logger.warning("left out: %s", problem.reason)
            found.append((number, loaded.batch))
        return found + [(self.nothing, None)] * (self.accumulation - len(mine))


class PlanModule(pl.LightningModule):
    """Trains a model that has ``loss(batch)`` (`SpeechModel`, `TransformersModel`) by a plan's steps.

    Losses of a step's micro-batches are summed and divided by its targets over all processes, so that a step's
    gradient depends neither on how many micro-batches it was cut into nor on who computed which. Dropout is drawn
    from (seed, step, micro-batch). Optimisation is manual, as Lightning calls it: gradients are clipped to ``clip``
    here, and the Trainer's ``accumulate_grad_batches`` and ``gradient_clip_val`` are to be left alone.

    optimizer: makes one from the parameters. schedule: factor of the learning rate at a step, from 0. ctc_weight: of
    the CTC loss, where the model has a head for it. BatchNorm's running statistics are each process's own.
    """

    def __init__(
        self,
        model: Any,
        *,
        optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=1e-5),
        schedule: Callable[[int], float] = lambda step: 1.0,
        ctc_weight: float = 0.0,
        label_smoothing: float = 0.0,
        clip: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.make_optimizer, self.schedule = model, optimizer, schedule
        self.ctc_weight, self.label_smoothing, self.clip, self.seed = ctc_weight, label_smoothing, clip, seed

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(p for p in self.model.parameters() if p.requires_grad)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)]

    def training_step(self, batch: Step, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        counts = torch.zeros(2, device=self.device)
        for _, one in batch:
            if one is not None:
                counts[0] += (one.token_lengths - one.prompt_lengths).sum()
                counts[1] += one.character_lengths.sum()
        counts = self.trainer.strategy.reduce(counts, reduce_op="sum").clamp(min=1)
        step, total = self.trainer.global_step, torch.zeros((), device=self.device)
        for place, (number, one) in enumerate(batch):
            torch.manual_seed(mix(self.seed, step, number) >> 1)
            last = place == len(batch) - 1
            with nullcontext() if last else self._without_exchange():
                loss = self._nothing() if one is None else self._loss(one, counts)
                # processes average their gradients: what is summed here must not be divided there
                self.manual_backward(loss * self.trainer.world_size)
            total += loss.detach()
        merge_pending(self.model)
        total = self.trainer.strategy.reduce(total, reduce_op="sum")
        self.log("loss", total, prog_bar=True, batch_size=1)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        return total

    def _loss(self, batch: Batch, counts: Tensor) -> Tensor:
        found = self.model.loss(batch, label_smoothing=self.label_smoothing)
        attention = found.attention / counts[0]
        if not self.ctc_weight:
            return attention
        return (1 - self.ctc_weight) * attention + self.ctc_weight * found.ctc / counts[1]

    def _nothing(self) -> Tensor:
        """A loss of zero that reaches every parameter, for processes that wait for each other's gradients."""
        return torch.stack([p.flatten()[0] * 0.0 for p in self.model.parameters() if p.requires_grad]).sum()

    def _without_exchange(self) -> Any:
        wrapped = self.trainer.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()
