"""The door: a group of frozen float8 layers with one input, each with its LoRA pair.

Shape letters: T tokens, i input features, n outputs of all members, k ranks of all members, e
columns that LoRA adds to both products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glasstune.kernels.fp8.low import Low, extra_columns, widened_rows
from glasstune.kernels.fp8.product import fp8_product
from glasstune.kernels.lora_group.fused import adapter_gradients
from glasstune.kernels.lora_group.layout import MAX_MEMBERS, Layout
from glasstune.kernels.lora_group.op import member_outputs


@dataclass(frozen=True, slots=True)
class Fp8Weights:
    """Two copies of a frozen W, since tensor cores read both factors of a product by rows.

    Args:
        wide: e4m3 [n, i + e], or [n, i] without LoRA.
        scale: float32 [n].
        turned: e4m3 [i, n + e], or [i, n].
        turned_scale: float32 [i].
    """

    wide: Tensor
    scale: Tensor
    turned: Tensor
    turned_scale: Tensor


def fp8_group(
    x: Tensor,
    weights: Fp8Weights,
    low: Low,
    bias: Tensor | None,
    layout: Layout,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Computes every member's layer with its LoRA.

    Args:
        x: bfloat16 [..., i].
        weights: With LoRA's columns.
        low: Of the present A and B.
        bias: Of all members [n], or None; frozen.
        layout: Of the group.
        downs: A of each member [r_j, i]: where its gradient goes.
        ups: B of each member [n_j, r_j].

    Returns:
        [..., n_j] of each member in x's dtype.

    Raises:
        ValueError: Shapes do not fit.
    """
    if not 1 <= len(downs) == len(ups) == len(layout.outs) <= MAX_MEMBERS:
        raise ValueError(f"1 to {MAX_MEMBERS} members with A and B each, not {len(downs)}")
    extra = extra_columns(layout)
    shape = (layout.rows, layout.width + extra)
    if weights.wide.shape != shape:
        raise ValueError(f"the weight is {tuple(weights.wide.shape)}, not {shape}")
    flat: list[Tensor | None] = []
    for index in range(MAX_MEMBERS):
        present = index < len(downs)
        flat += [downs[index] if present else None, ups[index] if present else None]
    y = _GroupProduct.apply(
        x.reshape(-1, layout.width), weights.wide, weights.scale, weights.turned,
        weights.turned_scale, low.down_ki, low.up_nk, low.factor_k, low.bound, low.factor_back_k,
        low.bound_back, layout,
        flat[0], flat[1], flat[2], flat[3], flat[4], flat[5], flat[6], flat[7],
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return member_outputs(y if bias is None else y + bias, x, layout)


def fp8_base(
    x: Tensor, weights: Fp8Weights, bias: Tensor | None, layout: Layout
) -> tuple[Tensor, ...]:
    """Computes every member's frozen layer without LoRA.

    Args:
        x: bfloat16 [..., i].
        weights: Without LoRA's columns.
        bias: [n] or None.
        layout: Of the group, without adapters.

    Returns:
        [..., n_j] of each member in x's dtype.
    """
    y = _FrozenProduct.apply(
        x.reshape(-1, layout.width), weights.wide, weights.scale, weights.turned,
        weights.turned_scale,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return member_outputs(y if bias is None else y + bias, x, layout)


class _GroupProduct(torch.autograd.Function):
    """(x, both weights, LoRA's columns, A and B of up to four members) -> y [T, n].

    The columns already hold the values of A and B; these are inputs so that their gradients have a
    place, and saved so that a change between forward and backward is an error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_Ti: Tensor,
        wide: Tensor,
        scale: Tensor,
        turned: Tensor,
        turned_scale: Tensor,
        down_ki: Tensor,
        up_nk: Tensor,
        factor_k: Tensor,
        bound: Tensor,
        factor_back_k: Tensor,
        bound_back: Tensor,
        layout: Layout,
        a0: Tensor,
        b0: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        a3: Tensor | None,
        b3: Tensor | None,
    ) -> Tensor:
        """Returns y; saves x in its own precision and u."""
        low_Tk = x_Ti @ down_ki.t()
        rows, row_scale = widened_rows(x_Ti, low_Tk, factor_k, bound, extra_columns(layout))
        y: Tensor = fp8_product(rows, row_scale, wide, scale, x_Ti.dtype)
        ctx.save_for_backward(
            x_Ti, low_Tk, turned, turned_scale, up_nk, factor_back_k, bound_back,
            a0, b0, a1, b1, a2, b2, a3, b3,
        )  # fmt: skip
        ctx.layout = layout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Tn: Tensor) -> tuple[Any, ...]:
        """Returns dx and the gradients of A and B, in the order of forward's inputs."""
        x_Ti, low_Tk, turned, turned_scale, up_nk, factor_k, bound, *flat = ctx.saved_tensors
        layout: Layout = ctx.layout
        low_grad_Tk = grad_Tn @ up_nk
        dx_Ti = None
        if ctx.needs_input_grad[0]:
            rows, row_scale = widened_rows(
                grad_Tn, low_grad_Tk, factor_k, bound, extra_columns(layout)
            )
            dx_Ti = fp8_product(rows, row_scale, turned, turned_scale, grad_Tn.dtype)
        pairs = [tensor for tensor in flat if tensor is not None]
        needed = list(ctx.needs_input_grad[12 : 12 + len(pairs)])
        found = adapter_gradients(
            [grad_Tn], low_grad_Tk, x_Ti, low_Tk, layout, [p.dtype for p in pairs], needed,
            apart=False,
        )  # fmt: skip
        found += [None] * (2 * MAX_MEMBERS - len(found))
        return (dx_Ti, *[None] * 11, *found)


class _FrozenProduct(torch.autograd.Function):
    """(x, both weights) -> y [T, n], with a gradient for x alone; x is not saved."""

    @staticmethod
    def forward(
        ctx: Any, x_Ti: Tensor, wide: Tensor, scale: Tensor, turned: Tensor, turned_scale: Tensor
    ) -> Tensor:
        """Returns y."""
        rows, row_scale = widened_rows(x_Ti, None, None, None, 0)
        ctx.save_for_backward(turned, turned_scale)
        y: Tensor = fp8_product(rows, row_scale, wide, scale, x_Ti.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Tn: Tensor) -> tuple[Any, ...]:
        """Returns dx."""
        turned, turned_scale = ctx.saved_tensors
        rows, row_scale = widened_rows(grad_Tn, None, None, None, 0)
        dx_Ti = fp8_product(rows, row_scale, turned, turned_scale, grad_Tn.dtype)
        return dx_Ti, None, None, None, None
