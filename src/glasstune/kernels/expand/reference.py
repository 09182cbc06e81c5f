"""Expansion of 4-bit and int8 weights in plain torch: the values that bitsandbytes gives."""

from __future__ import annotations

import torch
from torch import Tensor

NESTED_BLOCK = 256
"""Scales in a block of double quantisation; bitsandbytes has no other."""


def block_scales(
    absmax: Tensor, nested_code: Tensor | None, nested_absmax: Tensor | None, offset: Tensor | None
) -> Tensor:
    """Returns the float32 magnitude of each block; undoes double quantisation where it is.

    Args:
        absmax: float32 [blocks], or uint8 [blocks] where it is quantised once more.
        nested_code: float32 [256] or None.
        nested_absmax: float32, one a block of 256 of `absmax`, or None.
        offset: float32 scalar or None.
    """
    if nested_code is None or nested_absmax is None or offset is None:
        return absmax.float()
    values = nested_code[absmax.int()]
    # The product is rounded, then the sum: no fused multiply-add.
    return values * nested_absmax.repeat_interleave(NESTED_BLOCK)[: values.numel()] + offset


def expand_4bit_reference(
    packed: Tensor, scales: Tensor, code: Tensor, block: int, out: Tensor
) -> None:
    """Writes a 4-bit weight into `out`.

    Args:
        packed: uint8, two values a byte, the earlier in the upper half.
        scales: float32, one a block of `block` values, counted through the whole weight.
        code: float32 [16].
        block: Values of a block.
        out: Float [n, i], any strides.
    """
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([code[byte >> 4], code[byte & 15]], 1)
    values = pairs.index_select(0, packed.reshape(-1).int()).reshape(-1)[: out.numel()]
    if values.numel() % block == 0:
        values = values.view(-1, block) * scales[: values.numel() // block, None]
    else:
        values = values * scales.repeat_interleave(block)[: values.numel()]
    out.copy_(values.view(out.shape))


def expand_int8_reference(quantized: Tensor, scale: Tensor, out: Tensor) -> None:
    """Writes an int8 weight [n, i] with one float32 magnitude a row [n] into `out`."""
    out.copy_(quantized.float() * (scale / 127.0).unsqueeze(1))
