"""One training step: the gradient of its micro-batches and the update of the weights.

A micro-batch that does not fit in memory is split.

B: utterances, F: feature frames, M: mel bins, N: micro-batches of the step, S: statistics of all BatchNorms.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from canter.models.augment import SpecAugmentConfig, spec_augment
from canter.models.batch import Batch, Loss, SoftTargets, packing_of_tokens
from canter.models.model import SpeechModel
from canter.models.norm import MaskedBatchNorm
from canter.models.protocol import AnyModel, module_of
from canter.planning.strategies import STRATEGIES
from canter.ranks import SINGLE_RANK, Ranks
from canter.runtime import is_out_of_memory, release_memory, retry_once
from canter.training.config import LossConfig, TrainConfig
from canter.training.feed.data import Loaded
from canter.training.step.optimizers import Average, Optimizers, Schedule

if TYPE_CHECKING:
    from canter.training.distributed.shards import Shards

Number = TypeVar("Number", float, Tensor)


# -- the objective --


@dataclass(frozen=True)
class TargetCounts:
    """Numbers of targets of a step over all ranks, known before any of it is computed."""

    tokens: int
    characters: int

    @classmethod
    def of(cls, batches: Sequence[Batch], ranks: Ranks = SINGLE_RANK) -> TargetCounts:
        tokens = sum(int((b.token_lengths - b.prompt_lengths).sum()) for b in batches)
        characters = sum(int(b.character_lengths.sum()) for b in batches)
        tokens, characters = ranks.all_gather([tokens, characters]).sum(0).astype(int).tolist()
        return cls(tokens, characters)

    def less(self, tokens: float, characters: float) -> TargetCounts:
        return TargetCounts(self.tokens - int(tokens), self.characters - int(characters))


@dataclass(frozen=True)
class Objective:
    """The function that a step minimises: its losses, each a mean over its targets in the step, by weight."""

    config: LossConfig
    counts: TargetCounts
    ctc_only: bool = False
    """CTC-only warm-up: the decoder is not trained."""

    def __call__(self, loss: Loss) -> Tensor:
        """Return the part of the objective that a batch with these sums of losses contributes."""
        ctc = loss.ctc / max(1, self.counts.characters)
        attention = None if self.ctc_only else loss.attention / max(1, self.counts.tokens)
        distillation = None if loss.distillation is None else loss.distillation / max(1, self.counts.tokens)
        return weighted_loss(self.config, ctc, attention, distillation)


def weighted_loss(
    config: LossConfig, ctc: Number, attention: Number | None, distillation: Number | None = None
) -> Number:
    """Return the weighted sum of the losses; CTC only if ``attention`` is None, without a teacher's part if there is
    none."""
    if attention is None:
        return ctc
    if distillation is not None:
        part = config.teacher_weight or 0.0
        attention = (1 - part) * attention + part * distillation
    weight = config.ctc_weight
    return weight * ctc + (1 - weight) * attention if weight else attention


# -- the gradient --


@dataclass(frozen=True)
class SplitMicroBatch:
    """A micro-batch that ran out of memory, and the smaller parts in which it is computed instead."""

    number: int
    """Its position in the step."""
    parts: int
    """Number of parts that go through the encoder one after the other."""
    decoder_parts: int
    """Number of parts of each of these that go through decoder and CTC head one after the other."""
    recompute: bool
    """Activation checkpointing is on."""

    def as_json(self) -> dict[str, int | bool]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ComputedGradient:
    """Result of this rank's micro-batches; the gradient is in the parameters, not yet summed over ranks."""

    attention: float
    """Sum of the cross-entropy."""
    ctc: float
    """Sum of the CTC loss."""
    distillation: float
    """Sum of the divergence from the teacher."""
    seconds: float
    splits: list[SplitMicroBatch] = field(default_factory=list)
    """Micro-batches that did not fit in memory."""
    unfit: list[int] = field(default_factory=list)
    """Rows that do not fit even as a batch of one, and were left out."""
    numbers: list[int] = field(default_factory=list)
    """Positions in the step of the micro-batches that were computed, in the order of their BatchNorm statistics."""


class Gradient:
    """Gradient of a step's micro-batches, each computed with its own seed."""

    def __init__(
        self,
        config: TrainConfig,
        model: AnyModel,
        precision: str,
        ranks: Ranks = SINGLE_RANK,
        teacher: AnyModel | None = None,
    ):
        self.config, self.model, self.ranks, self.teacher = config, model, ranks, teacher
        self.device = next(model.parameters()).device
        masks = {one.name: getattr(config.augment, one.name) for one in dataclasses.fields(SpecAugmentConfig)}
        self.augment = SpecAugmentConfig(**masks)
        self.norms = [module for module in model.modules() if isinstance(module, MaskedBatchNorm)]
        self.copies = bf16_weights(model, precision)
        self.autocast = precision == "bf16" and self.copies is None
        self.bf16 = precision == "bf16"
        self.packed = STRATEGIES[config.strategy].packed
        """True if micro-batches have no batch axis (see `canter.models.packing`)."""

    def compute(self, loaded: Sequence[Loaded], counts: TargetCounts, step: int, ctc_only: bool) -> ComputedGradient:
        """Run forward and backward passes of all micro-batches.

        After a micro-batch has run out of memory it is split, and the step starts again, as the backward pass may have
        added a part of the gradient. Ranks do not communicate meanwhile, so none waits for another's split before the
        end of the step.
        """
        began = time.perf_counter()
        objective = Objective(self.config.loss, counts, ctc_only)
        splits: dict[int, SplitMicroBatch] = {}
        unfit: list[int] = []
        with self.bf16_context():
            while True:
                sums, numbers, failed = self._attempt(loaded, objective, step, splits, unfit)
                if failed is None:
                    break
                self.discard()  # outside of the handler: the exception holds on to tensors
                self._split(failed, splits, unfit)
            # one synchronisation a step
            attention, ctc, teacher = torch.stack(sums).double().sum(0).tolist() if sums else (0.0, 0.0, 0.0)
        seconds = time.perf_counter() - began
        return ComputedGradient(attention, ctc, teacher, seconds, list(splits.values()), unfit, numbers)

    def bf16_context(self) -> AbstractContextManager[object]:
        """Return the context manager in which backward passes run: it swaps in bf16 copies of the weights, if any."""
        return self.copies or nullcontext()

    def backward(self, batch: Batch, objective: Objective, epoch: int) -> Tensor:
        """Add the batch's part of the step's gradient.

        Return the sums of (cross-entropy, CTC loss, divergence from the teacher) (3,).
        """
        if self.packed:
            return self._backward_packed(batch.by_length(), objective, epoch)
        teacher = self.soft_targets(batch, objective)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model.loss(
                batch,
                attention=not objective.ctc_only,
                label_smoothing=self.config.loss.label_smoothing,
                features=self.features(batch, epoch),
                teacher=teacher,
            )
            return self._add_gradient(loss, objective)

    def _backward_packed(self, groups: Sequence[Batch], objective: Objective, epoch: int) -> Tensor:
        """Do the same as `backward` for a packed micro-batch in groups of like length."""
        soft = [targets for group in groups if (targets := self.soft_targets(group, objective))]
        teacher = None
        if soft:
            logits = packing_of_tokens(groups).pack([targets.logits for targets in soft])
            teacher = SoftTargets(logits, soft[0].temperature)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = cast(SpeechModel, self.model).packed_loss(
                groups,
                attention=not objective.ctc_only,
                label_smoothing=self.config.loss.label_smoothing,
                features=[self.features(group, epoch) for group in groups],
                teacher=teacher,
            )
            return self._add_gradient(loss, objective)

    @torch.no_grad()
    def soft_targets(self, batch: Batch, objective: Objective) -> SoftTargets | None:
        """Return the teacher's predictions for audio without augmentation masks; None without a teacher."""
        if self.teacher is None or objective.ctc_only:
            return None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return SoftTargets(self.teacher.token_logits(batch), self.config.loss.teacher_temperature)

    def features(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """Return features (B, F, M) with SpecAugment masks, and their lengths (B,)."""
        features, lengths = self.model.features(batch.audio, batch.audio_lengths)
        if self.augment.frequency_masks or self.augment.time_masks:
            seeds = [seed_of(self.config.seed, epoch, row) for row in batch.rows.tolist()]
            features = spec_augment(features, lengths, seeds, self.augment)
        return features, lengths

    def objective(self, batch: Batch, ctc_only: bool) -> Tensor:
        """Return the objective of a step that is this batch only."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model.loss(batch, attention=not ctc_only)
            return Objective(self.config.loss, TargetCounts.of([batch]), ctc_only)(loss)

    def discard(self) -> None:
        """Drop the gradients and statistics computed so far, and release their memory."""
        module_of(self.model).zero_grad(set_to_none=True)
        if self.copies:
            self.copies.sums = {}
        for norm in self.norms:
            norm.pending.clear()
        release_memory()

    def correct(self, before: TargetCounts, after: TargetCounts, ctc_only: bool) -> None:
        """Rescale the gradient after out-of-memory drops, so that it is a mean over the remaining targets."""
        if after != before:
            had, left = (before.characters, after.characters) if ctc_only else (before.tokens, after.tokens)
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(had / max(1, left))

    def merge_statistics(self, numbers: Sequence[int], count: int) -> None:
        """Merge the BatchNorm statistics of the step's ``count`` micro-batches into the running ones, in plan order.

        ``numbers`` are the positions of those computed by this rank.
        """
        norms = [norm for norm in self.norms if norm.training]
        if self.ranks.size == 1 or not norms:
            for norm in norms:
                norm.merge(norm.pending)
                norm.pending.clear()
            return
        sizes = [1 + 2 * norm.running_mean.numel() for norm in norms]
        # (N, S): for each norm a 1 where it has statistics, mean, variance
        table = torch.zeros(count, sum(sizes))
        for place, number in enumerate(numbers):
            for norm, room in zip(norms, table[number].split(sizes)):
                if (found := norm.pending[place]) is not None:
                    room.copy_(torch.cat([torch.ones(1), *(part.flatten().float().cpu() for part in found)]))
        for norm in norms:
            norm.pending.clear()
        for row in self.ranks.all_reduce(table):  # all ranks but one gave zeros: the sum is exact
            for norm, part in zip(norms, row.split(sizes)):
                if part[0]:
                    mean, variance = part[1:].to(self.device).chunk(2)
                    norm.merge([(mean, variance)])

    # -- micro-batches --

    def _attempt(
        self,
        loaded: Sequence[Loaded],
        objective: Objective,
        step: int,
        splits: dict[int, SplitMicroBatch],
        unfit: Sequence[int],
    ) -> tuple[list[Tensor], list[int], Loaded | None]:
        """Compute all micro-batches, up to one that runs out of memory.

        Return the sums of their losses, their positions, and the one that failed.
        """
        sums: list[Tensor] = []
        numbers: list[int] = []
        for one in loaded:
            if one.batch is None:
                continue
            try:
                found = self._micro_batch(one, objective, step, splits.get(one.address.number), unfit)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return sums, numbers, one
            sums += found
            numbers += [one.address.number] if found else []
            for norm in self.norms:
                if norm.training:  # a layer that was dropped has none of this micro-batch
                    norm.pending += [None] * (len(numbers) - len(norm.pending))
        return sums, numbers, None

    def _split(self, failed: Loaded, splits: dict[int, SplitMicroBatch], unfit: list[int]) -> None:
        """Choose the next smaller way to compute a micro-batch; after batches of one, leave out the longest utterance.

        Halves give the same gradient unless BatchNorm takes its statistics of all utterances at once. Then the encoder
        first keeps the batch in one part with activation checkpointing (a fraction of the memory, a third more time)
        and only decoder and heads are split; halves follow where that does not fit either.
        """
        assert failed.batch is not None
        number, before = failed.address.number, splits.get(failed.address.number)
        left = [row for row in failed.batch.rows.tolist() if row not in unfit]
        if before is not None and before.parts >= len(left):
            lengths = dict(zip(failed.batch.rows.tolist(), failed.batch.audio_lengths.tolist()))
            unfit.append(max(left, key=lengths.__getitem__))
        elif before is not None:
            splits[number] = SplitMicroBatch(number, 2 * before.parts, before.decoder_parts, True)
        elif any(norm.training for norm in self.norms):
            splits[number] = SplitMicroBatch(number, 1, 2, True)
        else:
            splits[number] = SplitMicroBatch(number, 2, 1, False)

    def _micro_batch(
        self, one: Loaded, objective: Objective, step: int, split: SplitMicroBatch | None, unfit: Sequence[int]
    ) -> list[Tensor]:
        """Run the backward pass; return the sums of the losses (3,) of each part, as `backward` does."""
        assert one.batch is not None
        torch.manual_seed(seed_of(self.config.seed, step, one.address.number))
        if (batch := one.batch.without(unfit)) is None:
            return []
        batch = batch.to(self.device)
        epoch = one.address.epoch
        if split is None:
            return [self.backward(batch, objective, epoch)]
        before = [len(norm.pending) for norm in self.norms]
        sums = []
        with self._recomputing(split.recompute):
            for rows in torch.arange(len(batch.rows)).tensor_split(min(split.parts, len(batch.rows))):
                part = batch if split.parts == 1 else batch.take(rows.to(self.device))
                sums.append(self._backward_in_parts(part, objective, epoch, split.decoder_parts))
        for norm, size in zip(self.norms, before):  # one entry per micro-batch, whatever its parts
            parts = [part for part in norm.pending[size:] if part is not None]
            if len(parts) > 1:
                means, variances = zip(*parts)
                norm.pending[size:] = [(torch.stack(means).mean(0), torch.stack(variances).mean(0))]
        return sums

    def _backward_in_parts(self, batch: Batch, objective: Objective, epoch: int, parts: int) -> Tensor:
        """Do the same as `backward`, with decoder and heads computed on ``parts`` of the encoded batch in turn."""
        if parts == 1:
            return self.backward(batch, objective, epoch)
        model = cast(SpeechModel, self.model)  # others have no BatchNorm of ours
        total = torch.zeros(3, device=self.device)
        groups = batch.by_length() if self.packed else [batch]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            features = [self.features(group, epoch) for group in groups]
            if self.packed:
                packed, packing = model.encode_packed(features)
                encoded = list(zip(packing.split(packed), packing.lengths))
            else:
                encoded = [model.encode(*features[0])]
            leaves = [states.detach().requires_grad_() for states, _ in encoded]
            for group, leaf, (_, lengths) in zip(groups, leaves, encoded):
                for rows in torch.arange(len(lengths), device=self.device).tensor_split(min(parts, len(lengths))):
                    part = group.take(rows)
                    loss = model.loss_of(
                        leaf[rows],
                        lengths[rows],
                        part,
                        attention=not objective.ctc_only,
                        label_smoothing=self.config.loss.label_smoothing,
                        teacher=self.soft_targets(part, objective),
                    )
                    total += self._add_gradient(loss, objective)
            if encoded[0][0].requires_grad:
                torch.autograd.backward([states for states, _ in encoded], [leaf.grad for leaf in leaves])
                self._collect()
        return total

    def _add_gradient(self, loss: Loss, objective: Objective) -> Tensor:
        objective(loss).backward()
        self._collect()
        teacher = torch.zeros_like(loss.attention) if loss.distillation is None else loss.distillation
        return torch.stack([loss.attention, loss.ctc, teacher]).detach()

    def _collect(self) -> None:
        if self.copies:
            self.copies.collect()

    @contextmanager
    def _recomputing(self, on: bool) -> Iterator[None]:
        before = self.model.recomputes
        self.model.recompute_activations(on or before)
        try:
            yield
        finally:
            self.model.recompute_activations(before)


def seed_of(*parts: int) -> int:
    """Return a seed made from numbers, the same on every machine."""
    digest = hashlib.blake2b(np.array(parts, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


class Bf16Weights:
    """Context manager that swaps in bf16 copies of the weights, cast once a step; autocast casts at every layer.

    On leaving it the parameters have their own values again, with the gradients that `collect` summed in float32.
    FSDP's MixedPrecisionPolicy does the same.
    """

    def __init__(self, model: nn.Module):
        self.parameters = list(model.parameters())
        self.values: list[Tensor] = []
        self.copies: list[Tensor] = []  # kept between steps: allocating a thousand tensors takes a GPU's time
        self.sums: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> Bf16Weights:
        self.values = [parameter.data for parameter in self.parameters]
        self.copies = self.copies or [torch.empty_like(value, dtype=torch.bfloat16) for value in self.values]
        torch._foreach_copy_(self.copies, self.values)
        for parameter, copy in zip(self.parameters, self.copies):
            parameter.grad = None
            parameter.data = copy
        return self

    def __exit__(self, *_: object) -> None:
        for parameter, value in zip(self.parameters, self.values):
            parameter.grad = None
            parameter.data = value
            parameter.grad = self.sums.get(parameter)
        self.values = []
        self.sums = {}

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of a micro-batch to those of the step."""
        found = {parameter: grad for parameter in self.parameters if (grad := parameter.grad) is not None}
        new = [torch.empty_like(gradient, dtype=torch.float32) for gradient in found.values()]
        if new:
            torch._foreach_copy_(new, list(found.values()))
        before = [(self.sums[p], gradient) for p, gradient in zip(found, new) if p in self.sums]
        if before:
            torch._foreach_add_(*map(list, zip(*before)))
        for parameter, gradient in zip(found, new):
            self.sums.setdefault(parameter, gradient)
            parameter.grad = None


def bf16_weights(model: AnyModel, precision: str) -> Bf16Weights | None:
    """Return the bf16 copies that a step of ``model`` computes with; None where it uses autocast or float32.

    Canter's own models on a GPU have them, as their layers compute in the type of their weights. FSDP's shards of
    weights do not.
    """
    first = next(model.parameters())
    supported = "bf16_weights" in model.supports and not isinstance(first, DTensor)
    return Bf16Weights(module_of(model)) if precision == "bf16" and supported and first.is_cuda else None


# -- the step --


@dataclass(frozen=True)
class Update:
    """Result of updating the weights."""

    learning_rate: float
    gradient_norm: float
    """Norm of the gradient before clipping."""
    finite: bool
    """Loss and gradient were finite; otherwise nothing was changed."""


class TrainingStep:
    """An optimiser step: the gradient of its micro-batches, summed over ranks, and one update of the weights.

    `canter train` takes it on the micro-batches of the plan, and memory budgets are measured on it.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: AnyModel,
        precision: str,
        steps: int,
        schedule: Schedule | None = None,
        ranks: Ranks = SINGLE_RANK,
        shards: Shards | None = None,
        teacher: AnyModel | None = None,
    ):
        self.config, self.model, self.ranks, self.shards = config, model, ranks, shards
        module, optimizer = module_of(model), config.optimizer
        self.gradient = Gradient(config, model, precision, ranks, teacher)
        self.optimizers = Optimizers(module, optimizer, steps, schedule)
        self.average = Average(module, optimizer.ema) if optimizer.ema else None

    def backward(self, batch: Batch) -> None:
        """Compute the gradient of a step that is this batch only, without a fallback if it does not fit in memory."""
        objective = Objective(self.config.loss, TargetCounts.of([batch]))
        with self.gradient.bf16_context():
            self.gradient.backward(batch, objective, epoch=0)

    def update(
        self, step: int, numbers: Sequence[int], count: int, *, ctc_only: bool = False, finite: bool = True
    ) -> Update:
        """Update the weights by the gradients of all ranks, their average, and the BatchNorm statistics.

        ``numbers`` are the positions of this rank's micro-batches among the step's ``count``. A step whose loss or
        gradient is not finite changes nothing.
        """
        if self.shards:
            self.shards.sum_gradients(lambda batch: self.gradient.objective(batch, ctc_only))
        elif finite:
            retry_once(lambda: self.ranks.sum_gradients(self.optimizers.parameters))
        if not finite:
            self.gradient.discard()
            return Update(self.optimizers.peak * self.optimizers.factor(step), math.nan, False)
        rate, norm = retry_once(lambda: self.optimizers.step(step))
        if not math.isfinite(norm):
            self.gradient.discard()
            return Update(rate, norm, False)
        self.gradient.merge_statistics(numbers, count)
        if self.average:
            self.average.update(module_of(self.model), step)
        return Update(rate, norm, True)

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that are kept between steps: weights, buffers, optimiser state, averages, bf16 copies.

        Those of the teacher are among them.
        """
        for model in filter(None, (self.model, self.gradient.teacher)):
            yield from model.parameters()
            yield from model.buffers()
        for optimizer, _ in self.optimizers.parts:
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))
        if self.average:
            yield from self.average.shadow.values()
        if self.gradient.copies:
            yield from self.gradient.copies.copies
