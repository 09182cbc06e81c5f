"""ALiBi: a penalty on distance, added to the scores of each head (Press et al., arXiv 2108.12409).

Shape letters: R rows, H heads, L queries, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slopes(heads: int, device: torch.device | str) -> Tensor:
    """Returns each head's slope, float32 [H]; computed on the device, so that nothing waits.

    For n heads, n a power of two, they are 2^(-8/n), 2^(-16/n), ..., 2^-8. For another number
    those of the power of two n below it come first, then of 2n every second one, from the first.

    Args:
        heads: Number of heads.
        device: Where they are needed.
    """
    below = 1 << (heads.bit_length() - 1)
    number_H = torch.arange(heads, device=device, dtype=torch.float32)
    first_H = (number_H + 1) * (-8.0 / below)
    second_H = (2 * (number_H - below) + 1) * (-4.0 / below)
    return torch.exp2(torch.where(number_H < below, first_H, second_H))


def biased_mask(
    slopes_H: Tensor,
    mask: Tensor | None,
    size: tuple[int, int],
    dtype: torch.dtype,
    first: int | None = None,
) -> Tensor:
    """Joins penalty and mask into what attention adds to its scores.

    Args:
        slopes_H: Of `slopes`.
        mask: Which key each query sees: bool, or 0 and a very low number, [R or 1, 1, L, K]; None
            where it is causal.
        size: Queries L and keys K; those of a mask are its own.
        dtype: Of the scores.
        first: Place of the first query among the keys; None: they are the last ones.

    Returns:
        [R or 1, H, L, K]; the lowest number where a key is not seen.
    """
    queries, keys = size if mask is None else (int(mask.shape[-2]), int(mask.shape[-1]))
    start = keys - queries if first is None else first
    key_K = torch.arange(keys, device=slopes_H.device)
    query_L = torch.arange(start, start + queries, device=slopes_H.device)
    away_LK = key_K[None, :] - query_L[:, None]
    if mask is None:
        seen = away_LK <= 0
    else:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    added_1HLK = (slopes_H[:, None, None] * away_LK).to(dtype).unsqueeze(0)
    return torch.where(seen, added_1HLK, torch.finfo(dtype).min)
