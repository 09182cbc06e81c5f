"""Expansion to float8 on a GPU: one read of the packed weight, one write of the float8 one.

Imported only where CUDA is, since it needs Triton. By columns a program turns a tile: it reads
along rows and writes along columns.
"""

# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_calls=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from glasstune.kernels.expand.fused import _scale


@triton.jit
def _inverse(scale):
    """Returns the exact inverse of a power of two; a plain division may be off by a bit."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _turned(values, unit, back):
    """Returns what the layout by rows holds, in units of the columns."""
    return (
        (values * _inverse(unit)).to(tl.float8e4nv).to(tl.float32) * (unit * _inverse(back))
    ).to(tl.float8e4nv)


@triton.jit
def _rows_4bit(
    packed_ptr, absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, code_ptr, unit_ptr,
    out_ptr, width, stride, BLOCK: tl.constexpr, BYTES: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """One program: BYTES bytes of one row, twice as many values; rows start at a whole byte."""
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    inside = byte < width // 2
    at = row * (width // 2) + byte
    pair = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
    scale = _scale(
        at // (BLOCK // 2), inside, absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr,
        NESTED,
    )  # fmt: skip
    first = tl.load(code_ptr + (pair >> 4)) * scale
    second = tl.load(code_ptr + (pair & 15)) * scale
    unit = tl.load(unit_ptr + row + tl.zeros((1,), tl.int32))
    values = tl.interleave(first, second) * _inverse(unit)
    column = tl.program_id(1) * BYTES * 2 + tl.arange(0, BYTES * 2)
    tl.store(out_ptr + row * stride + column, values.to(tl.float8e4nv), mask=column < width)


@triton.jit
def _turned_4bit(
    packed_ptr, absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, code_ptr, unit_ptr,
    back_ptr, out_ptr, rows, width, stride, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BYTES: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """One program: BYTES bytes of each of ROWS rows, written as twice as many rows of `out`."""
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    byte = (tl.program_id(0) * BYTES + tl.arange(0, BYTES))[None, :]
    inside = (row < rows) & (byte < width // 2)
    at = row * (width // 2) + byte
    pair = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
    scale = _scale(
        at // (BLOCK // 2), inside, absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr,
        NESTED,
    )  # fmt: skip
    unit = tl.load(unit_ptr + row, mask=row < rows, other=1.0)
    column = byte * 2
    there = byte < width // 2
    first = tl.load(code_ptr + (pair >> 4)) * scale
    back = tl.load(back_ptr + column, mask=there, other=1.0)
    at_out = out_ptr + column.to(tl.int64) * stride + row
    tl.store(at_out, _turned(first, unit, back), mask=inside)
    second = tl.load(code_ptr + (pair & 15)) * scale
    back = tl.load(back_ptr + column + 1, mask=there, other=1.0)
    tl.store(at_out + stride, _turned(second, unit, back), mask=inside)


@triton.jit
def _rows_int8(
    q_ptr, scale_ptr, unit_ptr, out_ptr, width, q_stride, stride, SIZE: tl.constexpr
):  # fmt: skip
    """One program: SIZE values of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < width
    one = tl.zeros((1,), tl.int32)
    scale = tl.div_rn(tl.load(scale_ptr + row + one), tl.full((1,), 127.0, tl.float32))
    values = tl.load(q_ptr + row * q_stride + column, mask=inside, other=0).to(tl.float32) * scale
    values = values * _inverse(tl.load(unit_ptr + row + one))
    tl.store(out_ptr + row * stride + column, values.to(tl.float8e4nv), mask=inside)


@triton.jit
def _turned_int8(
    q_ptr, scale_ptr, unit_ptr, back_ptr, out_ptr, rows, width, q_stride, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of [ROWS, COLUMNS] values, written as rows of `out`."""
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < width)
    magnitude = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
    scale = tl.div_rn(magnitude, tl.full(magnitude.shape, 127.0, tl.float32))
    values = tl.load(q_ptr + row * q_stride + column, mask=inside, other=0).to(tl.float32) * scale
    unit = tl.load(unit_ptr + row, mask=row < rows, other=1.0)
    back = tl.load(back_ptr + column, mask=column < width, other=1.0)
    at_out = out_ptr + column.to(tl.int64) * stride + row
    tl.store(at_out, _turned(values, unit, back), mask=inside)


def expand_4bit_fp8_fused(
    packed: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    code: Tensor,
    block: int,
    scale: Tensor,
    turned_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Writes a 4-bit weight in float8.

    Args:
        packed: uint8; an even number of values a row.
        absmax: float32, or uint8 where nested.
        nested: Code [256], absmax and offset of double quantisation, or None.
        code: float32 [16].
        block: Values of a block.
        scale: Of the rows, float32 [n].
        turned_scale: Of the columns [i]; None for the layout by rows.
        out: e4m3 [n, i], or [i, n] by columns; rows of any stride, columns adjacent.
    """
    code2, absmax2, offset = nested if nested is not None else (absmax, absmax, absmax)
    given = (packed, absmax, code2, absmax2, offset, code, scale)
    # bitsandbytes rounds a product, then a sum: a fused multiply-add would give other bits.
    if turned_scale is None:
        rows, width = out.shape
        size = 1024
        _rows_4bit[(rows, triton.cdiv(width // 2, size))](
            *given, out, width, out.stride(0), block, size, nested is not None, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        return
    width, rows = out.shape
    high, wide = 128, 64
    _turned_4bit[(triton.cdiv(width // 2, wide), triton.cdiv(rows, high))](
        *given, turned_scale, out, rows, width, out.stride(0), block, high, wide,
        nested is not None, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def expand_int8_fp8_fused(
    quantized: Tensor, row_scales: Tensor, scale: Tensor, turned_scale: Tensor | None, out: Tensor
) -> None:
    """Writes an int8 weight with row magnitudes in float8; `out` as of `expand_4bit_fp8_fused`."""
    if turned_scale is None:
        rows, width = out.shape
        size = 2048
        _rows_int8[(rows, triton.cdiv(width, size))](
            quantized, row_scales, scale, out, width, quantized.stride(0), out.stride(0), size,
            num_warps=4,
        )  # fmt: skip
        return
    width, rows = out.shape
    high = wide = 128
    _turned_int8[(triton.cdiv(width, wide), triton.cdiv(rows, high))](
        quantized, row_scales, scale, turned_scale, out, rows, width, quantized.stride(0),
        out.stride(0), high, wide, num_warps=8,
    )  # fmt: skip
