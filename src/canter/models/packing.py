"""Packed micro-batches: utterances stand one after the other, without a batch axis and without padding.

Linear layers and norms take the positions of all utterances as one row of a batch. What looks across positions takes
groups of utterances of like length: attention and features pad each group to its longest utterance, and convolutions
have zeros between utterances. A layer recognises packed input by its mask: a `Packing` in place of a tensor.

B: utterances of a group, T: positions of its longest, N: positions of all utterances, D: width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor

from canter.models.features import attention_mask, length_mask


class _Group(NamedTuple):
    """A group's places: its rows of the packed tensor, and where they stand padded."""

    rows: slice
    padded: Tensor | None
    """Padded position of each row; None where the group has no padding."""
    packed: Tensor
    """Row of each padded position, counted from the group's first; at padding, of any."""
    padding: Tensor
    """Padded positions that are padding."""


class _Split(torch.autograd.Function):
    """Rows (N, ...) to padded groups (B T, ...). Groups without padding are views; padding has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, groups: Sequence[_Group]) -> tuple[Tensor, ...]:
        ctx.groups, ctx.shape = groups, x.shape
        return tuple(x[g.rows] if g.padded is None else x[g.rows].index_select(0, g.packed) for g in groups)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return _packed(gradients, ctx.groups, ctx.shape), None


class _Pack(torch.autograd.Function):
    """Padded groups (B T, ...) to rows (N, ...)."""

    @staticmethod
    def forward(ctx, groups: Sequence[_Group], rows: int, *padded: Tensor) -> Tensor:
        ctx.groups = groups
        return _packed(padded, groups, (rows, *padded[0].shape[1:]))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        found: list[Tensor] = []
        for group in ctx.groups:
            part = gradient[group.rows]
            if group.padded is not None:
                part = part.index_select(0, group.packed).index_fill_(0, group.padding, 0)
            found.append(part)
        return None, None, *found


def _packed(padded: Sequence[Tensor], groups: Sequence[_Group], shape: Sequence[int]) -> Tensor:
    rows = padded[0].new_empty(shape)
    for part, group in zip(padded, groups, strict=True):
        if group.padded is None:
            rows[group.rows] = part
        else:
            torch.index_select(part, 0, group.padded, out=rows[group.rows])
    return rows


class _Select(torch.autograd.Function):
    """Select rows ``places`` of x.

    The gradient of row i is that of the selected row ``back[i]``, and zero for ``unused`` rows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, back: Tensor, unused: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, unused)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        back, unused = ctx.saved_tensors
        found = gradient.contiguous().index_select(0, back)
        return found if unused is None else found.index_fill_(0, unused, 0), None, None, None


class _Gaps(NamedTuple):
    """Rows with a gap between utterances."""

    spread: Tensor
    """Place of each row."""
    packed: Tensor
    """Row of each place; in a gap, of any."""
    between: Tensor
    """Places in gaps."""
    valid: Tensor
    """Mask (1, places) of the places that are not in gaps."""


class Packing:
    """Map between the packed positions (1, N) of utterances and their padded positions in groups (B, T)."""

    def __init__(self, lengths: Sequence[Tensor], sizes: Sequence[int]):
        """lengths: (B,) of each group. sizes: T of each group, at least its greatest length."""
        self.lengths, self.sizes = list(lengths), list(sizes)
        self.valid = [length_mask(some, size) for some, size in zip(lengths, sizes, strict=True)]
        self._groups: list[_Group] = []
        self._gaps: dict[int, _Gaps] = {}
        start = 0
        for valid in self.valid:
            within = valid.flatten()
            padded = within.nonzero()[:, 0]
            rows = slice(start, start + len(padded))
            full = len(padded) == len(within)
            packed = (within.cumsum(0) - 1).clamp(min=0)
            self._groups.append(_Group(rows, None if full else padded, packed, (~within).nonzero()[:, 0]))
            start = rows.stop
        self._rows = start

    def __len__(self) -> int:
        """Return N."""
        return self._rows

    @cached_property
    def row(self) -> Tensor:
        """Mask (1, N) of packed positions, which are all valid."""
        return torch.ones(1, len(self), dtype=torch.bool, device=self.lengths[0].device)

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """Masks (B, 1, 1, T) of the keys of each group; None where all are attended."""
        return [attention_mask(some, size) for some, size in zip(self.lengths, self.sizes)]

    def pack(self, groups: Sequence[Tensor]) -> Tensor:
        """Return padded groups (B, T, ...) packed (1, N, ...)."""
        return cast(Tensor, _Pack.apply(self._groups, len(self), *(group.flatten(0, 1) for group in groups)))[None]

    def split(self, x: Tensor) -> list[Tensor]:
        """Return packed ``x`` (1, N, ...) as padded groups (B, T, ...), with arbitrary values at padding."""
        parts = cast(tuple[Tensor, ...], _Split.apply(x[0], self._groups))
        return [part.unflatten(0, valid.shape) for part, valid in zip(parts, self.valid)]

    def spread(self, x: Tensor, gap: int) -> tuple[Tensor, Tensor]:
        """Return packed ``x`` (1, N, D) with ``gap`` positions between utterances, and the mask of its own.

        ``gather`` takes them out again.
        """
        gaps = self._with_gaps(gap)
        return cast(Tensor, _Select.apply(x[0], gaps.packed, gaps.spread, None))[None], gaps.valid

    def gather(self, x: Tensor, gap: int) -> Tensor:
        """Return the positions (1, N, D) of ``x`` that ``spread`` did not insert."""
        gaps = self._with_gaps(gap)
        return cast(Tensor, _Select.apply(x[0], gaps.spread, gaps.packed, gaps.between))[None]

    def _with_gaps(self, gap: int) -> _Gaps:
        if gap not in self._gaps:
            lengths = torch.cat(self.lengths)
            before = gap * torch.arange(len(lengths), device=lengths.device)
            spread = torch.arange(len(self), device=lengths.device) + before.repeat_interleave(lengths)
            places = len(self) + gap * (len(lengths) - 1)
            valid = torch.zeros(places, dtype=torch.bool, device=lengths.device).index_fill_(0, spread, True)
            packed = (valid.cumsum(0) - 1).clamp(min=0)
            self._gaps[gap] = _Gaps(spread, packed, (~valid).nonzero()[:, 0], valid[None])
        return self._gaps[gap]


@dataclass(frozen=True)
class PackedMask:
    """Attention mask of packed queries and keys: the queries of an utterance attend to its own keys only."""

    queries: Packing
    keys: Packing
