"""A micro-batch, and the sums of its losses.

B: utterances, S: samples, U: tokens, V: vocabulary, C: characters.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from canter.models.features import length_mask
from canter.models.packing import Packing
from canter.planning.groups import group_sizes


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

    def by_length(self) -> "list[Batch]":
        """Return the utterances in groups of like length, longest first: those of a packed micro-batch."""
        order = self.audio_lengths.argsort(descending=True, stable=True)
        sizes = group_sizes(self.audio_lengths[order].tolist())
        return [self.take(rows) for rows in order.split(sizes)]

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

    logits: Tensor  # (B, U - 1, V) of the tokens after the first; of a packed batch (1, N, V)
    temperature: float
    """Divisor of both models' logits."""


IGNORED = -100  # target of a token that bears no loss


def targets_of(batch: Batch) -> Tensor:
    """Return the tokens after the first (B, U - 1), IGNORED in place of prompt and padding."""
    size = batch.tokens.shape[1] - 1
    bears = length_mask(batch.token_lengths - 1, size) & ~length_mask(batch.prompt_lengths - 1, size)
    return torch.where(bears, batch.tokens[:, 1:], IGNORED)


def packing_of_tokens(groups: Sequence[Batch]) -> Packing:
    """Return where the tokens but the last of each utterance stand: those that the decoder reads."""
    return Packing([one.token_lengths - 1 for one in groups], [one.tokens.shape[1] - 1 for one in groups])


def attention_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the sum of cross-entropy over ``targets``, as of `targets_of`, and the number that bear loss.

    logits: (B, U - 1, V) of the tokens after the first. Label smoothing as in NeMo's SmoothedCrossEntropyLoss.
    """
    v = logits.shape[-1]
    total = F.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing * v / (v - 1),
    )
    return total, (targets != IGNORED).sum()


def distillation_loss(logits: Tensor, teacher: SoftTargets, targets: Tensor) -> Tensor:
    """Return the sum of T^2 KL(teacher || student) over ``targets``, in nats (Hinton et al., 2015, section 2).

    logits: (B, U - 1, V) of the tokens after the first. T^2 keeps the size of the gradient at every temperature T.
    """
    bears = targets != IGNORED
    student, target = (
        (one[bears].float() / teacher.temperature).log_softmax(-1) for one in (logits, teacher.logits.detach())
    )
    return teacher.temperature**2 * F.kl_div(student, target, reduction="sum", log_target=True)
