"""The door: a group of frozen float8 layers with one input, each with its LoRA pair.

Shape letters: T tokens, i input features, n outputs of all members, k ranks of all members, e
columns that LoRA adds to both products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glasstune.kernels.fp8.low import Low, extra_columns
from glasstune.kernels.fp8.product import fp8_product, fp8_rows
from glasstune.kernels.lora_group.fused import adapter_gradients
from glasstune.kernels.lora_group.layout import MAX_MEMBERS, Layout


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


class Fp8Source(Protocol):
    """Packed weights of a group that are expanded to one of both copies, for one product."""

    def expand(self, turned: bool, after: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns `wide` and `scale` of `Fp8Weights`, or `turned` and `turned_scale`.

        Args:
            turned: Which.
            after: What must be there before it is made; it is not read.
        """
        ...


def fp8_group(
    x: Tensor,
    weights: Fp8Weights | Fp8Source,
    low: Low,
    bias: Tensor | None,
    layout: Layout,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Computes every member's layer with its LoRA.

    Args:
        x: bfloat16 [..., i].
        weights: With LoRA's columns; kept, or packed and expanded in each pass.
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
    shape = (layout.rows, layout.width + extra_columns(layout))
    kept = weights if isinstance(weights, Fp8Weights) else None
    if kept is not None and kept.wide.shape != shape:
        raise ValueError(f"the weight is {tuple(kept.wide.shape)}, not {shape}")
    flat: list[Tensor | None] = []
    for index in range(MAX_MEMBERS):
        present = index < len(downs)
        flat += [downs[index] if present else None, ups[index] if present else None]
    wide, scale, turned, turned_scale, source = _opened(weights)
    outs: tuple[Tensor, ...] = _GroupProduct.apply(
        x.reshape(-1, layout.width), wide, scale, turned, turned_scale, source, low.down_ki,
        low.up_nk, low.factor_k, low.reach_k, low.factor_back_k, low.reach_back_k, layout,
        flat[0], flat[1], flat[2], flat[3], flat[4], flat[5], flat[6], flat[7],
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return _finished(outs, x, bias, layout)


def fp8_base(
    x: Tensor, weights: Fp8Weights | Fp8Source, bias: Tensor | None, layout: Layout
) -> tuple[Tensor, ...]:
    """Computes every member's frozen layer without LoRA.

    Args:
        x: bfloat16 [..., i].
        weights: Without LoRA's columns; kept, or packed and expanded in each pass.
        bias: [n] or None.
        layout: Of the group, without adapters.

    Returns:
        [..., n_j] of each member in x's dtype.
    """
    wide, scale, turned, turned_scale, source = _opened(weights)
    outs: tuple[Tensor, ...] = _FrozenProduct.apply(
        x.reshape(-1, layout.width), wide, scale, turned, turned_scale, source, layout
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return _finished(outs, x, bias, layout)


def _opened(weights: Fp8Weights | Fp8Source) -> tuple[Any, ...]:
    """Returns kept tensors and no source, or a source and no tensors."""
    if isinstance(weights, Fp8Weights):
        return weights.wide, weights.scale, weights.turned, weights.turned_scale, None
    return None, None, None, None, weights


def _finished(
    outs: tuple[Tensor, ...], x: Tensor, bias: Tensor | None, layout: Layout
) -> tuple[Tensor, ...]:
    """Returns outputs [T, n_j] with their biases in the shape of x."""
    if bias is not None:
        rows = zip(outs, layout.out_slices(), strict=True)
        outs = tuple(out + bias[part] for out, part in rows)
    return tuple(out.reshape(*x.shape[:-1], out.shape[-1]) for out in outs)


def _products(
    rows: Tensor, row_scale: Tensor, wide: Tensor, scale: Tensor, layout: Layout, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Returns each member's outputs, so that each has a gradient of its own.

    One product serves all members, but for outputs much wider than the input. The parts are copied
    out of it: a model may write into what it gets (olmo clips q, k and v), and attention keeps v,
    with which a view would keep q and k too.
    """
    if layout.apart:
        return tuple(
            fp8_product(rows, row_scale, wide[part], scale[part], dtype)
            for part in layout.out_slices()
        )
    y: Tensor = fp8_product(rows, row_scale, wide, scale, dtype)
    if len(layout.outs) == 1:
        return (y,)
    return tuple(y[:, part].clone() for part in layout.out_slices())


class _GroupProduct(torch.autograd.Function):
    """(x, both weights or a source, LoRA's columns, A and B of up to four) -> y [T, n_j] of each.

    The columns already hold the values of A and B; these are inputs so that their gradients have a
    place, and saved so that a change between forward and backward is an error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_Ti: Tensor,
        wide: Tensor | None,
        scale: Tensor | None,
        turned: Tensor | None,
        turned_scale: Tensor | None,
        source: Fp8Source | None,
        down_ki: Tensor,
        up_nk: Tensor,
        factor_k: Tensor,
        reach_k: Tensor,
        factor_back_k: Tensor,
        reach_back_k: Tensor,
        layout: Layout,
        a0: Tensor,
        b0: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        a3: Tensor | None,
        b3: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Returns the outputs; saves x in its own precision and u."""
        low_Tk = x_Ti @ down_ki.t()
        rows, row_scale = fp8_rows([x_Ti], low_Tk, factor_k, reach_k, extra_columns(layout))
        weight, its_scale = _weight(wide, scale, source, False, [])
        outs = _products(rows, row_scale, weight, its_scale, layout, x_Ti.dtype)
        ctx.save_for_backward(
            x_Ti, low_Tk, turned, turned_scale, up_nk, factor_back_k, reach_back_k,
            a0, b0, a1, b1, a2, b2, a3, b3,
        )  # fmt: skip
        ctx.layout, ctx.source = layout, source
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Any, ...]:
        """Returns dx and the gradients of A and B, in the order of forward's inputs."""
        x_Ti, low_Tk, turned, turned_scale, up_nk, factor_k, reach_k, *flat = ctx.saved_tensors
        layout: Layout = ctx.layout
        grads = list(given)
        low_grad_Tk = _low_gradient(grads, up_nk, layout)
        dx_Ti = None
        if ctx.needs_input_grad[0]:
            rows, row_scale = fp8_rows(grads, low_grad_Tk, factor_k, reach_k, extra_columns(layout))
            weight, its_scale = _weight(turned, turned_scale, ctx.source, True, grads)
            # LoRA's share of dx trains nothing by itself: sums may be fast.
            dx_Ti = fp8_product(rows, row_scale, weight, its_scale, x_Ti.dtype, exact=False)
        pairs = [tensor for tensor in flat if tensor is not None]
        needed = list(ctx.needs_input_grad[13 : 13 + len(pairs)])
        dtypes = [tensor.dtype for tensor in pairs]
        found = adapter_gradients(
            grads, low_grad_Tk, x_Ti, low_Tk, layout, dtypes, needed, apart=True
        )
        found += [None] * (2 * MAX_MEMBERS - len(found))
        return (dx_Ti, *[None] * 12, *found)


def _weight(
    kept: Tensor | None,
    scale: Tensor | None,
    source: Fp8Source | None,
    turned: bool,
    after: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns a weight that is kept, or expands it.

    Where `after` is a gradient, a compiler cannot make it in the forward and keep it.
    """
    if kept is not None and scale is not None:
        return kept, scale
    assert source is not None
    return source.expand(turned, after)


def _low_gradient(grads: list[Tensor], up_nk: Tensor, layout: Layout) -> Tensor:
    """Returns dy*sB [T, k] of the gradients of all members."""
    if len(grads) == 1:
        return grads[0] @ up_nk
    members = zip(grads, layout.out_slices(), layout.rank_slices(), strict=True)
    parts = [grad @ up_nk[out, rank] for grad, out, rank in members]
    if rest := layout.columns - sum(layout.ranks):
        parts.append(parts[0].new_zeros(len(parts[0]), rest))
    with torch.autocast(parts[0].device.type, enabled=False):
        return torch.cat(parts, 1)


class _FrozenProduct(torch.autograd.Function):
    """(x, both weights or a source) -> y [T, n_j] of each member, a gradient for x alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x_Ti: Tensor,
        wide: Tensor | None,
        scale: Tensor | None,
        turned: Tensor | None,
        turned_scale: Tensor | None,
        source: Fp8Source | None,
        layout: Layout,
    ) -> tuple[Tensor, ...]:
        """Returns the outputs."""
        rows, row_scale = fp8_rows([x_Ti], None, None, None, 0)
        ctx.save_for_backward(turned, turned_scale)
        ctx.source = source
        weight, its_scale = _weight(wide, scale, source, False, [])
        return _products(rows, row_scale, weight, its_scale, layout, x_Ti.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Returns dx."""
        turned, turned_scale = ctx.saved_tensors
        rows, row_scale = fp8_rows(list(grads), None, None, None, 0)
        weight, its_scale = _weight(turned, turned_scale, ctx.source, True, list(grads))
        dx_Ti = fp8_product(rows, row_scale, weight, its_scale, grads[0].dtype, exact=False)
        return dx_Ti, *[None] * 6
