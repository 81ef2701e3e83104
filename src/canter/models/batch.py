"""A micro-batch, and the sums of its losses.

B: utterances, S: samples, U: tokens, V: vocabulary, C: characters.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from canter.models.features import length_mask


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right. ``rows`` (B,) are the utterances' rows of the length index."""

    audio: Tensor  # (B, S) float32
    audio_lengths: Tensor  # (B,) samples
    tokens: Tensor  # (B, U): prompt, text, end
    token_lengths: Tensor  # (B,)
    prompt_lengths: Tensor  # (B,)
    characters: Tensor  # (B, C) CTC targets
    character_lengths: Tensor  # (B,)
    rows: Tensor  # (B,)

    def on_grid(self, samples: int, tokens: int) -> "Batch":
        """Return the batch padded to multiples of ``samples`` and ``tokens``, so that compiled code sees few shapes."""

        def fill(x: Tensor, step: int) -> Tensor:
            return F.pad(x, (0, -x.shape[1] % step))

        return replace(
            self,
            audio=fill(self.audio, samples),
            tokens=fill(self.tokens, tokens),
            characters=fill(self.characters, tokens),
        )

    def take(self, rows: Tensor) -> "Batch":
        """Return only the utterances at ``rows`` (n,), without padding that they do not need."""
        part = {name: getattr(self, name)[rows] for name in self.__dataclass_fields__}
        for padded, lengths in (
            ("audio", "audio_lengths"),
            ("tokens", "token_lengths"),
            ("characters", "character_lengths"),
        ):
            part[padded] = part[padded][:, : int(part[lengths].max())]
        return Batch(**part)

    def without(self, rows: Collection[int]) -> "Batch | None":
        """Return the batch without the utterances of these rows of the index; None if none remain."""
        keep = torch.tensor([row not in rows for row in self.rows.tolist()], device=self.rows.device)
        return self if keep.all() else self.take(keep.nonzero()[:, 0]) if keep.any() else None

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; DataLoader calls this by its name."""
        return Batch(*(getattr(self, name).pin_memory() for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Loss:
    """Sums over the targets that bear loss, and the numbers of these targets.

    They are divided only once the step is summed, so that its gradient does not depend on the division into
    micro-batches.
    """

    attention: Tensor
    attention_count: Tensor
    ctc: Tensor
    ctc_count: Tensor
    distillation: Tensor | None = None
    """Divergence from a teacher, over the targets of ``attention``."""


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's predictions for a batch, which a student is trained to match."""

    logits: Tensor  # (B, U - 1, V) of the tokens after the first
    temperature: float
    """Divisor of both models' logits."""


def attention_loss(logits: Tensor, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the sum of cross-entropy over text and end tokens, and their number.

    logits: (B, U - 1, V) of the tokens after the first. Prompt and padding bear no loss. Label smoothing as in NeMo's
    SmoothedCrossEntropyLoss.
    """
    targets, v, bears = batch.tokens[:, 1:], logits.shape[-1], _bears_loss(batch)
    total = F.cross_entropy(
        logits.float().flatten(0, 1),
        torch.where(bears, targets, -100).flatten(),
        ignore_index=-100,
        reduction="sum",
        label_smoothing=label_smoothing * v / (v - 1),
    )
    return total, bears.sum()


def distillation_loss(logits: Tensor, teacher: SoftTargets, batch: Batch) -> Tensor:
    """Return the sum of T^2 KL(teacher || student) over text and end tokens, in nats (Hinton et al., 2015, section 2).

    logits: (B, U - 1, V) of the tokens after the first. T^2 keeps the size of the gradient at every temperature T.
    """
    bears = _bears_loss(batch)
    student, target = (
        (one[bears].float() / teacher.temperature).log_softmax(-1) for one in (logits, teacher.logits.detach())
    )
    return teacher.temperature**2 * F.kl_div(student, target, reduction="sum", log_target=True)


def _bears_loss(batch: Batch) -> Tensor:
    """Return a mask (B, U - 1) of the tokens after the first: True for text and end, False for prompt and padding."""
    size = batch.tokens.shape[1] - 1
    return length_mask(batch.token_lengths - 1, size) & ~length_mask(batch.prompt_lengths - 1, size)
