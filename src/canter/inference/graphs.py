"""Decoder steps in a few fixed shapes, captured as CUDA graphs.

A step of a small decoder is hundreds of short kernels: launched one by one they take longer than they run.
A graph launches them at once, but only in the shapes and at the addresses that it was captured with, so
live rows are rounded up to one of ``shapes``, columns and encoder frames to powers of two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from canter.models.cache import DecoderCache
from canter.models.decoder import Decoder

SHAPES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Rows of a captured step; between neighbours lies little, so that few rows are computed for nothing."""
SMALLEST = 64  # columns and frames


def next_shape(rows: int, shapes: Sequence[int] = SHAPES) -> int:
    """The smallest shape that holds ``rows``; beyond the largest, the next multiple of it."""
    return next((shape for shape in shapes if shape >= rows), -(-rows // shapes[-1]) * shapes[-1])


def power_of_two(size: int, most: int) -> int:
    """The power of two that holds ``size``, from SMALLEST on, but at most ``most``."""
    return min(most, max(SMALLEST, 1 << (size - 1).bit_length()))


@dataclass
class _Captured:
    graph: "torch.cuda.CUDAGraph"
    tokens: Tensor  # (R, N), read
    column: Tensor  # (1,), read
    logits: Tensor  # (R, N, V), written


class FixedSteps:
    """``step(tokens, cache)`` as the decoder's, in fixed shapes; on a CPU without capture, for tests."""

    def __init__(self, decoder: Decoder, shapes: Sequence[int] = SHAPES, capture: bool = True):
        self.decoder, self.shapes, self.capture = decoder, shapes, capture
        self.captured: dict[tuple[int, int, int, int], _Captured] = {}
        self.version = -1  # of the cache that the graphs know
        self.pool = None  # of memory, which all graphs share: one runs at a time
        self.warming: torch.cuda.Stream | None = None

    def rows(self, live: int) -> int:
        """Rows that a step of ``live`` ones computes."""
        return next_shape(live, self.shapes)

    def step(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """tokens (B, N) of all live rows -> logits (B, N, V), valid until the next step."""
        live, n = tokens.shape
        rows = self.rows(live)
        cache.reserve(rows - live, 0, before=0, after=n)
        cache.branch()
        if cache.version != self.version:
            self.captured.clear()  # the buffers that they were captured with are gone
            self.pool = None  # which went with the last of them
            self.version = cache.version
        columns = power_of_two(cache.column + n, cache.own.shape[4])
        frames = power_of_two(max(cache.frames), cache.cross.shape[4])
        key = (rows, n, columns, frames)
        if not self.capture:
            column = torch.tensor([cache.column], device=tokens.device)
            padded = tokens.new_zeros(rows, n)
            padded[:live] = tokens
            logits = self.decoder.fixed_step(padded, column, cache, columns, frames)
        else:
            step = self.captured.get(key) or self._capture(key, cache, tokens)
            step.tokens[:live] = tokens
            step.column.fill_(cache.column)
            step.graph.replay()
            logits = step.logits
        cache.column += n
        return logits[:live]

    def _capture(self, key: tuple[int, int, int, int], cache: DecoderCache, tokens: Tensor) -> _Captured:
        rows, n, columns, frames = key
        buffer = tokens.new_zeros(rows, n)
        column = torch.full((1,), cache.column, device=tokens.device)
        # Kernels choose their workspaces when first run, which must not happen inside a capture. What these
        # runs write stands in columns that the captured step writes anew.
        self.warming = side = self.warming or torch.cuda.Stream(tokens.device)
        side.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self.decoder.fixed_step(buffer, column, cache, columns, frames)
        torch.cuda.current_stream(tokens.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            logits = self.decoder.fixed_step(buffer, column, cache, columns, frames)
        self.pool = self.pool or graph.pool()
        self.captured[key] = step = _Captured(graph, buffer, column, logits)
        return step
