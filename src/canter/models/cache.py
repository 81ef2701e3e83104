"""Keys and values of the decoder's live rows.

L: layers, C: slots, H: heads, T: encoder frames, U: columns, K: head width, N: beams.
"""

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from canter.runtime import upload

ROUND = 8  # frames and columns of buffers are multiples of this, as fused attention wants its masks
ALIGNED = 64  # bytes, as torch aligns its own memory
SPARE = 128  # columns more than the next rows need, at most: moving live rows costs about as much as a step

T = TypeVar("T")


class CacheShape(Protocol):
    """The sizes of a decoder that its cache needs."""

    @property
    def layers(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def width(self) -> int: ...


def rounded(size: int) -> int:
    """Return the next multiple of ROUND."""
    return -(-size // ROUND) * ROUND


def untouched_zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return zeros of the type of ``like`` on the CPU, in memory that the system provides page by page as it is used.

    ``torch.zeros`` would write all of it.
    """
    size, item = math.prod(shape), like.element_size()
    raw = np.zeros(size * item + ALIGNED, np.uint8)
    begin = -raw.ctypes.data % ALIGNED
    return torch.from_numpy(raw)[begin : begin + size * item].view(like.dtype).view(*shape)


def swap_out(values: list[T], slots: Sequence[int]) -> None:
    """Remove ``slots`` from a list; its last entries take their places."""
    for slot in sorted(slots, reverse=True):
        values[slot] = values[-1]
        values.pop()


class DecoderCache:
    """Keys and values of live rows in every layer: those of the encoder output, projected once, and of the tokens.

    Rows fill slots 0 ... rows-1 of buffers with room for C: ``cross`` (L, 2, C, H, T, K) for cross-attention, ``own``
    (L, 2, C, H, U, K) for self-attention. All rows write their next token at the same ``column``; a row that entered
    later starts at a later one (``starts``), so a step reads and writes only slices, whatever the ages of its rows.
    ``cross_mask`` (C, T) and ``own_mask`` (C, N, U) are 0 where a row attends and -inf where it does not. Tokens that
    some rows take back are masked, and stay as holes until columns move (`rewind`).

    The N beams of a row share its slot: a step writes adjacent columns, one for each beam, and ``own_mask`` marks the
    columns of a beam's past (a tree in one row of keys). Choosing among beams rewrites only that mask; keys and values
    are never copied.
    """

    def __init__(self, config: CacheShape, like: Tensor, beams: int = 1, most: int = 0):
        """Make an empty cache on the device of ``like``, of its type or autocast's, which grows as rows enter.

        On a CPU room for ``most`` rows is made at once: it takes no memory until they enter, and growing needs both
        buffers.
        """
        if torch.is_autocast_enabled(like.device.type):
            like = like.new_empty(0, dtype=torch.get_autocast_dtype(like.device.type))
        self.beams, self.most = beams, most
        self.cross = like.new_zeros(config.layers, 2, 0, config.heads, 0, config.width // config.heads)
        self.own = self.cross.clone()
        self.cross_mask = like.new_zeros(0, 0)
        self.own_mask = like.new_zeros(0, beams, 0)
        # (3, C): starts + holes, prompts, and adapters
        self.places = torch.zeros(3, 0, dtype=torch.long, device=like.device)
        self.starts: list[int] = []  # of live rows: the column of the first token
        self.holes: list[int] = []  # number of masked columns since then
        self.prompts: list[int] = []  # tokens of their prompts
        self.frames: list[int] = []  # encoder frames of live rows
        self.adapters: list[int] = []  # their numbers in the model's bank
        self.column = 0
        self.version = 0  # counts the times that buffers moved in memory

    @property
    def rows(self) -> int:
        return len(self.starts)

    @property
    def start(self) -> Tensor:
        """``starts`` + ``holes`` (C,) on the device: a column's distance from it is the position of its token."""
        return self.places[0]

    @property
    def prompt(self) -> Tensor:
        """``prompts`` (C,) on the device."""
        return self.places[1]

    @property
    def adapter(self) -> Tensor:
        """``adapters`` (C,) on the device."""
        return self.places[2]

    @property
    def slots(self) -> int:
        """C: number of rows that the buffers have room for."""
        return self.own.shape[2]

    @property
    def on_cpu(self) -> bool:
        return self.own.device.type == "cpu"

    def reserve(self, rows: int, frames: int, before: int, after: int) -> None:
        """Make room for ``rows`` more rows of ``frames``, and for columns ``before`` and ``after`` the current one."""
        _, _, slots, _, size, _ = self.cross.shape
        more, longer = max(0, self.rows + rows - slots), max(0, rounded(frames) - size)
        if more or longer:
            if self.on_cpu:  # so that a queue that grows row by row copies it few times
                more = more and max(more, slots, self.most - slots)
            self.cross = self._grown(self.cross, slots + more, size + longer)
            # A slot that never had a row attends, for fixed shapes compute it too and a NaN would stay in there.
            self.cross_mask = F.pad(F.pad(self.cross_mask, (0, longer), value=-math.inf), (0, 0, 0, more))
            self.own = self._grown(self.own, slots + more, self.own.shape[4])
            self.own_mask = F.pad(self.own_mask, (0, 0, 0, 0, 0, more))
            self.places = F.pad(self.places, (0, more))
            self.version += 1
        if before > self.column or self.column + after > self.own.shape[4]:
            self._move_columns(before, after)

    def _grown(self, old: Tensor, slots: int, length: int) -> Tensor:
        if not self.on_cpu:
            return F.pad(old, (0, 0, 0, length - old.shape[4], 0, 0, 0, slots - old.shape[2]))
        new = untouched_zeros((*old.shape[:2], slots, old.shape[3], length, old.shape[5]), old)
        new[:, :, : self.rows, :, : old.shape[4]] = old[:, :, : self.rows]
        return new

    def _move_columns(self, before: int, after: int) -> None:
        """Move live rows to the leftmost columns possible, in longer buffers if necessary."""
        live = slice(0, self.rows)
        past = slice(min(self.starts, default=self.column), self.column)
        used, mask = self.own[:, :, live, :, past].clone(), self.own_mask[live, :, past].clone()
        if any(self.holes):
            used, mask = self._without_holes(used, mask)
        column = max(before, used.shape[4])
        # More than is needed, so that the rows of a long queue move, and buffers grow, once in many steps.
        # On a GPU at once: buffers that moved make captured steps useless.
        needed = column + after
        spare = SPARE if self.own.is_cuda else min(needed, SPARE)
        if needed + spare // 2 > self.own.shape[4]:
            size = rounded(needed + spare)
            shape = (*self.own.shape[:4], size, self.own.shape[5])
            self.own = untouched_zeros(shape, self.own) if self.on_cpu else self.own.new_zeros(shape)
            self.own_mask = self.own_mask.new_zeros(*self.own_mask.shape[:2], size)
            self.version += 1
        self.own[:, :, live, :, column - used.shape[4] : column] = used
        self.starts = [start + column - self.column for start in self.starts]
        self.column = column
        self._write_places(0)
        if self.beams > 1:  # in every row's past stand other beams
            self.own_mask[live, :, column - used.shape[4] : column] = mask

    def _without_holes(self, used: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the live rows' past columns ``used`` (L, 2, B, H, U, K) and their ``mask`` (B, 1, U) without holes, as
        many as the longest row has."""
        order = (mask[:, 0] == 0).to(torch.uint8).argsort(dim=1, stable=True)  # what is masked comes first
        self.starts = [start + hole for start, hole in zip(self.starts, self.holes)]
        self.holes = [0] * self.rows
        order = order[:, order.shape[1] - (self.column - min(self.starts)) :]
        places = order[None, None, :, None, :, None].expand(*used.shape[:4], -1, used.shape[5])
        return used.gather(4, places), mask.gather(2, order[:, None])

    def add(self, prompt_lengths: list[int], frames: list[int], adapters: list[int] | None = None) -> None:
        """Add live rows, whose prompts are about to end at ``column``."""
        first = self.rows
        self.starts += [self.column - length for length in prompt_lengths]
        self.holes += [0] * len(prompt_lengths)
        self.prompts += prompt_lengths
        self.frames += frames
        self.adapters += adapters or [0] * len(frames)
        attended = self._write_places(first)
        outside = torch.arange(self.cross.shape[4], device=self.own.device) >= attended[:, None]
        self.cross_mask[first : self.rows].zero_().masked_fill_(outside, -math.inf)

    def remove(self, slots: list[int]) -> None:
        """Remove rows; the last ones move into their slots, so that live rows stay together."""
        order = list(range(self.rows))
        swap_out(order, slots)
        moves = [(slot, source) for slot, source in enumerate(order) if slot != source]
        if moves:
            used = slice(min(self.starts[source] for _, source in moves), self.column)
            frames = slice(0, max(self.frames[source] for _, source in moves))
            cross, own = self.cross[:, :, :, :, frames], self.own[:, :, :, :, used]
            tables = ((cross, 2), (own, 2), (self.places, 1), (self.cross_mask, 0), (self.own_mask, 0))
            if self.own.is_cuda:  # where starting a copy takes longer than the copy
                new, old = upload([*zip(*moves)], self.own.device)
                for table, rows in tables:
                    table.index_copy_(rows, new, table.index_select(rows, old))
            else:
                for table, rows in tables:
                    for slot, source in moves:
                        table.select(rows, slot).copy_(table.select(rows, source))
        for values in (self.starts, self.holes, self.prompts, self.frames, self.adapters):
            swap_out(values, slots)

    def rewind(self, counts: Sequence[int], latest: int) -> None:
        """Take back the last ``counts`` tokens of each row, which has written the ``latest`` columns; a cache of one
        beam only. Columns that all rows take back are free again, others are masked."""
        freed = min([*counts, latest])
        self.column -= freed
        latest -= freed
        rest = [count - freed for count in counts]
        if not any(rest):
            return
        for slot, count in enumerate(rest):
            if count > latest:  # before the latest columns, there may be holes already
                past = self.own_mask[slot, 0, self.starts[slot] : self.column]
                places = (past == 0).nonzero()[-count:, 0] + self.starts[slot]
                self.own_mask[slot, :, places] = -math.inf
            self.holes[slot] += count
        taken = upload(rest, self.own.device)
        self.places[0, : self.rows] += taken
        if latest:
            masked = torch.arange(latest, 0, -1, device=self.own.device) <= taken[:, None]
            self.own_mask[: self.rows, :, self.column - latest : self.column].masked_fill_(masked[:, None], -math.inf)

    def branch(self) -> None:
        """Mask the columns of the next step so that each beam attends only to its own."""
        if self.beams > 1:
            apart = torch.full((self.beams, self.beams), -math.inf, device=self.own_mask.device)
            apart = apart.fill_diagonal_(0.0).to(self.own_mask.dtype)
            self.own_mask[:, :, self.column : self.column + self.beams] = apart

    def choose(self, parents: Tensor, first: int = 0) -> None:
        """Make beam n of a row continue beam ``parents[row, n]``; parents (rows, N), from slot ``first`` on."""
        mask = self.own_mask[first : first + len(parents), :, : self.column]
        mask.copy_(mask.gather(1, parents[:, :, None].expand(-1, -1, self.column)))

    def _write_places(self, first: int) -> Tensor:
        """Write where the rows from slot ``first`` on start to the device, and return their frames there."""
        rows = slice(first, self.rows)
        lists = (self.starts, self.holes, self.prompts, self.adapters, self.frames)
        starts, holes, prompts, adapters, frames = upload([values[rows] for values in lists], self.own.device)
        self.places[:, rows] = torch.stack([starts + holes, prompts, adapters])
        before = torch.arange(self.own.shape[4], device=self.own.device) < starts[:, None]
        self.own_mask[rows].zero_().masked_fill_(before[:, None], -math.inf)
        return frames
