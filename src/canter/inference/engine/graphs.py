"""Decoder steps in a few fixed shapes, captured as CUDA graphs.

A step of a small decoder consists of hundreds of short kernels, and launching them takes longer than running them. A
graph launches all at once, but only in the shapes and at the addresses of its capture. So live rows are rounded up to
one of ``shapes``, columns and encoder frames to powers of two.

A capture takes as long as many steps. Until a shape has been used PATIENCE times, a larger captured shape computes it,
so that rare shapes, such as those of a queue's last rows, are never captured.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from canter.models.cache import DecoderCache
from canter.models.decoder import Decoder

SHAPES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Rows of a captured step; neighbours are close, so that few padding rows are computed."""
MIN_SIZE = 64  # columns and frames
PATIENCE = 16  # uses of a shape before its capture; as many steps in a larger shape cost less


def next_shape(rows: int, shapes: Sequence[int] = SHAPES) -> int:
    """Return the smallest shape that holds ``rows``; beyond the largest, the next multiple of it."""
    return next((shape for shape in shapes if shape >= rows), -(-rows // shapes[-1]) * shapes[-1])


def power_of_two(size: int, most: int) -> int:
    """Return the power of two that holds ``size``, between MIN_SIZE and ``most``."""
    return min(most, max(MIN_SIZE, 1 << (size - 1).bit_length()))


@dataclass
class _Captured:
    graph: "torch.cuda.CUDAGraph"
    tokens: Tensor  # (R, N), read
    column: Tensor  # (1,), read
    logits: Tensor  # (R, N, V), written


class FixedSteps:
    """Decoder steps in fixed shapes; ``capture=False`` runs them without CUDA graphs, on a CPU too."""

    def __init__(self, decoder: Decoder, shapes: Sequence[int] = SHAPES, capture: bool = True):
        self.decoder, self.shapes, self.capture = decoder, shapes, capture
        self.captured: dict[tuple[int, int, int, int], _Captured] = {}
        self.wanted: Counter[tuple[int, int, int, int]] = Counter()
        self.version = -1  # of the cache at capture
        self.pool = None  # of memory, shared by all graphs: one runs at a time
        self.side: torch.cuda.Stream | None = None  # stream of the captures
        self.rows = 0
        """Number of rows in the latest step."""

    def step(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """Return logits (B, N, V) of the tokens (B, N) of all live rows; they are valid until the next step."""
        live, n = tokens.shape
        self.rows = rows = next_shape(live, self.shapes)
        cache.reserve(rows - live, 0, before=0, after=n)
        cache.branch()
        if cache.version != self.version:
            self.captured.clear()  # their buffers are gone, and the pool with the last of them
            self.pool = None
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
            step = self._graph_for(key) or self._capture(key, cache, tokens)
            self.rows = len(step.tokens)
            step.tokens[:live] = tokens
            step.column.fill_(cache.column)
            step.graph.replay()
            logits = step.logits
        cache.column += n
        return logits[:live]

    def _graph_for(self, key: tuple[int, int, int, int]) -> _Captured | None:
        """Return the graph of this shape, or of the smallest larger shape until a capture is worth it."""
        self.wanted[key] += 1
        if key in self.captured or self.wanted[key] > PATIENCE:
            return self.captured.get(key)
        rows, n, columns, frames = key
        larger = [
            one for one in self.captured if one[1] == n and one[0] >= rows and one[2] >= columns and one[3] >= frames
        ]
        return self.captured[min(larger, key=lambda one: one[0] * (one[2] + one[3]))] if larger else None

    def _capture(self, key: tuple[int, int, int, int], cache: DecoderCache, tokens: Tensor) -> _Captured:
        rows, n, columns, frames = key
        buffer = tokens.new_zeros(rows, n)
        column = torch.full((1,), cache.column, device=tokens.device)
        current = torch.cuda.current_stream(tokens.device)
        # The priority of the capturing stream is that of the graph's kernels; they precede those of the encoder.
        self.side = side = self.side or torch.cuda.Stream(tokens.device, priority=-1)
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            # Kernels load and choose their workspaces when first run, which must not happen inside a capture. The
            # captured step overwrites the columns that this run writes.
            self.decoder.fixed_step(buffer, column, cache, columns, frames)
            # ``torch.cuda.graph`` would wait for the device, the encoder's next batch included, and release all cached
            # memory, pinned memory too, which would have to be allocated again.
            graph.capture_begin(*([self.pool] if self.pool else []), capture_error_mode="thread_local")
            try:
                logits = self.decoder.fixed_step(buffer, column, cache, columns, frames)
            finally:
                graph.capture_end()
        current.wait_stream(side)
        self.pool = self.pool or graph.pool()
        self.captured[key] = step = _Captured(graph, buffer, column, logits)
        return step
