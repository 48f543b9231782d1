"""Triton kernels of `perception.ops.bilinear` for GPUs: weighted sums of bilinear samples, forward and backward.

A program computes a block of rows, that is of (batch, query, head), times a block of channels. Maps are stored with
channels last, so the channels of a pixel are contiguous in memory. Everything is computed in float32. Offsets have 64
bits, because the maps of a large batch have more than 2^31 numbers.

Arguments of kernels have no annotations except compile-time constants, because Triton interprets annotations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers of one program: eight for each of 128 threads, one load of 16 bytes of bfloat16
# Channels of one program. Backward, a row is 32 threads times 4 float32 numbers and is summed within its warp.
FORWARD_CHANNELS, BACKWARD_CHANNELS = 256, 128


@triton.jit
def _along(location, size, BORDER: tl.constexpr):
    """Along one axis: both pixels, the weight of the second, whether each is on the map, whether a gradient exists."""
    at = location * size - 0.5
    last = size - 1.0
    free = at == at
    if BORDER:
        free = (at > 0.0) & (at < last)  # a clamped location gets no gradient
        at = tl.minimum(tl.maximum(at, 0.0), last)
    else:
        at = tl.minimum(tl.maximum(at, -2.0), last + 2.0)  # so that it fits into 32 bits
    low = tl.floor(at)
    first = low.to(tl.int32)
    second = first + 1
    if BORDER:
        second = tl.minimum(second, size - 1)
    first_inside = (first >= 0) & (first < size)
    second_inside = (second >= 0) & (second < size)
    return first, second, at - low, first_inside, second_inside, free


@triton.jit
def _corners(
    locations, index, weight, at, in_rows, batch, head, N, h, w, heads, C, HAS_INDEX: tl.constexpr, BORDER: tl.constexpr
):
    """For one sample of each row: its weight, the offsets of its four pixels and whether to read each of them."""
    share = tl.load(weight + at, mask=in_rows, other=0.0).to(tl.float32)
    alive = in_rows & (share != 0.0)
    x = tl.load(locations + 2 * at, mask=alive, other=0.0).to(tl.float32)
    y = tl.load(locations + 2 * at + 1, mask=alive, other=0.0).to(tl.float32)
    x0, x1, fx, x0_in, x1_in, x_free = _along(x, w, BORDER)
    y0, y1, fy, y0_in, y1_in, y_free = _along(y, h, BORDER)
    plane = batch * N
    if HAS_INDEX:
        chosen = tl.load(index + at, mask=alive, other=0).to(tl.int64)
        plane += tl.minimum(tl.maximum(chosen, 0), N - 1)
    row0 = (plane * h + y0) * w
    row1 = (plane * h + y1) * w
    p00 = ((row0 + x0) * heads + head) * C
    p01 = ((row0 + x1) * heads + head) * C
    p10 = ((row1 + x0) * heads + head) * C
    p11 = ((row1 + x1) * heads + head) * C
    m00 = alive & y0_in & x0_in
    m01 = alive & y0_in & x1_in
    m10 = alive & y1_in & x0_in
    m11 = alive & y1_in & x1_in
    return share, fx, fy, x_free, y_free, p00, p01, p10, p11, m00, m01, m10, m11


@triton.jit(do_not_specialize=["rows", "per_batch", "N", "h", "w", "S"])
def _forward(
    maps, locations, index, weight, out, rows, per_batch, N, h, w, S, heads, C,
    HAS_INDEX: tl.constexpr, BORDER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    in_rows = row < rows
    in_channels = channel < C
    batch = row // per_batch
    head = row % heads
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for s in range(S):
        share, fx, fy, _, _, p00, p01, p10, p11, m00, m01, m10, m11 = _corners(
            locations, index, weight, row * S + s, in_rows, batch, head, N, h, w, heads, C, HAS_INDEX, BORDER
        )
        lower = share * fy
        upper = share - lower
        v00 = tl.load(maps + p00[:, None] + channel, mask=m00[:, None] & in_channels, other=0.0).to(tl.float32)
        v01 = tl.load(maps + p01[:, None] + channel, mask=m01[:, None] & in_channels, other=0.0).to(tl.float32)
        v10 = tl.load(maps + p10[:, None] + channel, mask=m10[:, None] & in_channels, other=0.0).to(tl.float32)
        v11 = tl.load(maps + p11[:, None] + channel, mask=m11[:, None] & in_channels, other=0.0).to(tl.float32)
        total += (upper * (1 - fx))[:, None] * v00 + (upper * fx)[:, None] * v01
        total += (lower * (1 - fx))[:, None] * v10 + (lower * fx)[:, None] * v11
    tl.store(out + row[:, None] * C + channel, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_channels)


@triton.jit(do_not_specialize=["rows", "per_batch", "N", "h", "w", "S"])
def _backward(
    grad, maps, locations, index, weight, maps_grad, locations_grad, weight_grad, rows, per_batch, N, h, w, S, heads, C,
    HAS_INDEX: tl.constexpr, BORDER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < rows
    batch = row // per_batch
    head = row % heads
    for s in range(S):
        at = row * S + s
        share, fx, fy, x_free, y_free, p00, p01, p10, p11, m00, m01, m10, m11 = _corners(
            locations, index, weight, at, in_rows, batch, head, N, h, w, heads, C, HAS_INDEX, BORDER
        )
        # Products of the four pixels and the gradient, summed over channels.
        d00 = tl.zeros((BLOCK_R,), tl.float32)
        d01 = tl.zeros((BLOCK_R,), tl.float32)
        d10 = tl.zeros((BLOCK_R,), tl.float32)
        d11 = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, C, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)[None, :]
            in_channels = channel < C
            # A row whose samples count nothing has nothing to hand on, whatever its gradient is.
            g = tl.load(
                grad + row[:, None] * C + channel, mask=(in_rows & (share != 0.0))[:, None] & in_channels, other=0.0
            ).to(tl.float32)
            k00 = m00[:, None] & in_channels
            k01 = m01[:, None] & in_channels
            k10 = m10[:, None] & in_channels
            k11 = m11[:, None] & in_channels
            d00 += tl.sum(g * tl.load(maps + p00[:, None] + channel, mask=k00, other=0.0).to(tl.float32), 1)
            d01 += tl.sum(g * tl.load(maps + p01[:, None] + channel, mask=k01, other=0.0).to(tl.float32), 1)
            d10 += tl.sum(g * tl.load(maps + p10[:, None] + channel, mask=k10, other=0.0).to(tl.float32), 1)
            d11 += tl.sum(g * tl.load(maps + p11[:, None] + channel, mask=k11, other=0.0).to(tl.float32), 1)
            lower = share * fy
            upper = share - lower
            tl.atomic_add(maps_grad + p00[:, None] + channel, (upper * (1 - fx))[:, None] * g, mask=k00, sem="relaxed")
            tl.atomic_add(maps_grad + p01[:, None] + channel, (upper * fx)[:, None] * g, mask=k01, sem="relaxed")
            tl.atomic_add(maps_grad + p10[:, None] + channel, (lower * (1 - fx))[:, None] * g, mask=k10, sem="relaxed")
            tl.atomic_add(maps_grad + p11[:, None] + channel, (lower * fx)[:, None] * g, mask=k11, sem="relaxed")
        top = d00 + fx * (d01 - d00)
        bottom = d10 + fx * (d11 - d10)
        dx = tl.where(x_free, share * w * (d01 - d00 + fy * (d11 - d10 - d01 + d00)), 0.0)
        dy = tl.where(y_free, share * h * (bottom - top), 0.0)
        tl.store(weight_grad + at, (top + fy * (bottom - top)).to(weight_grad.dtype.element_ty), mask=in_rows)
        tl.store(locations_grad + 2 * at, dx.to(locations_grad.dtype.element_ty), mask=in_rows)
        tl.store(locations_grad + 2 * at + 1, dy.to(locations_grad.dtype.element_ty), mask=in_rows)


def _blocks(C: int, most: int) -> tuple[int, int]:
    """Returns the numbers of rows and channels of one program."""
    channels = min(triton.next_power_of_2(C), most)
    return max(BLOCK // channels, 1), channels


def forward(
    maps: Tensor, locations: Tensor, index: Tensor | None, weight: Tensor, border: bool, dtype: torch.dtype
) -> Tensor:
    """Runs the forward kernel; arguments as in `perception.ops.bilinear.weighted_bilinear`."""
    B, N, h, w, heads, C = maps.shape
    _, Q, _, S, _ = locations.shape
    rows = B * Q * heads
    out = maps.new_empty(B, Q, heads, C, dtype=dtype)
    if out.numel() == 0:
        return out
    maps, locations, weight = maps.contiguous(), locations.contiguous(), weight.contiguous()
    block_r, block_c = _blocks(C, FORWARD_CHANNELS)
    with torch.cuda.device_of(maps):
        _forward[(triton.cdiv(rows, block_r), triton.cdiv(C, block_c))](
            maps, locations, locations if index is None else index.contiguous(), weight, out,
            rows, Q * heads, N, h, w, S, heads, C, index is not None, border, block_r, block_c, num_warps=4,
        )  # fmt: skip
    return out


def backward(
    grad: Tensor, maps: Tensor, locations: Tensor, index: Tensor | None, weight: Tensor, border: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the backward kernel: returns the gradients of maps, locations and weight, given that of the result."""
    B, N, h, w, heads, C = maps.shape
    _, Q, _, S, _ = locations.shape
    rows = B * Q * heads
    locations, weight, grad = (x.contiguous() for x in (locations, weight, grad))
    # In float32 every thread reads the four numbers that it adds to; in half precision threads would exchange them.
    dtype, maps = maps.dtype, maps.float().contiguous()
    maps_grad = torch.zeros_like(maps)
    locations_grad, weight_grad = torch.empty_like(locations), torch.empty_like(weight)
    if rows * C == 0:
        return maps_grad.to(dtype), locations_grad.zero_(), weight_grad.zero_()
    block_r, block_c = _blocks(C, BACKWARD_CHANNELS)
    with torch.cuda.device_of(maps):
        _backward[(triton.cdiv(rows, block_r),)](
            grad, maps, locations, locations if index is None else index.contiguous(), weight,
            maps_grad, locations_grad, weight_grad, rows, Q * heads, N, h, w, S, heads, C,
            index is not None, border, block_r, block_c, num_warps=4,
        )  # fmt: skip
    return maps_grad.to(dtype), locations_grad, weight_grad
