"""Packed micro-batches: utterances stand one after the other, without a batch axis and without padding.

Linear layers and norms take the positions of all utterances as one row of a batch. What looks across positions takes
groups of utterances of like length: attention and features pad each group to its longest utterance, and convolutions
have zeros between utterances. A layer is told by the mask that it is given: a `Packing` in place of a tensor.

B: utterances of a group, T: positions of its longest, N: positions of all utterances, D: width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from canter.models.features import attention_mask, length_mask


class _Place(torch.autograd.Function):
    """Select rows ``places`` of ``x``; the gradient of row i is that of the selected row ``back[i]``.

    Only gradients of one selected row reach each row of ``x``, so the backward pass selects too, which is several times
    as fast as adding by index. ``within`` is False where a row of ``x`` is not selected.
    """

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, back: Tensor, within: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, within)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        back, within = ctx.saved_tensors
        found = gradient.contiguous().index_select(0, back)
        return found if within is None else found * within, None, None, None


def _place(x: Tensor, places: Tensor, back: Tensor, within: Tensor | None = None) -> Tensor:
    return cast(Tensor, _Place.apply(x, places, back, within))


class Packing:
    """Where the positions of each utterance stand: packed (1, N), and padded in groups (B, T)."""

    def __init__(self, lengths: Sequence[Tensor], sizes: Sequence[int]):
        """lengths: (B,) of each group. sizes: T of each group, at least its greatest length."""
        self.lengths, self.sizes = list(lengths), list(sizes)
        self.valid = [length_mask(some, size) for some, size in zip(lengths, sizes, strict=True)]
        self._within = torch.cat([one.flatten() for one in self.valid])
        self._packed = (self._within.cumsum(0) - 1).clamp(min=0)  # of each padded position; at padding, of any
        self._padded = self._within.nonzero()[:, 0]  # of each packed position

    def __len__(self) -> int:
        """Return N."""
        return len(self._padded)

    @cached_property
    def row(self) -> Tensor:
        """Mask (1, N) of packed positions, which are all valid."""
        return torch.ones(1, len(self), dtype=torch.bool, device=self._padded.device)

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """Masks (B, 1, 1, T) of the keys of each group; None where all are attended."""
        return [attention_mask(some, size) for some, size in zip(self.lengths, self.sizes)]

    def pack(self, groups: Sequence[Tensor]) -> Tensor:
        """Return padded groups (B, T, ...) packed (1, N, ...)."""
        padded = torch.cat([group.flatten(0, 1) for group in groups])
        return _place(padded, self._padded, self._packed, self._within.view(-1, *[1] * (padded.ndim - 1)))[None]

    def split(self, x: Tensor) -> list[Tensor]:
        """Return packed ``x`` (1, N, ...) as padded groups (B, T, ...), with arbitrary values at padding."""
        padded = _place(x[0], self._packed, self._padded)
        parts = padded.split([valid.numel() for valid in self.valid])
        return [part.unflatten(0, valid.shape) for part, valid in zip(parts, self.valid)]

    def spread(self, x: Tensor, gap: int) -> tuple[Tensor, Tensor]:
        """Return packed ``x`` (1, N, D) with ``gap`` positions between utterances, and the mask of its own.

        ``gather`` takes them out again.
        """
        places, back, within = self._gaps(gap)
        return _place(x[0], places, back)[None], within[None]

    def gather(self, x: Tensor, gap: int) -> Tensor:
        """Return the positions (1, N, D) of ``x`` that ``spread`` did not insert."""
        places, back, within = self._gaps(gap)
        return _place(x[0], back, places, within[:, None])[None]

    def _gaps(self, gap: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the packed position of each spread one, the reverse, and the mask of spread positions."""
        if gap not in self._spreads:
            lengths = torch.cat(self.lengths)
            before = gap * torch.arange(len(lengths), device=lengths.device)
            back = torch.arange(len(self), device=lengths.device) + before.repeat_interleave(lengths)
            size = len(self) + gap * (len(lengths) - 1)
            within = torch.zeros(size, dtype=torch.bool, device=lengths.device).index_fill_(0, back, True)
            self._spreads[gap] = (within.cumsum(0) - 1).clamp(min=0), back, within
        return self._spreads[gap]

    @cached_property
    def _spreads(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        return {}


@dataclass(frozen=True)
class PackedMask:
    """In place of an attention mask: queries and keys are packed, and each utterance's attend to its own."""

    queries: Packing
    keys: Packing
