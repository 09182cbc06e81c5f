"""Causal attention of one document in plain torch.

Shape letters: H heads, G key/value heads, T tokens of the document, D width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def document_attention_reference(
    q_HTD: Tensor,
    k_GTD: Tensor,
    v_GTD: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention, causal, in the inputs' type with float32 probabilities.

    Args:
        q_HTD: Queries [H, T, D].
        k_GTD: Keys [G, T, D]; H is a multiple of G.
        v_GTD: Values [G, T, D].
        scale: Factor of the scores; None = 1/sqrt(D).
        window: A token sees itself and this many minus one before it; None = all.
        slopes_H: ALiBi: float32 [H], times the (negative) distance is added to the scores.

    Returns:
        [T, H, D] in q's dtype.
    """
    heads, length, width = q_HTD.shape
    groups = heads // k_GTD.shape[0]
    k_HTD = k_GTD.repeat_interleave(groups, dim=0)
    v_HTD = v_GTD.repeat_interleave(groups, dim=0)
    scores_HTT = q_HTD @ k_HTD.transpose(1, 2) * (1 / math.sqrt(width) if scale is None else scale)
    if slopes_H is not None:
        position = torch.arange(length, device=q_HTD.device)
        scores_HTT = scores_HTT + slopes_H[:, None, None] * (position[None, :] - position[:, None])
    hidden = ~allowed_keys(length, window, q_HTD.device)
    weights_HTT = scores_HTT.float().masked_fill(hidden, float("-inf")).softmax(-1)
    return (weights_HTT.to(v_HTD.dtype) @ v_HTD).transpose(0, 1)


def allowed_keys(length: int, window: int | None, device: torch.device) -> Tensor:
    """Returns which key (second index) each query sees, bool [T, T]."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)
