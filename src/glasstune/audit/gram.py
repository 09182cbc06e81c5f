"""Inner products of the terms' gradients, in float64 and bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glasstune.audit.norms import CHUNK, dense


def gram_matrix(gradients: Sequence[Tensor | None]) -> Tensor:
    """G[i][j] = <g_i, g_j> over one tensor.

    Args:
        gradients: K gradients of one shape; None counts as zero. At least one is a tensor.

    Returns:
        float64 [K, K] on their device.
    """
    flat = [None if g is None else dense(g).reshape(-1) for g in gradients]
    some = next(g for g in flat if g is not None)
    result = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=some.device)
    index = [row for row, g in enumerate(flat) if g is not None]
    part = result.new_zeros(len(index), len(index))
    for start in range(0, some.numel(), CHUNK):
        rows = torch.stack([flat[row][start : start + CHUNK].double() for row in index])  # type: ignore[index]
        part += rows @ rows.T
    where = torch.tensor(index, device=some.device)
    result[where[:, None], where] = part
    return result


def combined(gradients: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    """Σ w_i g_i in at least float32; None where no term has a gradient."""
    total: Tensor | None = None
    for gradient, weight in zip(gradients, weights, strict=True):
        if gradient is None:
            continue
        part = dense(gradient)
        wide = torch.promote_types(part.dtype, torch.float32)
        part = part.to(wide) * weight
        total = part if total is None else total + part
    return total
