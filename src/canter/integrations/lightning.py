"""A module and a data module that train by a plan under PyTorch Lightning (the package `pytorch-lightning`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from canter.errors import PlanError
from canter.models.batch import Batch
from canter.models.norm import merge_pending
from canter.models.protocol import AnyModel, module_of
from canter.planning.plan import MicroBatch, Plan
from canter.planning.sampler import StepSampler
from canter.planning.windows import mix
from canter.training.config import LossConfig
from canter.training.feed.data import Address, MicroBatches, start_worker
from canter.training.step.gradient import Objective, TargetCounts

logger = logging.getLogger(__name__)
LightningStep = list[tuple[int, Batch | None]]
"""A process's part of a step: the position of each micro-batch in the step, and the batch; None bears no loss."""


class PlanDataModule(pl.LightningDataModule):
    """Steps of a plan for Lightning's Trainer: a "batch" is this process's micro-batches of one step.

    The data starts at the step that Lightning has counted to, so a run that ``trainer.fit(ckpt_path=...)`` resumes, on
    any number of processes, takes the remaining steps. The checkpoint holds the plan's fingerprint, and another plan
    is refused. An epoch of Lightning has the number of steps of the plan's first epoch (see `StepSampler`).

    data: reader of the rows of the plan's index. Utterances longer than its model takes are left out of the plan, and
        unusable files out of the batches; the log names them.
    workers: processes that decode audio ahead.
    """

    def __init__(self, plan: Plan, data: MicroBatches, *, workers: int = 0):
        super().__init__()
        self.plan = plan.within(*(getattr(data, name, math.inf) for name in ("longest_seconds", "most_tokens")))
        self.data, self.workers = data, workers
        log_left_out(self.plan)

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        steps = StepSampler(self.plan, trainer.global_rank, trainer.world_size)
        return _Loader(
            _StepData(self.data, steps),
            sampler=_StepNumbers(steps, lambda: trainer.global_step),
            batch_size=None,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(self.plan.seed),  # does not touch torch's global one
            multiprocessing_context="forkserver" if self.workers else None,
            worker_init_fn=start_worker,
        )

    def transfer_batch_to_device(self, batch: object, device: torch.device, dataloader_idx: int) -> object:
        if not isinstance(batch, list):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return [(number, None if one is None else one.to(device)) for number, one in batch]

    def state_dict(self) -> dict[str, object]:
        return {"plan": self.plan.fingerprint}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        if state_dict["plan"] != self.plan.fingerprint:
            raise PlanError(
                f"the checkpoint was trained by another plan ({state_dict['plan']}, this one is "
                f"{self.plan.fingerprint}): index, budget, strategy, seed, window and micro-batches per step must be "
                "those of the run"
            )


def log_left_out(plan: Plan) -> None:
    """Log the number of utterances that the model cannot take, and the first three of them."""
    if plan.model is None:
        return
    left_out = plan.left_out()
    for row, reason in left_out[:3]:
        logger.warning("row %d is left out: %s", row, reason)
    logger.warning("%d of %d utterances are in no batch", len(left_out), len(plan.index))


class _Loader(DataLoader):
    """Loader that Lightning may resume within an epoch: the Trainer's number of steps is its only state."""

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Do nothing: `_StepNumbers` starts at the Trainer's step."""


class _StepNumbers(DistributedSampler):
    """Each step's micro-batches from step ``done()`` to the end of its epoch.

    It is a DistributedSampler so that Lightning does not distribute its steps a second time.
    """

    def __init__(self, steps: StepSampler, done: Callable[[], int]):
        self.steps, self.done = steps, done

    def __iter__(self) -> Iterator[tuple[int, list[MicroBatch]]]:  # type: ignore[override]
        first, size = self.done(), self.steps.steps
        for step in range(first, (first // size + 1) * size):
            yield step, self.steps.micro_batches(step)

    def __len__(self) -> int:
        return self.steps.steps

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: steps are counted over the run, not within an epoch."""


class _StepData(Dataset):
    def __init__(self, data: MicroBatches, steps: StepSampler):
        self.data, self.accumulation = data, steps.accumulation
        self.nothing = steps.micro_batches_per_step

    def __len__(self) -> int:
        return len(self.data.index)

    def __getitem__(self, key: tuple[int, list[MicroBatch]]) -> LightningStep:
        step, mine = key
        found: LightningStep = []
        for number, rows in mine:
            loaded = self.data[Address(step, number, False, np.asarray(rows))]
            for problem in loaded.skipped:
                logger.warning("left out: %s", problem.reason)
            found.append((number, loaded.batch))
        return found + [(self.nothing, None)] * (self.accumulation - len(mine))


class PlanModule(pl.LightningModule):
    """Training of a model that `canter.load` returns (``.module``) by a plan's steps.

    Losses of a step's micro-batches are summed and divided by the step's number of targets over all processes, so that
    its gradient depends neither on the number of micro-batches nor on which process computes which. Dropout is drawn
    from (seed, step, micro-batch). Optimisation is manual in Lightning's sense: gradients are clipped to ``clip`` here;
    leave the Trainer's ``accumulate_grad_batches`` and ``gradient_clip_val`` at their defaults. Each process has its
    own running statistics of BatchNorm.

    optimizer: function from parameters to an optimiser. schedule: factor of the learning rate at a step, from 0.
    ctc_weight: weight of the CTC loss, if the model has a CTC head.
    """

    def __init__(
        self,
        model: AnyModel,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=1e-5),
        schedule: Callable[[int], float] = lambda step: 1.0,
        ctc_weight: float = 0.0,
        label_smoothing: float = 0.0,
        clip: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.make_optimizer, self.schedule = model, optimizer, schedule
        self.loss = LossConfig(ctc_weight=ctc_weight, label_smoothing=label_smoothing)
        self.clip, self.seed = clip, seed

    def configure_optimizers(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        optimizer = self.make_optimizer(p for p in self.model.parameters() if p.requires_grad)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)]

    def training_step(self, batch: LightningStep, batch_idx: int) -> Tensor:
        optimizer, world = cast(torch.optim.Optimizer, self.optimizers()), self.trainer.world_size
        own = TargetCounts.of([one for _, one in batch if one is not None])
        counts = self._sum(torch.tensor([own.tokens, own.characters]))
        objective = Objective(self.loss, TargetCounts(*map(int, counts.tolist())))
        step, total = self.trainer.global_step, torch.zeros((), device=self.device)
        for place, (number, one) in enumerate(batch):
            torch.manual_seed(mix(self.seed, step, number) >> 1)
            last = place == len(batch) - 1
            with nullcontext() if last else self._without_exchange():
                loss = self._no_loss() if one is None else self._loss(one, objective)
                # processes average their gradients: what is summed here must not be divided there
                self.manual_backward(loss * world)
            total += loss.detach()
        merge_pending(module_of(self.model))
        total = self._sum(total)
        self.log("loss", total, prog_bar=True, batch_size=1)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        optimizer.step()
        optimizer.zero_grad()
        cast(LRScheduler, self.lr_schedulers()).step()
        return total

    def _loss(self, batch: Batch, objective: Objective) -> Tensor:
        return objective(self.model.loss(batch, label_smoothing=self.loss.label_smoothing))

    def _sum(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum"))

    def _no_loss(self) -> Tensor:
        """Return a loss of zero that reaches every parameter, for processes that wait for each other's gradients."""
        return torch.stack([p.flatten()[0] * 0.0 for p in self.model.parameters() if p.requires_grad]).sum()

    def _without_exchange(self) -> AbstractContextManager[object]:
        wrapped = self.trainer.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()
