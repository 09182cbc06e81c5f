"""What a group computes, one member at a time, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from glasstune.kernels.lora_group.layout import Layout


def lora_group_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """Computes `x Wᵀ + bias + s (x Aᵀ) Bᵀ` of each member, autograd's own backward.

    Args:
        x: Float [..., i].
        weights: Frozen, [n_j, i].
        biases: [n_j] or None.
        downs: A, [r_j, i].
        ups: B, [n_j, r_j].
        scales: s_j.

    Returns:
        [..., n_j] of each member, in x's dtype.
    """
    outs = []
    for weight, bias, down, up, scale in zip(weights, biases, downs, ups, scales, strict=True):
        low = linear(x, down.to(x.dtype))
        outs.append(linear(x, weight, bias) + linear(low, up.to(x.dtype)) * scale)
    return outs


def wide_reference(
    layout: Layout,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Returns M by its definition, [n + k, i + k]; the corner is zero."""
    n, i, k = layout.rows, layout.width, layout.columns
    wide = torch.zeros(n + k, i + k, dtype=dtype, device=weights[0].device)
    wide[:n, :i] = torch.cat([weight.to(dtype) for weight in weights])
    for out, rank, down, up, scale in zip(
        layout.out_slices(), layout.rank_slices(), downs, ups, layout.scales, strict=True
    ):
        wide[n + rank.start : n + rank.stop, :i] = down.to(dtype)
        wide[out, i + rank.start : i + rank.stop] = (up * scale).to(dtype)
    return wide
