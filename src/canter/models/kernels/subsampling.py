"""The strided convolutions before a FastConformer, without what lies between them in memory.

B: utterances, F: feature frames, M: mel bins, C: channels, last in memory; F1, M1, F2, ...: after each halving.

The first convolution makes 2 GB of a minute of 128 utterances in bf16, eight times what the second leaves of them. Here
a tile of the second's outputs computes the values of the first that it needs, as products of matrices: 16 columns
hold a window's 9 values, a one for the bias, and zeros. The backward pass computes them again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TAPS = 16  # rows of a table of weights: nine of a window, one for the bias, zeros
TILE, SMALL_TILE = 64, 32  # positions of a tile; of one whose every value has an address of its own
CHANNELS = 64  # of a tile
CHUNKS = 1024  # parts in which a gradient of weights is summed


@triton.jit
def _place(p, rows, columns):
    """Utterance, row and column of positions p, counted through (B, rows, columns)."""
    return p // (rows * columns), (p // columns) % rows, p % columns


@triton.jit
def _window(x, b, f2, m2, within, length, F, M, M1, a, e, TAPS: tl.constexpr):
    """(P, TAPS) what the first convolution sees for tap (a, e) of the second; all zero where it has no output."""
    k = tl.arange(0, TAPS)[None, :]
    f1, m1 = 2 * f2 + a - 1, 2 * m2 + e - 1
    there = within & (f1 >= 0) & (f1 < (length + 1) // 2) & (m1 >= 0) & (m1 < M1)
    row, column = 2 * f1[:, None] - 1 + k // 3, 2 * m1[:, None] - 1 + k % 3
    seen = there[:, None] & (k < 9) & (row >= 0) & (row < length[:, None]) & (column >= 0) & (column < M)
    values = tl.load(x + (b[:, None].to(tl.int64) * F + row) * M + column, mask=seen, other=0.0)
    return tl.where(there[:, None] & (k == 9), 1.0, values.to(tl.float32))


@triton.jit
def _start_forward(
    x, lengths, first, second, y, F, M, M1, F2, M2, total, C, TAPS: tl.constexpr, P: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    p, c = tl.program_id(0) * P + tl.arange(0, P), tl.program_id(1) * D + tl.arange(0, D)
    k, within, wide = tl.arange(0, TAPS), p < total, c < C
    b, f2, m2 = _place(p, F2, M2)
    length = tl.load(lengths + b, mask=within, other=0).to(tl.int32)
    weight = tl.load(first + k[:, None] * C + c[None, :], mask=wide[None, :], other=0.0)
    out = tl.zeros((P, D), tl.float32) + tl.load(second + 9 * C + c, mask=wide, other=0.0)[None, :]
    for n in range(9):
        a, e = n // 3, n % 3
        seen = _window(x, b, f2, m2, within, length, F, M, M1, a, e, TAPS).to(weight.dtype)
        h = tl.dot(seen, weight)
        tap = tl.load(second + n * C + c, mask=wide, other=0.0).to(tl.float32)
        out += tl.maximum(h, 0.0) * tap[None, :]
    place = p[:, None].to(tl.int64) * C + c[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=within[:, None] & wide[None, :])


@triton.jit
def _start_backward(
    x, lengths, first, second, gradient, firsts, seconds, F, M, M1, F2, M2, total, C, tiles,
    TAPS: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    chunk, c, k = tl.program_id(0), tl.program_id(1) * D + tl.arange(0, D), tl.arange(0, TAPS)
    wide = c < C
    weight = tl.load(first + k[:, None] * C + c[None, :], mask=wide[None, :], other=0.0)
    for_first, for_second = tl.zeros((TAPS, D), tl.float32), tl.zeros((TAPS, D), tl.float32)
    for tile in range(chunk, tiles, tl.num_programs(0)):
        p = tile * P + tl.arange(0, P)
        within = p < total
        b, f2, m2 = _place(p, F2, M2)
        length = tl.load(lengths + b, mask=within, other=0).to(tl.int32)
        place = p[:, None].to(tl.int64) * C + c[None, :]
        g = tl.load(gradient + place, mask=within[:, None] & wide[None, :], other=0.0)
        for n in range(9):
            a, e = n // 3, n % 3
            seen = _window(x, b, f2, m2, within, length, F, M, M1, a, e, TAPS).to(weight.dtype)
            h = tl.dot(seen, weight)
            tap = tl.load(second + n * C + c, mask=wide, other=0.0).to(tl.float32)
            passed = tl.where(h > 0, g.to(tl.float32) * tap[None, :], 0.0).to(weight.dtype)
            for_first += tl.dot(tl.trans(seen), passed)
            here = tl.zeros((TAPS, P), tl.float32) + tl.where(k == n, 1.0, 0.0)[:, None]
            product = (g.to(tl.float32) * tl.maximum(h, 0.0)).to(weight.dtype)
            for_second += tl.dot(here.to(weight.dtype), product)
        bias = tl.zeros((TAPS, P), tl.float32) + tl.where(k == 9, 1.0, 0.0)[:, None]
        for_second += tl.dot(bias.to(weight.dtype), g.to(weight.dtype))
    place = (chunk * TAPS + k[:, None]) * C + c[None, :]
    tl.store(firsts + place, for_first, mask=wide[None, :])
    tl.store(seconds + place, for_second, mask=wide[None, :])


@triton.jit
def _next_forward(
    y, lengths, table, z, F, M, F1, M1, total, C, P: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    p, c = tl.program_id(0) * P + tl.arange(0, P), tl.program_id(1) * D + tl.arange(0, D)
    within, wide = p < total, c < C
    b, f1, m1 = _place(p, F1, M1)
    length = tl.load(lengths + b, mask=within, other=0).to(tl.int32)
    out = tl.zeros((P, D), tl.float32) + tl.load(table + 9 * C + c, mask=wide, other=0.0).to(tl.float32)[None, :]
    for n in range(9):
        a, e = n // 3, n % 3
        f, m = 2 * f1 + a - 1, 2 * m1 + e - 1
        there = within & (f >= 0) & (f < length) & (m >= 0) & (m < M)
        place = ((b.to(tl.int64) * F + f) * M + m)[:, None] * C + c[None, :]
        value = tl.load(y + place, mask=there[:, None] & wide[None, :], other=0.0).to(tl.float32)
        tap = tl.load(table + n * C + c, mask=wide, other=0.0).to(tl.float32)
        out += tl.maximum(value, 0.0) * tap[None, :]
    place = p[:, None].to(tl.int64) * C + c[None, :]
    tl.store(z + place, out.to(z.dtype.element_ty), mask=within[:, None] & wide[None, :])


@triton.jit
def _next_backward_input(
    y, lengths, table, gradient, for_y, F, M, F1, M1, total, C, P: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    p, c = tl.program_id(0) * P + tl.arange(0, P), tl.program_id(1) * D + tl.arange(0, D)
    within, wide = p < total, c < C
    b, f, m = _place(p, F, M)
    length = tl.load(lengths + b, mask=within, other=0).to(tl.int32)
    place = p[:, None].to(tl.int64) * C + c[None, :]
    inside = within[:, None] & wide[None, :]
    value = tl.load(y + place, mask=inside, other=0.0)
    out = tl.zeros((P, D), tl.float32)
    for n in range(9):
        a, e = n // 3, n % 3
        f1, m1 = (f + 1 - a) // 2, (m + 1 - e) // 2
        reached = (f + 1 >= a) & ((f + 1 - a) % 2 == 0) & (f1 < F1) & (m + 1 >= e) & ((m + 1 - e) % 2 == 0)
        reached = reached & (m1 < M1) & within
        source = ((b.to(tl.int64) * F1 + f1) * M1 + m1)[:, None] * C + c[None, :]
        g = tl.load(gradient + source, mask=reached[:, None] & wide[None, :], other=0.0).to(tl.float32)
        tap = tl.load(table + n * C + c, mask=wide, other=0.0).to(tl.float32)
        out += g * tap[None, :]
    out = tl.where((value > 0) & (f < length)[:, None], out, 0.0)
    tl.store(for_y + place, out.to(for_y.dtype.element_ty), mask=inside)


@triton.jit
def _next_backward_weight(
    y, lengths, gradient, tables, F, M, F1, M1, total, C, tiles,
    TAPS: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    chunk, c, k = tl.program_id(0), tl.program_id(1) * D + tl.arange(0, D), tl.arange(0, TAPS)
    wide = c < C
    sums = tl.zeros((TAPS, D), tl.float32)
    for tile in range(chunk, tiles, tl.num_programs(0)):
        p = tile * P + tl.arange(0, P)
        within = p < total
        b, f1, m1 = _place(p, F1, M1)
        length = tl.load(lengths + b, mask=within, other=0).to(tl.int32)
        g = tl.load(
            gradient + p[:, None].to(tl.int64) * C + c[None, :], mask=within[:, None] & wide[None, :], other=0.0
        ).to(tl.float32)
        for n in range(9):
            a, e = n // 3, n % 3
            f, m = 2 * f1 + a - 1, 2 * m1 + e - 1
            there = within & (f >= 0) & (f < length) & (m >= 0) & (m < M)
            place = ((b.to(tl.int64) * F + f) * M + m)[:, None] * C + c[None, :]
            value = tl.load(y + place, mask=there[:, None] & wide[None, :], other=0.0).to(tl.float32)
            total_here = tl.sum(g * tl.maximum(value, 0.0), axis=0)
            sums += tl.where(k == n, 1.0, 0.0)[:, None] * total_here[None, :]
        sums += tl.where(k == 9, 1.0, 0.0)[:, None] * tl.sum(g, axis=0)[None, :]
    tl.store(tables + (chunk * TAPS + k[:, None]) * C + c[None, :], sums, mask=wide[None, :])


def _halved(size: int) -> int:
    return (size + 1) // 2


def _table(weight: Tensor, bias: Tensor) -> Tensor:
    """Return weight (C, 1, 3, 3) and bias (C,) as a table (TAPS, C): a tap a row, then the bias."""
    rows = torch.cat([weight.flatten(1).mT, bias[None]])
    return torch.cat([rows, rows.new_zeros(TAPS - len(rows), rows.shape[1])])


def _untabled(tables: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight (C, 1, 3, 3) and bias (C,) of partial sums (chunks, TAPS, C) of a table's."""
    table = tables.sum(0)
    return table[:9].mT.reshape(like.shape).to(like.dtype), table[9].to(like.dtype)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lengths, weight1, bias1, weight2, bias2):
        (b, f, m), c = x.shape, len(weight1)
        f2, m2 = _halved(_halved(f)), _halved(_halved(m))
        x, first, second = x.contiguous(), _table(weight1, bias1), _table(weight2, bias2)
        y = torch.empty(b, f2, m2, c, dtype=weight1.dtype, device=x.device)
        total = b * f2 * m2
        grid = (triton.cdiv(total, TILE), triton.cdiv(c, CHANNELS))
        with torch.cuda.device_of(x):
            _start_forward[grid](
                x, lengths, first, second, y, f, m, _halved(m), f2, m2, total, c, TAPS=TAPS, P=TILE, D=CHANNELS
            )  # fmt: skip
        ctx.save_for_backward(x, lengths, first, second, weight1, weight2)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, lengths, first, second, weight1, weight2 = ctx.saved_tensors
        (_, f, m), (b, f2, m2, c) = x.shape, gradient.shape
        total = b * f2 * m2
        tiles = triton.cdiv(total, TILE)
        grid = (min(CHUNKS, tiles), triton.cdiv(c, CHANNELS))
        firsts, seconds = (torch.empty(grid[0], TAPS, c, device=x.device) for _ in range(2))
        _start_backward[grid](
            x, lengths, first, second, gradient.contiguous(), firsts, seconds,
            f, m, _halved(m), f2, m2, total, c, tiles, TAPS=TAPS, P=TILE, D=CHANNELS,
        )  # fmt: skip
        return None, None, *_untabled(firsts, weight1), *_untabled(seconds, weight2)


class _Next(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, lengths, weight, bias):
        b, f, m, c = y.shape
        f1, m1 = _halved(f), _halved(m)
        y, table = y.contiguous(), _table(weight, bias)
        z = torch.empty(b, f1, m1, c, dtype=y.dtype, device=y.device)
        total = b * f1 * m1
        grid = (triton.cdiv(total, SMALL_TILE), triton.cdiv(c, CHANNELS))
        with torch.cuda.device_of(y):
            _next_forward[grid](y, lengths, table, z, f, m, f1, m1, total, c, P=SMALL_TILE, D=CHANNELS)
        ctx.save_for_backward(y, lengths, table, weight)
        return z

    @staticmethod
    def backward(ctx, gradient):
        y, lengths, table, weight = ctx.saved_tensors
        (b, f, m, c), (_, f1, m1, _) = y.shape, gradient.shape
        gradient, for_y, total = gradient.contiguous(), torch.empty_like(y), b * f * m
        channels = triton.cdiv(c, CHANNELS)
        _next_backward_input[(triton.cdiv(total, SMALL_TILE), channels)](
            y, lengths, table, gradient, for_y, f, m, f1, m1, total, c, P=SMALL_TILE, D=CHANNELS
        )
        total = b * f1 * m1
        tiles = triton.cdiv(total, SMALL_TILE)
        chunks = min(CHUNKS, tiles)
        tables = torch.empty(chunks, TAPS, c, device=y.device)
        _next_backward_weight[(chunks, channels)](
            y, lengths, gradient, tables, f, m, f1, m1, total, c, tiles, TAPS=TAPS, P=SMALL_TILE, D=CHANNELS
        )
        return for_y, None, *_untabled(tables, weight)


def start(x: Tensor, lengths: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Return two 3x3 convolutions of stride 2, of one channel and depthwise, with ReLU between: (B, F2, M2, C).

    x: (B, F, M), of which ``lengths`` (B,) frames are valid; weights (C, 1, 3, 3), biases (C,). Frames past an
    utterance's end are zero before either.
    """
    return _Start.apply(x, lengths, weight1, bias1, weight2, bias2)  # pyright: ignore[reportReturnType]


def halve(y: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ReLU and a depthwise 3x3 convolution of stride 2 of y (B, F, M, C): (B, F1, M1, C).

    Only ``lengths`` (B,) frames of y are valid, the others are taken as zero; weight (C, 1, 3, 3), bias (C,).
    """
    return _Next.apply(y, lengths, weight, bias)  # pyright: ignore[reportReturnType]
