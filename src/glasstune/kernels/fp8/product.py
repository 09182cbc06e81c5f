"""The product of two float8 matrices: the tensor cores' own on a GPU, float32 on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from glasstune.kernels.fp8.numbers import E4M3


@torch.library.custom_op("glasstune::fp8_product", mutates_args=())
def fp8_product(
    left_Tk: Tensor, left_scale: Tensor, right_nk: Tensor, right_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Returns `(left * its scales) @ (right * its scales).T`, [T, n].

    Args:
        left_Tk: e4m3, contiguous.
        left_scale: float32 [T, 1].
        right_nk: e4m3, or its bytes as uint8; columns adjacent.
        right_scale: float32 [n].
        dtype: Of the result; a GPU knows bfloat16 alone.
    """
    right_nk = right_nk.view(E4M3) if right_nk.dtype == torch.uint8 else right_nk
    if left_Tk.device.type == "cuda":
        product: Tensor = torch._scaled_mm(
            left_Tk, right_nk.t(), scale_a=left_scale, scale_b=right_scale[None, :],
            out_dtype=dtype, use_fast_accum=FAST_SUMS,
        )  # fmt: skip
        return product
    exact = left_Tk.float() @ right_nk.float().t()
    return (exact * left_scale * right_scale).to(dtype)


FAST_SUMS = True
"""Whether Hopper's tensor cores add up in their own registers, of about 14 bits, alone."""


@fp8_product.register_fake
def _fake(
    left_Tk: Tensor, left_scale: Tensor, right_nk: Tensor, right_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.empty(
        left_Tk.shape[0], right_nk.shape[0], dtype=dtype, device=left_Tk.device
    )


@register_flop_formula(torch.ops.glasstune.fp8_product)
def _flops(
    left: torch.Size, left_scale: Any, right: torch.Size, *args: Any, **kwargs: Any
) -> int:
    """Tells a compiler that weighs memory against work what this one costs: half of bfloat16."""
    return left[0] * left[1] * right[0]
