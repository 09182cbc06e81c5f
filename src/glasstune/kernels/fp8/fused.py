"""Float8 rows and LoRA's columns on a GPU; imported only where CUDA is, since it needs Triton."""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_calls=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glasstune.kernels.fp8.low import USUAL, Low, extra_columns
from glasstune.kernels.fp8.numbers import E4M3, LARGEST, ROOM
from glasstune.kernels.lora_group.layout import Layout

_ROOM = tl.constexpr(ROOM)
_LARGEST = tl.constexpr(LARGEST)
_USUAL = tl.constexpr(USUAL)


@triton.jit
def _next_power(values):
    """Returns the least power of two that is not below each positive finite value."""
    bits = values.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _look(x_ptr, peak, squares, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Takes a part of a row into the largest magnitude and the sum of squares."""
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.abs(x))
        squares += x * x
    return peak, squares


@triton.jit
def _round(x_ptr, out_ptr, inverse, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a part of a row in units of its scale."""
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        tl.store(out_ptr + column, (x * inverse).to(tl.float8e4nv), mask=column < WIDTH)


@triton.jit
def _rows(
    p0, p1, p2, p3, stride0, stride1, stride2, stride3, low_ptr, factor_ptr, reach_ptr, out_ptr,
    scale_ptr, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr,
    K: tl.constexpr, K2: tl.constexpr, EXTRA: tl.constexpr, EXTRA2: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row of up to four parts, read twice, the second time from near memory."""
    row = tl.program_id(0).to(tl.int64)
    total: tl.constexpr = W0 + W1 + W2 + W3
    peaks = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    peaks, squares = _look(p0 + row * stride0, peaks, squares, W0, BLOCK)
    if W1 > 0:
        peaks, squares = _look(p1 + row * stride1, peaks, squares, W1, BLOCK)
    if W2 > 0:
        peaks, squares = _look(p2 + row * stride2, peaks, squares, W2, BLOCK)
    if W3 > 0:
        peaks, squares = _look(p3 + row * stride3, peaks, squares, W3, BLOCK)
    peak = tl.max(peaks)
    total_squares = tl.sum(squares)  # of NaN where a value is: a maximum drops it
    norm = tl.sqrt(total_squares)
    column = tl.arange(0, K2)
    if K > 0:
        reach = tl.load(reach_ptr + column, mask=column < K, other=0.0)
        peak = tl.maximum(peak, norm * tl.max(reach) * (_LARGEST / _ROOM))
    scale = tl.where(peak == 0, 1.0, _next_power(peak / _LARGEST))
    bad = (total_squares != total_squares) | (peak == float("inf"))
    scale = tl.where(bad, float("nan"), scale)
    tl.store(scale_ptr + row, scale)
    inverse = 1.0 / scale
    out = out_ptr + row * (total + EXTRA)
    _round(p0 + row * stride0, out, inverse, W0, BLOCK)
    if W1 > 0:
        _round(p1 + row * stride1, out + W0, inverse, W1, BLOCK)
    if W2 > 0:
        _round(p2 + row * stride2, out + W0 + W1, inverse, W2, BLOCK)
    if W3 > 0:
        _round(p3 + row * stride3, out + W0 + W1 + W2, inverse, W3, BLOCK)
    if K > 0:
        factor = tl.load(factor_ptr + column, mask=column < K, other=0.0)
        low = tl.load(low_ptr + row * K + column, mask=column < K, other=0.0).to(tl.float32)
        inside = low * factor * inverse
        inside = tl.where(
            inside > _LARGEST, _LARGEST, tl.where(inside < -_LARGEST, -_LARGEST, inside)
        )
        first = inside.to(tl.float8e4nv)
        second = (inside - first.to(tl.float32)).to(tl.float8e4nv)
        tl.store(out + total + column, first, mask=column < K)
        tl.store(out + total + K + column, first, mask=column < K)
        tl.store(out + total + 2 * K + column, second, mask=column < K)
        rest = 3 * K + tl.arange(0, EXTRA2)
        nothing = tl.zeros((EXTRA2,), tl.float32).to(tl.float8e4nv)
        tl.store(out + total + rest, nothing, mask=rest < EXTRA)


def fp8_rows_fused(
    parts: list[Tensor],
    low_Tk: Tensor | None,
    factor_k: Tensor | None,
    reach_k: Tensor | None,
    extra: int,
) -> tuple[Tensor, Tensor]:
    """Rounds rows to e4m3; arguments as of `fp8_rows`."""
    parts = [part if part.stride(1) == 1 else part.contiguous() for part in parts]
    widths = [part.shape[1] for part in parts]
    tokens, total = parts[0].shape[0], sum(widths)
    rows = torch.empty(tokens, total + extra, dtype=E4M3, device=parts[0].device)
    scale = torch.empty(tokens, 1, device=rows.device)
    absent = 4 - len(parts)
    k = 0
    if low_Tk is not None:
        k, low_Tk = low_Tk.shape[1], low_Tk.contiguous()
    block = min(4096, triton.next_power_of_2(max(widths)))
    _rows[(tokens,)](
        *parts, *[parts[0]] * absent, *[part.stride(0) for part in parts], *[0] * absent,
        low_Tk if k else scale, factor_k if k else scale, reach_k if k else scale, rows, scale,
        *widths, *[0] * absent, k, triton.next_power_of_2(max(k, 1)), extra,
        triton.next_power_of_2(max(extra, 1)), block, num_warps=8,
    )  # fmt: skip
    return rows, scale


@triton.jit
def _survey(
    down_ptr, up_ptr, turned_scale_ptr, scale_ptr, down_out_ptr, up_out_ptr, peaks_ptr,
    squares_ptr, width, outs, columns, lora_scale, down_programs,
    R: tl.constexpr, R2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: some columns of A, or some rows of B; copies them and measures each rank.

    `peaks` and `squares` are [programs, R2]: no atomics, so that every run gives the same bits.
    """
    program = tl.program_id(0)
    rank = tl.arange(0, R2)[:, None]
    if program < down_programs:
        at = program * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (rank < R) & (at < width)
        value = tl.load(down_ptr + rank * width + at, mask=inside, other=0.0)
        value = value.to(down_out_ptr.dtype.element_ty)
        tl.store(down_out_ptr + rank * width + at, value, mask=inside)
        unit = tl.load(turned_scale_ptr + at, mask=at < width, other=1.0)
    else:
        at = (program - down_programs) * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (rank < R) & (at < outs)
        value = tl.load(up_ptr + at * R + rank, mask=inside, other=0.0).to(tl.float32) * lora_scale
        value = value.to(up_out_ptr.dtype.element_ty)
        tl.store(up_out_ptr + at.to(tl.int64) * columns + rank, value, mask=inside)
        unit = tl.load(scale_ptr + at, mask=at < outs, other=1.0)
    exact = value.to(tl.float32)
    rows = tl.arange(0, R2)
    tl.store(peaks_ptr + program * R2 + rows, tl.max(tl.abs(exact) / unit, axis=1))
    tl.store(squares_ptr + program * R2 + rows, tl.sum(exact * exact, axis=1))


@triton.jit
def _factors(
    peaks_ptr, squares_ptr, first, count, other, other_count, R2: tl.constexpr, P2: tl.constexpr
):
    """Returns the factor and the reach of each rank, from one side's peaks and the other's norm."""
    rank = tl.arange(0, R2)[None, :]
    program = tl.arange(0, P2)[:, None]
    peaks = tl.load(peaks_ptr + (first + program) * R2 + rank, mask=program < count, other=0.0)
    squares = tl.load(
        squares_ptr + (other + program) * R2 + rank, mask=program < other_count, other=0.0
    )
    norms = tl.sqrt(tl.sum(squares, axis=0))
    usual = 1.0 / (_USUAL * tl.maximum(norms, 1e-8))
    factor = _next_power(tl.maximum(tl.max(peaks, axis=0) / _ROOM, usual))
    return factor, factor * norms


@triton.jit
def _write(
    down_out_ptr, up_out_ptr, turned_scale_ptr, scale_ptr, peaks_ptr, squares_ptr, turned_ptr,
    wide_ptr, factor_ptr, reach_ptr, factor_back_ptr, reach_back_ptr, width, outs, columns,
    turned_stride, wide_stride, down_programs, up_programs,
    R: tl.constexpr, R2: tl.constexpr, P2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the three columns of each rank, for some rows of one copy of W."""
    program = tl.program_id(0)
    rank = tl.arange(0, R2)
    forward, reach = _factors(
        peaks_ptr, squares_ptr, down_programs, up_programs, 0, down_programs, R2, P2
    )
    back, reach_back = _factors(
        peaks_ptr, squares_ptr, 0, down_programs, down_programs, up_programs, R2, P2
    )
    if program == 0:
        tl.store(factor_ptr + rank, forward, mask=rank < R)
        tl.store(reach_ptr + rank, reach, mask=rank < R)
        tl.store(factor_back_ptr + rank, back, mask=rank < R)
        tl.store(reach_back_ptr + rank, reach_back, mask=rank < R)
    column = rank[None, :]
    if program < down_programs:
        at = (program * BLOCK + tl.arange(0, BLOCK)[:, None]).to(tl.int64)
        inside = (column < R) & (at < width)
        value = tl.load(down_out_ptr + column * width + at, mask=inside, other=0.0).to(tl.float32)
        unit = tl.load(turned_scale_ptr + at, mask=at < width, other=1.0) * back[None, :]
        target = turned_ptr + at * turned_stride + column
    else:
        at = ((program - down_programs) * BLOCK + tl.arange(0, BLOCK)[:, None]).to(tl.int64)
        inside = (column < R) & (at < outs)
        value = tl.load(up_out_ptr + at * columns + column, mask=inside, other=0.0).to(tl.float32)
        unit = tl.load(scale_ptr + at, mask=at < outs, other=1.0) * forward[None, :]
        target = wide_ptr + at * wide_stride + column
    value = value / unit
    one = value.to(tl.float8e4nv)
    two = (value - one.to(tl.float32)).to(tl.float8e4nv)
    tl.store(target, one, mask=inside)
    tl.store(target + columns, two, mask=inside)
    tl.store(target + 2 * columns, one, mask=inside)


def write_low_fused(
    layout: Layout,
    downs: list[Tensor],
    ups: list[Tensor],
    low: Low,
    wide: tuple[Tensor, Tensor],
    turned: tuple[Tensor, Tensor],
) -> None:
    """Writes A and B behind both copies of W; arguments as of `write_low`. Two kernels a member."""
    i, k, extra = layout.width, layout.columns, extra_columns(layout)
    start, turned_start = wide[0].shape[1] - extra, turned[0].shape[1] - extra
    members = zip(layout.out_slices(), layout.rank_slices(), downs, ups, layout.scales, strict=True)
    for out, rank, down, up, scale in members:
        r, outs = down.shape[0], out.stop - out.start
        padded = triton.next_power_of_2(r)
        block = max(64, 16384 // padded)
        below, above = triton.cdiv(i, block), triton.cdiv(outs, block)
        peaks, squares = torch.empty(2, below + above, padded, device=low.factor_k.device)
        own = low.down_ki[rank], low.up_nk[out, rank]
        scales = turned[1], wide[1][out]
        _survey[(below + above,)](
            down.contiguous(), up.contiguous(), *scales, *own, peaks, squares, i, outs, k, scale,
            below, r, padded, block, num_warps=4,
        )  # fmt: skip
        _write[(below + above,)](
            *own, *scales, peaks, squares, turned[0][:, turned_start + rank.start :],
            wide[0][out, start + rank.start :], low.factor_k[rank], low.reach_k[rank],
            low.factor_back_k[rank], low.reach_back_k[rank], i, outs, k, turned[0].stride(0),
            wide[0].stride(0), below, above, r, padded,
            triton.next_power_of_2(max(below, above)), block, num_warps=4,
        )  # fmt: skip
