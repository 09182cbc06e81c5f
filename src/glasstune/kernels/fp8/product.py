"""Two opaque operations: rows rounded to float8, and the product of two float8 matrices.

On a GPU the first is one kernel and the second the tensor cores' own; on a CPU both are plain
torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from glasstune.kernels.fp8.low import widened_rows
from glasstune.kernels.fp8.numbers import E4M3


@torch.library.custom_op("glasstune::fp8_rows", mutates_args=())
def fp8_rows(
    parts: list[Tensor],
    low_Tk: Tensor | None,
    factor_k: Tensor | None,
    reach_k: Tensor | None,
    extra: int,
) -> tuple[Tensor, Tensor]:
    """Rounds rows to e4m3, followed by LoRA's columns.

    Args:
        parts: bfloat16 or float32 [T, ...] each, columns adjacent; a row is all of them in turn.
        low_Tk: u; None where there is no LoRA.
        factor_k: Of `Low`.
        reach_k: Of `Low`.
        extra: Columns behind x.

    Returns:
        e4m3 [T, i + extra] and float32 scales [T, 1].
    """
    if parts[0].device.type == "cuda":
        from glasstune.kernels.fp8.fused import fp8_rows_fused

        return fp8_rows_fused(parts, low_Tk, factor_k, reach_k, extra)
    with torch.autocast(parts[0].device.type, enabled=False):  # it knows no float8
        x_Ti = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return widened_rows(x_Ti, low_Tk, factor_k, reach_k, extra)


@fp8_rows.register_fake
def _fake_rows(
    parts: list[Tensor],
    low_Tk: Tensor | None,
    factor_k: Tensor | None,
    reach_k: Tensor | None,
    extra: int,
) -> tuple[Tensor, Tensor]:
    tokens, width = parts[0].shape[0], sum(part.shape[1] for part in parts)
    device = parts[0].device
    return (
        torch.empty(tokens, width + extra, dtype=E4M3, device=device),
        torch.empty(tokens, 1, device=device),
    )


@torch.library.custom_op("glasstune::fp8_product", mutates_args=())
def fp8_product(
    left_Tk: Tensor,
    left_scale: Tensor,
    right_nk: Tensor,
    right_scale: Tensor,
    dtype: torch.dtype,
    exact: bool = True,
) -> Tensor:
    """Returns `(left * its scales) @ (right * its scales).T`, [T, n].

    Args:
        left_Tk: e4m3, contiguous.
        left_scale: float32 [T, 1].
        right_nk: e4m3, or its bytes as uint8; columns adjacent.
        right_scale: float32 [n].
        dtype: Of the result; a GPU knows bfloat16 alone.
        exact: Whether sums leave the tensor cores, whose registers hold about 14 bits, every 128
            columns. Without it what is 2**-13 of the sum is lost, as all of LoRA is while B is
            small; with it a product takes 1.03 to 1.2 times as long (H100).
    """
    right_nk = right_nk.view(E4M3) if right_nk.dtype == torch.uint8 else right_nk
    if left_Tk.device.type == "cuda":
        product: Tensor = torch._scaled_mm(
            left_Tk, right_nk.t(), scale_a=left_scale, scale_b=right_scale[None, :],
            out_dtype=dtype, use_fast_accum=not exact,
        )  # fmt: skip
        return product
    with torch.autocast(left_Tk.device.type, enabled=False):  # it would multiply in bfloat16
        sums = left_Tk.float() @ right_nk.float().t()
        return (sums * left_scale * right_scale).to(dtype)


@fp8_product.register_fake
def _fake_product(
    left_Tk: Tensor,
    left_scale: Tensor,
    right_nk: Tensor,
    right_scale: Tensor,
    dtype: torch.dtype,
    exact: bool = True,
) -> Tensor:
    return torch.empty(left_Tk.shape[0], right_nk.shape[0], dtype=dtype, device=left_Tk.device)


@register_flop_formula(torch.ops.glasstune.fp8_product)
def _flops(left: torch.Size, left_scale: Any, right: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Tells a compiler that weighs memory against work what this one costs: half of bfloat16."""
    return left[0] * left[1] * right[0]
