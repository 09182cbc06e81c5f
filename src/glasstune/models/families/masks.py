"""The block-causal mask of packed rows, for families whose attention takes a 4-D mask as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from glasstune.models.families.documents import Bounds


def block_mask(bounds: Bounds, device: torch.device | str) -> Tensor:
    """Returns which key each token sees, bool [R, 1, L, L]: its own document up to itself.

    Args:
        bounds: Per row the cumulative ends of its documents, from 0 to L.
        device: Where the mask lives.
    """
    length = bounds[0][-1]
    document_RL = torch.zeros(len(bounds), length, dtype=torch.long)
    for row, ends in enumerate(bounds):
        document_RL[row, [end for end in ends[1:-1] if end < length]] = 1
    document_RL = document_RL.cumsum(-1).to(device)
    same = document_RL[:, None, :, None] == document_RL[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=device).tril()


def additive(allowed: Tensor) -> Tensor:
    """Returns what eager attention adds to its scores, float32: 0 if allowed, else the minimum."""
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, lowest)
