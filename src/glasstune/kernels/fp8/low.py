"""LoRA inside a float8 product, at bfloat16's precision.

The product's inner dimension is widened. For y = x Wᵀ + (x Aᵀ)(sB)ᵀ the columns of W are followed
by those of sB, and the columns of x by those of u = x Aᵀ; both are written as sums of two e4m3
numbers, u = u1 + u2 and sB = b1 + b2, 8 significant bits as bfloat16 has:

    [x, u1, u1, u2] · [W, b1, b2, b1]ᵀ = x Wᵀ + u (sB)ᵀ - u2 b2ᵀ

The term left out is 2**-8 of the whole. The backward is alike: dx = dy W + (dy sB) A. So the wide
outputs are written once and never read again for LoRA.

u shares the scale of its row of x, and sB those of the rows of W. A power of two for each column,
its factor, moves between them, so that neither leaves e4m3's range: |u| <= ‖x‖·‖A's row‖ bounds it
before u is known, and where the bound exceeds x's own largest value the row takes a larger scale.
x is rounded as it is without LoRA then too, but for what falls below e4m3's range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glasstune.kernels.fp8.numbers import E4M3, LARGEST, ROOM, next_power, two_parts
from glasstune.kernels.lora_group.layout import Layout

_ALIGN = 128
"""A float8 product of another inner width takes up to 1.4 times as long (H100, cuBLAS)."""

USUAL = 16.0
"""How many times its largest value a row's norm may be before LoRA's columns cost it range."""


def extra_columns(layout: Layout) -> int:
    """Returns by how many columns the products of a group are widened."""
    return -(-3 * layout.columns // _ALIGN) * _ALIGN


@dataclass(frozen=True, slots=True)
class Low:
    """A and s*B of a group's members, beside what stands of them in the wide products.

    Args:
        down_ki: bfloat16, the rows of all A.
        up_nk: bfloat16; each member's rows hold its s*B in its own columns, zero elsewhere.
        factor_k: float32: by what u is multiplied before it is rounded.
        reach_k: float32: how large |u * factor| may be at most, over the norm of a row of x.
        factor_back_k: The same of dy*sB in the backward.
        reach_back_k: Likewise.
    """

    down_ki: Tensor
    up_nk: Tensor
    factor_k: Tensor
    reach_k: Tensor
    factor_back_k: Tensor
    reach_back_k: Tensor

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Low:
        """Returns one of a layout, all zero."""
        k = layout.columns
        return cls(
            torch.zeros(k, layout.width, dtype=dtype, device=device),
            torch.zeros(layout.rows, k, dtype=dtype, device=device),
            torch.zeros(k, device=device), torch.zeros(k, device=device),
            torch.zeros(k, device=device), torch.zeros(k, device=device),
        )  # fmt: skip

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns all of them."""
        return (
            self.down_ki, self.up_nk, self.factor_k, self.reach_k, self.factor_back_k,
            self.reach_back_k,
        )  # fmt: skip


@torch.no_grad()
def write_low(
    layout: Layout,
    downs: list[Tensor],
    ups: list[Tensor],
    low: Low,
    wide: tuple[Tensor, Tensor],
    turned: tuple[Tensor, Tensor],
) -> None:
    """Writes the present A and B into `low` and behind both copies of W.

    Args:
        layout: Of the group.
        downs: A of each member [r_j, i].
        ups: B of each member [n_j, r_j].
        low: Written.
        wide: e4m3 [n, i + e], or [n, e] alone, whose last e columns are written, and the scales
            of W's rows [n].
        turned: e4m3 [i, n + e], or [i, e] alone, likewise, and its scales [i].
    """
    if wide[0].device.type == "cuda":
        from glasstune.kernels.fp8.fused import write_low_fused

        write_low_fused(layout, downs, ups, low, wide, turned)
        return
    members = zip(layout.out_slices(), layout.rank_slices(), downs, ups, layout.scales, strict=True)
    for out, rank, down, up, scale in members:
        low.down_ki[rank].copy_(down)
        low.up_nk[out, rank].copy_(up * scale)
    down_ki, up_nk = low.down_ki.float(), low.up_nk.float()
    down_norms, up_norms = down_ki.norm(dim=1), up_nk.norm(dim=0)
    extra = extra_columns(layout)
    _write_side(up_nk, wide, extra, down_norms, low.factor_k, low.reach_k)
    _write_side(down_ki.t(), turned, extra, up_norms, low.factor_back_k, low.reach_back_k)


def _write_side(
    low_rk: Tensor,
    weight: tuple[Tensor, Tensor],
    extra: int,
    norms_k: Tensor,
    factor_k: Tensor,
    reach_k: Tensor,
) -> None:
    """Writes the last columns of one copy of W, and what the other side must know."""
    rows, scale_r = weight
    start, k = rows.shape[1] - extra, low_rk.shape[1]
    inside = low_rk / scale_r[:, None]
    least = inside.abs().amax(0) / ROOM
    usual = 1.0 / (USUAL * norms_k.clamp(min=1e-8))
    factor = next_power(torch.maximum(least, usual))
    first, second = two_parts(inside / factor)
    rows[:, start : start + k] = first
    rows[:, start + k : start + 2 * k] = second
    rows[:, start + 2 * k : start + 3 * k] = first
    factor_k.copy_(factor)
    reach_k.copy_(factor * norms_k)


def widened_rows(
    x_Ti: Tensor, low_Tk: Tensor | None, factor_k: Tensor | None, reach_k: Tensor | None, extra: int
) -> tuple[Tensor, Tensor]:
    """Rounds rows to e4m3, followed by LoRA's columns: what `fp8_rows` computes, in plain torch.

    Args:
        x_Ti: Float [T, i].
        low_Tk: u; None where there is no LoRA.
        factor_k: Of `Low`.
        reach_k: Of `Low`.
        extra: Columns behind x.

    Returns:
        e4m3 [T, i + extra] and float32 scales [T, 1]. A row with NaN or Inf becomes NaN.
    """
    exact = x_Ti.float()
    peak = exact.abs().amax(1, keepdim=True)
    if reach_k is not None:
        bound = (exact * exact).sum(1, keepdim=True).sqrt() * reach_k.amax()
        peak = torch.maximum(peak, bound * (LARGEST / ROOM))
    scale = torch.where(peak == 0, 1.0, next_power(peak / LARGEST))
    rows = (exact / scale).to(E4M3)
    if low_Tk is None or factor_k is None:
        return rows, scale
    # The norm of a row of tiny gradients may have vanished: then its columns saturate.
    inside = (low_Tk.float() * factor_k / scale).clamp(-LARGEST, LARGEST)
    first, second = two_parts(inside)
    rest = extra - 3 * low_Tk.shape[1]
    zeros = torch.zeros(len(rows), rest, dtype=E4M3, device=rows.device)
    return torch.cat([rows, first, first, second, zeros], 1), scale
