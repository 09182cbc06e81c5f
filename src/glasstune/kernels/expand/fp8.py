"""Packed weights expanded straight to float8, by rows for the forward, by columns for the backward.

A value is expanded in float32 as bitsandbytes does, then rounded once, in units of its row's power
of two: that is what both layouts stand for. By columns the same e4m3 number stands in units of its
column's power of two, which moves an exponent and rounds nothing but what falls below 2**-6 of it.

The ops are opaque and wait for `after` as those in `op` do. Shape letters: n outputs of all
members, i input features, e columns that LoRA adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from glasstune.kernels.expand.op import Packed4bit, PackedInt8
from glasstune.kernels.expand.reference import (
    NESTED_BLOCK,
    block_scales,
    expand_4bit_reference,
    expand_int8_reference,
)
from glasstune.kernels.fp8.numbers import E4M3, scales_of, to_rows
from glasstune.kernels.lora_group.layout import Layout

_CHUNK = 2**24
"""Values that are expanded at once to look for the largest: 64 MiB."""


@dataclass(frozen=True, slots=True)
class Fp8Packed:
    """Packed weights of a group, with what their float8 expansions need beside them.

    Args:
        packed: The weights.
        outs: Output features of each member.
        scale: float32 [n], powers of two.
        turned_scale: float32 [i], likewise.
        low: e4m3 [n, e]: the columns of s*B, written by `write_low`; None without LoRA.
        low_turned: e4m3 [i, e]: those of A; likewise.
    """

    packed: Packed4bit | PackedInt8
    outs: tuple[int, ...]
    scale: Tensor
    turned_scale: Tensor
    low: Tensor | None = None
    low_turned: Tensor | None = None

    def expand(self, turned: bool, after: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns e4m3 [n, i + e] and its scales [n], or turned [i, n + e] and [i].

        Args:
            turned: Which.
            after: What must be there before it is made; it is not read.
        """
        packed, outs = self.packed, list(self.outs)
        low = self.low_turned if turned else self.low
        wide: Tensor
        if isinstance(packed, Packed4bit):
            wide = expand_4bit_fp8(
                packed.packed, packed.absmax, packed.nested_code, packed.nested_absmax,
                packed.offset, packed.code, packed.block, self.scale, self.turned_scale, low, outs,
                turned, after,
            )  # fmt: skip
        else:
            wide = expand_int8_fp8(
                packed.quantized, packed.row_scales, self.scale, self.turned_scale, low, outs,
                turned, after,
            )  # fmt: skip
        return wide, self.turned_scale if turned else self.scale


@torch.library.custom_op("glasstune::expand_4bit_fp8", mutates_args=())
def expand_4bit_fp8(
    packed: list[Tensor],
    absmax: list[Tensor],
    nested_code: list[Tensor],
    nested_absmax: list[Tensor],
    offset: list[Tensor],
    code: Tensor,
    block: int,
    scale: Tensor,
    turned_scale: Tensor,
    low: Tensor | None,
    outs: list[int],
    turned: bool,
    after: list[Tensor],
) -> Tensor:
    """Returns the float8 weight of a 4-bit group."""
    wide = _empty(scale, turned_scale, low, turned)
    for index, (target, own, back) in enumerate(_parts(wide, scale, turned_scale, outs, turned)):
        nested = None
        if nested_code:
            nested = (nested_code[index], nested_absmax[index], offset[index])
        if wide.device.type == "cuda":
            from glasstune.kernels.expand.fused_fp8 import expand_4bit_fp8_fused

            expand_4bit_fp8_fused(
                packed[index], absmax[index], nested, code, block, own, back, target
            )
        else:
            magnitudes = block_scales(absmax[index], *(nested or (None, None, None)))
            exact = torch.empty(len(own), len(turned_scale), device=wide.device)
            expand_4bit_reference(packed[index], magnitudes, code, block, exact)
            round_reference(exact, own, back, target)
    return _with_low(wide, low)


@torch.library.custom_op("glasstune::expand_int8_fp8", mutates_args=())
def expand_int8_fp8(
    quantized: list[Tensor],
    row_scales: list[Tensor],
    scale: Tensor,
    turned_scale: Tensor,
    low: Tensor | None,
    outs: list[int],
    turned: bool,
    after: list[Tensor],
) -> Tensor:
    """Returns the float8 weight of an int8 group."""
    wide = _empty(scale, turned_scale, low, turned)
    for index, (target, own, back) in enumerate(_parts(wide, scale, turned_scale, outs, turned)):
        if wide.device.type == "cuda":
            from glasstune.kernels.expand.fused_fp8 import expand_int8_fp8_fused

            expand_int8_fp8_fused(quantized[index], row_scales[index], own, back, target)
        else:
            exact = torch.empty(len(own), len(turned_scale), device=wide.device)
            expand_int8_reference(quantized[index], row_scales[index], exact)
            round_reference(exact, own, back, target)
    return _with_low(wide, low)


@expand_4bit_fp8.register_fake
def _fake_4bit(
    packed: list[Tensor],
    absmax: list[Tensor],
    nested_code: list[Tensor],
    nested_absmax: list[Tensor],
    offset: list[Tensor],
    code: Tensor,
    block: int,
    scale: Tensor,
    turned_scale: Tensor,
    low: Tensor | None,
    outs: list[int],
    turned: bool,
    after: list[Tensor],
) -> Tensor:
    return _empty(scale, turned_scale, low, turned)


@expand_int8_fp8.register_fake
def _fake_int8(
    quantized: list[Tensor],
    row_scales: list[Tensor],
    scale: Tensor,
    turned_scale: Tensor,
    low: Tensor | None,
    outs: list[int],
    turned: bool,
    after: list[Tensor],
) -> Tensor:
    return _empty(scale, turned_scale, low, turned)


def round_reference(
    exact_ni: Tensor, scale_n: Tensor, turned_scale_i: Tensor | None, out: Tensor
) -> None:
    """Rounds expanded values to e4m3.

    Args:
        exact_ni: float32.
        scale_n: Of its rows.
        turned_scale_i: Of its columns; None for the layout by rows.
        out: e4m3 [n, i], or [i, n] by columns; written.
    """
    rows = to_rows(exact_ni, scale_n)
    if turned_scale_i is None:
        out.copy_(rows)
        return
    moved = rows.float() * (scale_n[:, None] / turned_scale_i)
    out.copy_(moved.to(E4M3).t())


def _empty(scale: Tensor, turned_scale: Tensor, low: Tensor | None, turned: bool) -> Tensor:
    n, i = scale.shape[0], turned_scale.shape[0]
    extra = 0 if low is None else low.shape[1]
    shape = (i, n + extra) if turned else (n, i + extra)
    return torch.empty(shape, dtype=E4M3, device=scale.device)


def _parts(
    wide: Tensor, scale: Tensor, turned_scale: Tensor, outs: list[int], turned: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yields each member's place, its rows' scales, and the columns' scales where they count."""
    start = 0
    for size in outs:
        rows = slice(start, start + size)
        start += size
        if turned:
            yield wide[:, rows], scale[rows], turned_scale
        else:
            yield wide[rows, : turned_scale.shape[0]], scale[rows], None


def _with_low(wide: Tensor, low: Tensor | None) -> Tensor:
    if low is not None and low.shape[1]:
        # Eight numbers at once: all widths are multiples of 16.
        start = (wide.shape[1] - low.shape[1]) // 8
        wide.view(torch.int64)[:, start:].copy_(low.view(torch.int64))
    return wide


@torch.no_grad()
def weight_scales(packed: Packed4bit | PackedInt8, layout: Layout) -> tuple[Tensor, Tensor]:
    """Returns the powers of two of a group's rows [n] and columns [i], float32.

    Each member's rows are scaled as those of a weight of its own are; a column is one of all
    members, as their product is. Expands a few rows at a time.

    Raises:
        ValueError: NaN or Inf among the values.
    """
    scales: list[Tensor] = []
    columns: Tensor | None = None
    for index, size in enumerate(layout.outs):
        peaks = [rows.abs().amax(1) for rows in _exact(packed, index, size, layout.width)]
        scale = scales_of(torch.cat(peaks))
        scales.append(scale)
        start = 0
        for rows in _exact(packed, index, size, layout.width):
            own = scale[start : start + len(rows)]
            start += len(rows)
            # Of the rounded values: a column's largest is a number that the forward multiplies.
            highest = (to_rows(rows, own).float() * own[:, None]).abs().amax(0)
            columns = highest if columns is None else torch.maximum(columns, highest)
    assert columns is not None
    return torch.cat(scales), scales_of(columns)


def _exact(packed: Packed4bit | PackedInt8, index: int, rows: int, width: int) -> Iterator[Tensor]:
    """Yields a member's float32 rows, a few at a time."""
    step = max(1, _CHUNK // width)
    if isinstance(packed, Packed4bit):
        # A part begins at a block of blocks, so that it can be read as a weight of its own.
        whole = packed.block * NESTED_BLOCK
        whole //= gcd(whole, width)
        step = -(-step // whole) * whole
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        out = torch.empty(stop - start, width, device=_device(packed))
        if isinstance(packed, PackedInt8):
            part, scale = packed.quantized[index][start:stop], packed.row_scales[index][start:stop]
            if out.device.type == "cuda":
                from glasstune.kernels.expand.fused import expand_int8_fused

                expand_int8_fused(part, scale, out)
            else:
                expand_int8_reference(part, scale, out)
        else:
            _expand_rows_4bit(packed, index, start, out)
        yield out


def _expand_rows_4bit(packed: Packed4bit, index: int, start: int, out: Tensor) -> None:
    """Expands a member's rows from `start` on, which begin at a block of blocks."""
    first, count = start * out.shape[1], out.numel()
    data = packed.packed[index].reshape(-1)[first // 2 : (first + count + 1) // 2]
    blocks = slice(first // packed.block, -(-(first + count) // packed.block))
    absmax = packed.absmax[index][blocks]
    nested = None
    if packed.nested_code:
        deeper = packed.nested_absmax[index][blocks.start // NESTED_BLOCK :]
        nested = (packed.nested_code[index], deeper, packed.offset[index])
    if out.device.type == "cuda":
        from glasstune.kernels.expand.fused import expand_4bit_fused

        expand_4bit_fused(data, absmax, nested, packed.code, packed.block, out)
    else:
        magnitudes = block_scales(absmax, *(nested or (None, None, None)))
        expand_4bit_reference(data, magnitudes, packed.code, packed.block, out)


def _device(packed: Packed4bit | PackedInt8) -> torch.device:
    tensors = packed.packed if isinstance(packed, Packed4bit) else packed.quantized
    return tensors[0].device
