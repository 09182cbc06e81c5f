"""The door: packed weights of a group, and opaque ops that expand them.

The ops are opaque so that a compiler neither fuses an expansion nor keeps its result. An expansion
in the backward takes the gradient as an input that it does not read (`after`): so it can only be
made once the backward runs, and is never equal to the forward's, which would be kept instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glasstune.kernels.expand.reference import (
    block_scales,
    expand_4bit_reference,
    expand_int8_reference,
)
from glasstune.kernels.lora_group.layout import Layout
from glasstune.kernels.lora_group.op import write_adapters


@dataclass(frozen=True, slots=True)
class Packed4bit:
    """4-bit weights of a group, as bitsandbytes packs them.

    Args:
        packed: uint8 of each member, two values a byte.
        absmax: Block magnitudes of each member: float32, or uint8 with double quantisation.
        nested_code: float32 [256] of each member; empty without double quantisation.
        nested_absmax: float32 of each member; likewise.
        offset: float32 scalar of each member; likewise.
        code: float32 [16], of all.
        block: Values of a block.
    """

    packed: list[Tensor]
    absmax: list[Tensor]
    nested_code: list[Tensor]
    nested_absmax: list[Tensor]
    offset: list[Tensor]
    code: Tensor
    block: int

    def expand(
        self,
        layout: Layout,
        downs: list[Tensor],
        ups: list[Tensor],
        dtype: torch.dtype,
        after: list[Tensor],
    ) -> Tensor:
        """Returns M of the layout, [n + k, i + k]; `after` is waited for, not read."""
        wide: Tensor = expand_4bit(
            self.packed, self.absmax, self.nested_code, self.nested_absmax, self.offset, self.code,
            self.block, downs, ups, list(layout.scales), list(layout.outs), layout.width, dtype,
            after,
        )  # fmt: skip
        return wide


@dataclass(frozen=True, slots=True)
class PackedInt8:
    """Int8 weights of a group with one magnitude a row.

    Args:
        quantized: int8 [n_j, i] of each member.
        row_scales: float32 [n_j] of each member.
    """

    quantized: list[Tensor]
    row_scales: list[Tensor]

    def expand(
        self,
        layout: Layout,
        downs: list[Tensor],
        ups: list[Tensor],
        dtype: torch.dtype,
        after: list[Tensor],
    ) -> Tensor:
        """Returns M of the layout, [n + k, i + k]; `after` is waited for, not read."""
        wide: Tensor = expand_int8(
            self.quantized, self.row_scales, downs, ups, list(layout.scales), list(layout.outs),
            layout.width, dtype, after,
        )  # fmt: skip
        return wide


@torch.library.custom_op("glasstune::expand_4bit", mutates_args=())
def expand_4bit(
    packed: list[Tensor],
    absmax: list[Tensor],
    nested_code: list[Tensor],
    nested_absmax: list[Tensor],
    offset: list[Tensor],
    code: Tensor,
    block: int,
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[float],
    outs: list[int],
    width: int,
    dtype: torch.dtype,
    after: list[Tensor],
) -> Tensor:
    """Returns M of a 4-bit group."""
    layout = _layout(outs, width, downs, scales)
    wide = _frame(layout, downs, ups, dtype, packed[0].device)
    for index, rows in enumerate(layout.out_slices()):
        nested = None
        if nested_code:
            nested = (nested_code[index], nested_absmax[index], offset[index])
        target = wide[rows, :width]
        if wide.device.type == "cuda":
            from glasstune.kernels.expand.fused import expand_4bit_fused

            expand_4bit_fused(packed[index], absmax[index], nested, code, block, target)
        else:
            magnitudes = block_scales(absmax[index], *(nested or (None, None, None)))
            expand_4bit_reference(packed[index], magnitudes, code, block, target)
    return wide


@torch.library.custom_op("glasstune::expand_int8", mutates_args=())
def expand_int8(
    quantized: list[Tensor],
    row_scales: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[float],
    outs: list[int],
    width: int,
    dtype: torch.dtype,
    after: list[Tensor],
) -> Tensor:
    """Returns M of an int8 group."""
    layout = _layout(outs, width, downs, scales)
    wide = _frame(layout, downs, ups, dtype, quantized[0].device)
    for index, rows in enumerate(layout.out_slices()):
        target = wide[rows, :width]
        if wide.device.type == "cuda":
            from glasstune.kernels.expand.fused import expand_int8_fused

            expand_int8_fused(quantized[index], row_scales[index], target)
        else:
            expand_int8_reference(quantized[index], row_scales[index], target)
    return wide


def _fake_4bit(
    packed: list[Tensor],
    absmax: list[Tensor],
    nested_code: list[Tensor],
    nested_absmax: list[Tensor],
    offset: list[Tensor],
    code: Tensor,
    block: int,
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[float],
    outs: list[int],
    width: int,
    dtype: torch.dtype,
    after: list[Tensor],
) -> Tensor:
    return _empty(_layout(outs, width, downs, scales), dtype, packed[0].device)


def _fake_int8(
    quantized: list[Tensor],
    row_scales: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    scales: list[float],
    outs: list[int],
    width: int,
    dtype: torch.dtype,
    after: list[Tensor],
) -> Tensor:
    return _empty(_layout(outs, width, downs, scales), dtype, quantized[0].device)


expand_4bit.register_fake(_fake_4bit)
expand_int8.register_fake(_fake_int8)


def _layout(outs: list[int], width: int, downs: list[Tensor], scales: list[float]) -> Layout:
    """An expansion without adapters has neither ranks nor scales."""
    if not downs:
        return Layout(width, tuple(outs), (), ())
    return Layout(width, tuple(outs), tuple(down.shape[0] for down in downs), tuple(scales))


def _empty(layout: Layout, dtype: torch.dtype, device: torch.device) -> Tensor:
    k = layout.columns
    return torch.empty(layout.rows + k, layout.width + k, dtype=dtype, device=device)


def _frame(
    layout: Layout,
    downs: list[Tensor],
    ups: list[Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Returns an M whose W is not yet there."""
    wide = _empty(layout, dtype, device)
    if downs:
        wide[: layout.rows, layout.width :].zero_()
        wide[layout.rows + sum(layout.ranks) :, : layout.width].zero_()
        write_adapters(wide, layout, downs, ups)
    return wide
