"""The door: flat tensors in, one product out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glasstune.kernels.lora_group.fused import FrozenProduct, GroupProduct, Source
from glasstune.kernels.lora_group.layout import MAX_MEMBERS, Layout


def lora_group(
    x: Tensor,
    wide: Tensor | Source,
    bias: Tensor | None,
    layout: Layout,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Computes every member's layer with its LoRA.

    Args:
        x: Float [..., i].
        wide: M of the layout in x's dtype, holding the present values of A and B; or the packed
            weights that it is expanded from.
        bias: Of all members, [n] in x's dtype, or None; frozen.
        layout: Of the group; at most `MAX_MEMBERS` members.
        downs: A of each member, [r_j, i]: where its gradient goes.
        ups: B of each member, [n_j, r_j].

    Returns:
        [..., n_j] of each member in x's dtype: views of one tensor, or each its own.

    Raises:
        ValueError: Shapes or types do not fit.
    """
    if not 1 <= len(downs) == len(ups) == len(layout.outs) <= MAX_MEMBERS:
        raise ValueError(f"1 to {MAX_MEMBERS} members with A and B each, not {len(downs)}")
    kept = wide if isinstance(wide, Tensor) else None
    if kept is not None:
        _check(x, kept, (layout.rows + layout.columns, layout.width + layout.columns))
    flat: list[Tensor | None] = []
    for index in range(MAX_MEMBERS):
        present = index < len(downs)
        flat += [downs[index] if present else None, ups[index] if present else None]
    outs = GroupProduct.apply(
        x.reshape(-1, layout.width), kept, None if kept is not None else wide, bias, layout,
        flat[0], flat[1], flat[2], flat[3], flat[4], flat[5], flat[6], flat[7],
    )  # type: ignore[no-untyped-call]  # fmt: skip
    if layout.apart:
        return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)
    return _members(outs[0], x, layout)


def base_group(
    x: Tensor, weight: Tensor | Source, bias: Tensor | None, layout: Layout
) -> tuple[Tensor, ...]:
    """Computes every member's frozen layer without LoRA.

    Args:
        x: Float [..., i].
        weight: W of all members [n, i] in x's dtype, or the packed weights.
        bias: [n] in x's dtype, or None; frozen.
        layout: Of the group, without adapters.

    Returns:
        [..., n_j] of each member in x's dtype: views of one tensor.

    Raises:
        ValueError: Shapes or types do not fit.
    """
    kept = weight if isinstance(weight, Tensor) else None
    if kept is not None:
        _check(x, kept, (layout.rows, layout.width))
    y = FrozenProduct.apply(
        x.reshape(-1, layout.width), kept, None if kept is not None else weight, bias, layout
    )  # type: ignore[no-untyped-call]
    return _members(y, x, layout)


@torch.no_grad()
def write_adapters(
    wide: Tensor, layout: Layout, downs: Sequence[Tensor], ups: Sequence[Tensor]
) -> None:
    """Writes A and s·B into their places in M; s·B is rounded once."""
    n, i = layout.rows, layout.width
    for out, rank, down, up, scale in zip(
        layout.out_slices(), layout.rank_slices(), downs, ups, layout.scales, strict=True
    ):
        wide[n + rank.start : n + rank.stop, :i].copy_(down)
        torch.mul(up, scale, out=wide[out, i + rank.start : i + rank.stop])


def _check(x: Tensor, weight: Tensor, shape: tuple[int, int]) -> None:
    if weight.shape != shape or x.dtype != weight.dtype:
        raise ValueError(
            f"the weight is {weight.dtype} {tuple(weight.shape)}, not {x.dtype} {shape}"
        )


def _members(y: Tensor, x: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    # A model may write into an output (falcon adds to one): a part made by torch.split refuses.
    whole = y.view(*x.shape[:-1], layout.rows)
    if len(layout.outs) == 1:
        return (whole,)
    # Attention keeps v as it is: as a view it would keep q and k too, four times its own bytes at
    # the shape of Llama-3-8B. The widest stays a view, whose copy would cost more than it frees.
    widest = max(layout.outs)
    parts = zip(layout.out_slices(), layout.outs, strict=True)
    return tuple(
        whole[..., rows] if 2 * size > widest else whole[..., rows].clone() for rows, size in parts
    )
