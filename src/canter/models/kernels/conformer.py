"""A Conformer layer's depthwise convolution and the shift of its relative positions, each in one pass over memory.

B: utterances, T: frames, D: width, K: taps, H: heads, N: distances. Operators of torch's, so that compiled layers take
them as they are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FRAMES, WIDTH = 32, 64  # of a tile of the convolution
CHUNKS = 512  # parts in which the gradient of its weights is summed
ROWS, COLUMNS = 16, 128  # of a tile of scores


@triton.jit
def _depthwise(
    x, valid, weight, bias, mean, variance, gain, shift, y, epsilon, T, D, blocks,
    K: tl.constexpr, BIAS: tl.constexpr, FLIPPED: tl.constexpr, NORMED: tl.constexpr, F: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """FLIPPED: from the output's gradient the input's. NORMED: a norm by these statistics and SiLU follow."""
    b, t = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * F + tl.arange(0, F)
    d = tl.program_id(1) * W + tl.arange(0, W)
    wide, start = d < D, b.to(tl.int64) * T
    out = tl.zeros((F, W), tl.float32)
    if BIAS:
        out += tl.load(bias + d, mask=wide, other=0.0).to(tl.float32)[None, :]
    for k in range(K):
        source = t + k - K // 2
        there = (source >= 0) & (source < T)
        if not FLIPPED:
            there = there & (tl.load(valid + start + source, mask=there, other=0) != 0)
        value = tl.load(x + (start + source)[:, None] * D + d[None, :], mask=there[:, None] & wide[None, :], other=0.0)
        tap = tl.load(weight + d * K + (K - 1 - k if FLIPPED else k), mask=wide, other=0.0)
        out += value.to(tl.float32) * tap.to(tl.float32)[None, :]
    within = t < T
    if FLIPPED:
        kept = tl.load(valid + start + t, mask=within, other=0) != 0
        out = tl.where(kept[:, None], out, 0.0)
    if NORMED:
        scale = tl.load(gain + d, mask=wide, other=0.0).to(tl.float32)
        scale = scale / tl.sqrt(tl.load(variance + d, mask=wide, other=1.0).to(tl.float32) + epsilon)
        centre = tl.load(mean + d, mask=wide, other=0.0).to(tl.float32)
        out = (out - centre[None, :]) * scale[None, :]
        out += tl.load(shift + d, mask=wide, other=0.0).to(tl.float32)[None, :]
        out = out * tl.sigmoid(out)
    place = (start + t)[:, None] * D + d[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=within[:, None] & wide[None, :])


@triton.jit
def _depthwise_table(
    x, valid, gradient, tables, T, D, blocks, tiles,
    K: tl.constexpr, TAPS: tl.constexpr, F: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    chunk, d, row = tl.program_id(0), tl.program_id(1) * W + tl.arange(0, W), tl.arange(0, TAPS)
    wide = d < D
    sums = tl.zeros((TAPS, W), tl.float32)
    for tile in range(chunk, tiles, tl.num_programs(0)):
        t = (tile % blocks) * F + tl.arange(0, F)
        start = (tile // blocks).to(tl.int64) * T
        within = t < T
        g = tl.load(
            gradient + (start + t)[:, None] * D + d[None, :], mask=within[:, None] & wide[None, :], other=0.0
        ).to(tl.float32)
        for k in range(K):
            source = t + k - K // 2
            there = within & (source >= 0) & (source < T)
            there = there & (tl.load(valid + start + source, mask=there, other=0) != 0)
            value = tl.load(
                x + (start + source)[:, None] * D + d[None, :], mask=there[:, None] & wide[None, :], other=0.0
            )
            sums += tl.where(row == k, 1.0, 0.0)[:, None] * tl.sum(g * value.to(tl.float32), axis=0)[None, :]
        sums += tl.where(row == K, 1.0, 0.0)[:, None] * tl.sum(g, axis=0)[None, :]
    place = (chunk * TAPS + row[:, None]) * D + d[None, :]
    tl.store(tables + place, sums, mask=wide[None, :])


def _run_depthwise(
    x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Any, ...] = (), flipped: bool = False
) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    (b, t, d), y = x.shape, torch.empty_like(x)
    blocks = triton.cdiv(t, FRAMES)
    *tables, epsilon = norm or (weight, weight, weight, weight, 0.0)  # where there is none nothing is read
    with torch.cuda.device_of(x):
        _depthwise[(b * blocks, triton.cdiv(d, WIDTH))](
            x, valid, weight, weight if bias is None else bias, *tables, y, epsilon, t, d, blocks, K=weight.shape[2],
            BIAS=bias is not None, FLIPPED=flipped, NORMED=bool(norm), F=FRAMES, W=WIDTH,
        )  # fmt: skip
    return y


@torch.library.custom_op("canter::depthwise", mutates_args=())
def depthwise(x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a depthwise convolution, zero padding, of x (B, T, D), taken as zero where ``valid`` (B, T) is false."""
    return _run_depthwise(x, valid, weight, bias)


@torch.library.custom_op("canter::depthwise_backward", mutates_args=())
def _depthwise_backward(gradient: Tensor, x: Tensor, valid: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, gradient = x.contiguous(), gradient.contiguous()
    (b, t, d), k = x.shape, weight.shape[2]
    blocks, taps = triton.cdiv(t, FRAMES), triton.next_power_of_2(k + 1)
    tiles = b * blocks
    chunks = min(CHUNKS, tiles)
    tables = torch.empty(chunks, taps, d, device=x.device)
    with torch.cuda.device_of(x):
        _depthwise_table[(chunks, triton.cdiv(d, WIDTH))](
            x, valid, gradient, tables, t, d, blocks, tiles, K=k, TAPS=taps, F=FRAMES, W=WIDTH
        )
    table = tables.sum(0).to(weight.dtype)
    for_x = _run_depthwise(gradient, valid, weight, None, flipped=True)
    return for_x, table[:k].mT.contiguous().view(weight.shape), table[k].clone()


@depthwise.register_fake
def _(x, valid, weight, bias):
    return x.new_empty(x.shape)


@_depthwise_backward.register_fake
def _(gradient, x, valid, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _keep(ctx, inputs, output):
    *kept, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*kept)


def _depthwise_gradient(ctx, gradient):
    for_x, for_weight, for_bias = _depthwise_backward(gradient, *ctx.saved_tensors)
    return for_x, None, for_weight, for_bias if ctx.has_bias else None


depthwise.register_autograd(_depthwise_gradient, setup_context=_keep)


@torch.library.custom_op("canter::depthwise_normed", mutates_args=())
def depthwise_normed(
    x: Tensor,
    valid: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    gain: Tensor,
    shift: Tensor,
    epsilon: float,
) -> Tensor:
    """Return ``depthwise``, BatchNorm by given statistics (D,), and SiLU; without gradients."""
    return _run_depthwise(x, valid, weight, bias, (mean, variance, gain, shift, epsilon))


@depthwise_normed.register_fake
def _(x, valid, weight, bias, mean, variance, gain, shift, epsilon):
    return x.new_empty(x.shape)


@triton.jit
def _shift(scores, valid, out, T, N, batch, heads, LEAST: tl.constexpr, R: tl.constexpr, S: tl.constexpr):
    """(H, B, T, N) by distance -> (B, H, T, T) by key."""
    bh, t, s = (tl.program_id(0), tl.program_id(1) * R + tl.arange(0, R), tl.program_id(2) * S + tl.arange(0, S))
    inside = (t < T)[:, None] & (s < T)[None, :]
    b, h = (bh // heads).to(tl.int64), bh % heads
    source = ((h * batch + b) * T + t)[:, None] * N + (T - 1 - t[:, None] + s[None, :])
    value = tl.load(scores + source, mask=inside, other=0.0)
    kept = tl.load(valid + b * T + s, mask=s < T, other=0) != 0
    line = bh.to(tl.int64) * T + t
    tl.store(out + line[:, None] * T + s[None, :], tl.where(kept[None, :], value, LEAST), mask=inside)


@triton.jit
def _shift_back(gradient, valid, out, T, N, batch, heads, R: tl.constexpr, S: tl.constexpr):
    bh, t, n = (tl.program_id(0), tl.program_id(1) * R + tl.arange(0, R), tl.program_id(2) * S + tl.arange(0, S))
    b, h = (bh // heads).to(tl.int64), bh % heads
    s = n[None, :] - (T - 1 - t[:, None])
    there = (t < T)[:, None] & (s >= 0) & (s < T)
    there = there & (tl.load(valid + b * T + s, mask=there, other=0) != 0)
    value = tl.load(gradient + (bh.to(tl.int64) * T + t)[:, None] * T + s, mask=there, other=0.0)
    place = ((h * batch + b) * T + t)[:, None] * N + n[None, :]
    tl.store(out + place, value, mask=(t < T)[:, None] & (n < N)[None, :])


@torch.library.custom_op("canter::relative_bias", mutates_args=())
def relative_bias(scores: Tensor, valid: Tensor) -> Tensor:
    """Return scores (H, B, T, N) by distance, from T - 1 down, as (B, H, T, T) by key, where ``valid`` (B, T).

    Invalid keys get the type's least value.
    """
    h, b, t, n = scores.shape
    out = scores.new_empty(b, h, t, t)
    grid = (b * h, triton.cdiv(t, ROWS), triton.cdiv(t, COLUMNS))
    least = torch.finfo(scores.dtype).min
    with torch.cuda.device_of(scores):
        _shift[grid](scores.contiguous(), valid, out, t, n, b, h, LEAST=least, R=ROWS, S=COLUMNS)
    return out


@torch.library.custom_op("canter::relative_bias_backward", mutates_args=())
def _relative_bias_backward(gradient: Tensor, valid: Tensor, distances: int) -> Tensor:
    b, h, t, _ = gradient.shape
    out = gradient.new_empty(h, b, t, distances)
    grid = (b * h, triton.cdiv(t, ROWS), triton.cdiv(distances, COLUMNS))
    with torch.cuda.device_of(gradient):
        _shift_back[grid](gradient.contiguous(), valid, out, t, distances, b, h, R=ROWS, S=COLUMNS)
    return out


@relative_bias.register_fake
def _(scores, valid):
    h, b, t, _ = scores.shape
    return scores.new_empty(b, h, t, t)


@_relative_bias_backward.register_fake
def _(gradient, valid, distances):
    b, h, t, _ = gradient.shape
    return gradient.new_empty(h, b, t, distances)


def _keep_valid(ctx, inputs, output):
    scores, valid = inputs
    ctx.distances = scores.shape[-1]
    ctx.save_for_backward(valid)


def _shift_gradient(ctx, gradient):
    return _relative_bias_backward(gradient, *ctx.saved_tensors, ctx.distances), None


relative_bias.register_autograd(_shift_gradient, setup_context=_keep_valid)
