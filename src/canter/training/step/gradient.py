"""The gradient of a step: this rank's micro-batches, each by its own seed, summed with those of the other ranks.

B: utterances, F: feature frames, M: mel bins, N: micro-batches of the step, S: statistics of all BatchNorms.
"""

import hashlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from canter.models.augment import SpecAugmentConfig, spec_augment
from canter.models.batch import Batch, Loss
from canter.models.model import SpeechModel
from canter.models.norm import MaskedBatchNorm
from canter.runtime import is_out_of_memory, release_memory
from canter.training.config import LossConfig, TrainConfig
from canter.training.distributed.ranks import ALONE, Ranks
from canter.training.feed.data import Loaded
from canter.training.step.half import bf16_weights
from canter.training.step.recovery import SplitMicroBatch, split_more


@dataclass(frozen=True)
class TargetCounts:
    """Targets of a step that bear loss, over all ranks, known before any of it is computed."""

    tokens: int
    characters: int

    @classmethod
    def of(cls, batches: Sequence[Batch], ranks: Ranks = ALONE) -> "TargetCounts":
        tokens = sum(int((b.token_lengths - b.prompt_lengths).sum()) for b in batches)
        characters = sum(int(b.character_lengths.sum()) for b in batches)
        tokens, characters = ranks.table([tokens, characters]).sum(0).astype(int).tolist()
        return cls(tokens, characters)

    def less(self, tokens: float, characters: float) -> "TargetCounts":
        return TargetCounts(self.tokens - int(tokens), self.characters - int(characters))


@dataclass(frozen=True)
class ComputedGradient:
    """What this rank computed of a step; the gradient is in the parameters, not yet summed over ranks."""

    attention: float
    """Sum of cross-entropy."""
    ctc: float
    seconds: float
    splits: list[SplitMicroBatch] = field(default_factory=list)
    """Micro-batches that did not fit in memory."""
    unfit: list[int] = field(default_factory=list)
    """Rows that do not fit even alone, and were left out."""
    numbers: list[int] = field(default_factory=list)
    """Places in the step of the micro-batches that were computed, in the order of their statistics."""


class Gradient:
    """Computes, cuts where memory runs out, and sums over ranks."""

    def __init__(self, config: TrainConfig, model: SpeechModel, precision: str, ranks: Ranks = ALONE):
        self.config, self.model, self.precision, self.ranks = config, model, precision, ranks
        self.device = next(model.parameters()).device
        masks = {k: v for k, v in vars(config.augment).items() if k != "speed"}
        self.augment = SpecAugmentConfig(**masks)
        self.norms = [m for m in model.modules() if isinstance(m, MaskedBatchNorm)]
        self.half = bf16_weights(model, precision)
        self.autocast = precision == "bf16" and self.half is None

    def compute(self, loaded: Sequence[Loaded], counts: TargetCounts, step: int, ctc_only: bool) -> ComputedGradient:
        """Forward and backward of each micro-batch; ``ctc_only``: CTC only."""
        with self.weights():
            return self._compute(loaded, counts, step, ctc_only)

    def weights(self) -> AbstractContextManager:
        """In this context a backward pass may be run."""
        return self.half or nullcontext()

    def _compute(self, loaded: Sequence[Loaded], counts: TargetCounts, step: int, ctc_only: bool) -> ComputedGradient:
        """As ``compute``.

        A micro-batch that runs out of memory is cut (see ``recovery``), and the step started anew, as the backward
        pass may have added half of a gradient. Ranks exchange nothing meanwhile, so none waits for a cut but at the
        end of its step.
        """
        began = time.perf_counter()
        cuts: dict[int, SplitMicroBatch] = {}
        unfit: list[int] = []
        while True:
            sums: list[Tensor] = []
            numbers: list[int] = []
            failed: Loaded | None = None
            for one in loaded:
                if one.batch is None:
                    continue
                try:
                    found = self._micro_batch(one, counts, step, ctc_only, cuts.get(one.address.number), unfit)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failed = one
                    break
                sums += found
                numbers += [one.address.number] if found else []
                for norm in self.norms:
                    if norm.training:  # a layer that was dropped has none of this micro-batch
                        norm.pending += [None] * (len(numbers) - len(norm.pending))
            if failed is None:
                break
            self.discard()  # outside of the handler: the exception holds on to tensors
            _next_cut(self.model, failed, cuts, unfit)
        # one synchronisation a step
        attention, ctc = torch.stack(sums).double().sum(0).tolist() if sums else (0.0, 0.0)
        return ComputedGradient(attention, ctc, time.perf_counter() - began, list(cuts.values()), unfit, numbers)

    def discard(self) -> None:
        """Forgets gradients and statistics computed so far."""
        self.model.zero_grad(set_to_none=True)
        if self.half:
            self.half.clear()
        for norm in self.norms:
            norm.pending.clear()
        release_memory()

    def correct(self, before: TargetCounts, after: TargetCounts, ctc_only: bool) -> None:
        """Makes the gradient, a mean over the step's targets, one over those that are left where utterances did not
        fit: by tokens, or characters where there is CTC alone."""
        if after != before:
            had, left = (before.characters, after.characters) if ctc_only else (before.tokens, after.tokens)
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(had / max(1, left))

    def merge_statistics(self, numbers: Sequence[int], count: int) -> None:
        """Folds the BatchNorm statistics of the step's ``count`` micro-batches into the running ones, in plan order;
        ``numbers`` are the places of those computed here."""
        norms = [norm for norm in self.norms if norm.training]
        if self.ranks.size == 1 or not norms:
            for norm in norms:
                norm.merge(norm.pending)
                norm.pending.clear()
            return
        sizes = [1 + 2 * norm.running_mean.numel() for norm in norms]
        # (N, S): of each norm whether it has statistics, mean, variance
        table = torch.zeros(count, sum(sizes))
        for place, number in enumerate(numbers):
            for norm, room in zip(norms, table[number].split(sizes)):
                if (found := norm.pending[place]) is not None:
                    room.copy_(torch.cat([torch.ones(1), *(part.flatten().float().cpu() for part in found)]))
        for norm in norms:
            norm.pending.clear()
        for row in self.ranks.sum(table):  # all ranks but one gave zeros: the sum is exact
            for norm, part in zip(norms, row.split(sizes)):
                if part[0]:
                    mean, variance = part[1:].to(self.device).chunk(2)
                    norm.merge([(mean, variance)])

    # -- one micro-batch --

    def _micro_batch(
        self,
        one: Loaded,
        counts: TargetCounts,
        step: int,
        ctc_only: bool,
        cut: SplitMicroBatch | None,
        unfit: Sequence[int],
    ) -> list[Tensor]:
        """Backward; returns sums of (cross-entropy, CTC) (2,)."""
        batch = one.batch
        assert batch is not None
        torch.manual_seed(seed_of(self.config.seed, step, one.address.number))
        if (batch := batch.without(unfit)) is None:
            return []
        batch = batch.to(self.device)
        epoch = one.address.epoch
        if cut is None:
            return [self.backward(batch, counts, ctc_only, epoch)]
        before = [len(norm.pending) for norm in self.norms]
        sums = []
        with self._recomputing(cut.recompute):
            for rows in torch.arange(len(batch.rows)).tensor_split(min(cut.parts, len(batch.rows))):
                piece = batch if cut.parts == 1 else batch.take(rows.to(self.device))
                sums.append(self._backward_in_parts(piece, counts, ctc_only, epoch, cut.decoder_parts))
        for norm, size in zip(self.norms, before):  # one entry a micro-batch, whatever its pieces
            pieces = [piece for piece in norm.pending[size:] if piece is not None]
            if len(pieces) > 1:
                means, variances = zip(*pieces)
                norm.pending[size:] = [(torch.stack(means).mean(0), torch.stack(variances).mean(0))]
        return sums

    def backward(self, batch: Batch, counts: TargetCounts, ctc_only: bool, epoch: int) -> Tensor:
        """Adds the batch's part of the step's gradient; returns (cross-entropy, CTC) sums (2,)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model.loss(
                batch,
                attention=not ctc_only,
                label_smoothing=self.config.loss.label_smoothing,
                features=self.features(batch, epoch),
            )
            self._objective(loss, counts, ctc_only).backward()
        self._collect()
        return torch.stack([loss.attention.detach(), loss.ctc.detach()])

    def _backward_in_parts(self, batch: Batch, counts: TargetCounts, ctc_only: bool, epoch: int, parts: int) -> Tensor:
        """As ``backward``, with decoder and heads taking ``parts`` pieces of the encoded batch one by one."""
        if parts == 1:
            return self.backward(batch, counts, ctc_only, epoch)
        total = torch.zeros(2, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            encoded, lengths = self.model.encode(*self.features(batch, epoch))
            leaf = encoded.detach().requires_grad_()
            for rows in torch.arange(len(lengths), device=self.device).tensor_split(min(parts, len(lengths))):
                loss = self.model.loss_of(
                    leaf[rows],
                    lengths[rows],
                    batch.take(rows),
                    attention=not ctc_only,
                    label_smoothing=self.config.loss.label_smoothing,
                )
                self._objective(loss, counts, ctc_only).backward()
                self._collect()
                total += torch.stack([loss.attention.detach(), loss.ctc.detach()])
            if encoded.requires_grad:
                encoded.backward(leaf.grad)
                self._collect()
        return total

    def _collect(self) -> None:
        if self.half:
            self.half.collect()

    def objective(self, batch: Batch, ctc_only: bool) -> Tensor:
        """What is minimised, of one batch by itself."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self._objective(self.model.loss(batch, attention=not ctc_only), TargetCounts.of([batch]), ctc_only)

    def _objective(self, loss: Loss, counts: TargetCounts, ctc_only: bool) -> Tensor:
        ctc = loss.ctc / max(1, counts.characters)
        return weighted_loss(self.config.loss, ctc, None if ctc_only else loss.attention / max(1, counts.tokens))

    def features(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """Features (B, F, M), augmented, and their lengths (B,)."""
        features, lengths = self.model.features(batch.audio, batch.audio_lengths)
        if self.augment.frequency_masks or self.augment.time_masks:
            seeds = [seed_of(self.config.seed, epoch, row) for row in batch.rows.tolist()]
            features = spec_augment(features, lengths, seeds, self.augment)
        return features, lengths

    @contextmanager
    def _recomputing(self, on: bool):
        before = self.model.recomputes
        self.model.recompute_activations(on or before)
        try:
            yield
        finally:
            self.model.recompute_activations(before)


def _next_cut(model: SpeechModel, failed: Loaded, cuts: dict[int, SplitMicroBatch], unfit: list[int]) -> None:
    """Notes how the failed micro-batch is to be computed; where single utterances do not fit, leaves out the one
    that costs most."""
    assert failed.batch is not None
    number, before = failed.address.number, cuts.get(failed.address.number)
    left = [row for row in failed.batch.rows.tolist() if row not in unfit]
    if before is not None and before.parts >= len(left):
        lengths = dict(zip(failed.batch.rows.tolist(), failed.batch.audio_lengths.tolist()))
        unfit.append(max(left, key=lengths.__getitem__))
    else:
        cuts[number] = split_more(model, number, before)


def weighted_loss(config: LossConfig, ctc: Any, attention: Any) -> Any:
    """Both losses by their weights; ``attention`` None stands for CTC alone."""
    if attention is None:
        return ctc
    weight = config.ctc_weight
    return weight * ctc + (1 - weight) * attention if weight else attention


def seed_of(*parts: int) -> int:
    """A seed from numbers, the same on every machine."""
    digest = hashlib.blake2b(np.array(parts, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
