"""The door to one document's attention: torch's own kernel, or a recomputed one for short bf16.

On a CPU torch's flash kernel spends most of its bfloat16 backward on repacking when documents are
short. Measured on one core of an AMD EPYC with avx512_bf16 (torch 2.13, 9 heads, 3 key/value heads,
width 64, 4,096 tokens): documents of 64 / 128 / 256 / 512 / 1,024 tokens take 75 / 89 / 94 / 170 /
205 ms forward and backward through it, and 24 / 27 / 44 / 276 / - ms here. So up to 256 tokens the
scores are made whole by two batched products, and made again in the backward: nothing but q, k and
v is kept.

Shape letters: H heads, G key/value heads, N = H/G, T tokens of the document, D width of a head.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from glasstune.kernels.document_attention.reference import allowed_keys

SHORT = 256
"""Longest document whose scores are made whole: H * T * T float32 numbers still fit the cache."""


def document_attention(
    q_HTD: Tensor,
    k_GTD: Tensor,
    v_GTD: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """Attends causally inside one document.

    Args:
        q_HTD: Queries [H, T, D].
        k_GTD: Keys [G, T, D]; H is a multiple of G.
        v_GTD: Values [G, T, D].
        scale: Factor of the scores; None = 1/sqrt(D).
        window: A token sees itself and this many minus one before it; None = all.
        dropout: Probability on the attention weights.
        slopes_H: ALiBi: float32 [H], times the (negative) distance is added to the scores.

    Returns:
        [T, H, D] in q's dtype.
    """
    length = q_HTD.shape[1]
    if window is not None and length <= window:
        window = None
    short = length <= SHORT and q_HTD.dtype == torch.bfloat16 and q_HTD.device.type == "cpu"
    if (
        short
        and slopes_H is None
        and dropout == 0.0
        and k_GTD.dtype == v_GTD.dtype == torch.bfloat16
    ):
        factor = 1 / math.sqrt(q_HTD.shape[2]) if scale is None else scale
        attended: Tensor = _Recomputed.apply(q_HTD, k_GTD, v_GTD, factor, window)  # type: ignore[no-untyped-call]
        return attended
    mask = None if window is None else allowed_keys(length, window, q_HTD.device)
    if slopes_H is not None:
        mask = _penalty(slopes_H, length, window, q_HTD.dtype)
    return (
        functional.scaled_dot_product_attention(
            q_HTD.unsqueeze(0),
            k_GTD.unsqueeze(0),
            v_GTD.unsqueeze(0),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q_HTD.shape[0] != k_GTD.shape[0],
        )
        .squeeze(0)
        .transpose(0, 1)
    )


def _penalty(slopes_H: Tensor, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Returns what ALiBi adds to the scores, [1, H, T, T], minus infinity where no key is seen."""
    position = torch.arange(length, device=slopes_H.device)
    away_TT = position[None, :] - position[:, None]
    hidden = ~allowed_keys(length, window, slopes_H.device)
    added = (slopes_H[:, None, None] * away_TT).masked_fill(hidden, float("-inf"))
    return added.to(dtype).unsqueeze(0)


class _Recomputed(torch.autograd.Function):
    """Whole scores of a short document; saves its inputs only."""

    @staticmethod
    def forward(
        ctx: Any, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float, window: int | None
    ) -> Tensor:
        ctx.save_for_backward(q_HTD, k_GTD, v_GTD)
        ctx.scale, ctx.window = scale, window
        heads, length, width = q_HTD.shape
        weights_HTT = _weights(q_HTD, k_GTD, scale, window)
        weights_GMT = weights_HTT.to(v_GTD.dtype).view(k_GTD.shape[0], -1, length)
        return torch.bmm(weights_GMT, v_GTD).view(heads, length, width).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_HTD, k_GTD, v_GTD = ctx.saved_tensors
        heads, length, width = q_HTD.shape
        groups = k_GTD.shape[0]
        weights_HTT = _weights(q_HTD, k_GTD, ctx.scale, ctx.window)
        weights_GMT = weights_HTT.to(v_GTD.dtype).view(groups, -1, length)
        grad_GMD = grad_THD.transpose(0, 1).reshape(groups, -1, width)
        dv_GTD = torch.bmm(weights_GMT.transpose(1, 2), grad_GMD)
        dweights_HTT = torch.bmm(grad_GMD, v_GTD.transpose(1, 2)).view(heads, length, length)
        # d softmax: w * (dw - sum(w * dw))
        dscores_HTT = torch._softmax_backward_data(
            dweights_HTT.float(), weights_HTT, -1, torch.float32
        )
        dscores_GMT = dscores_HTT.mul_(ctx.scale).to(q_HTD.dtype).view(groups, -1, length)
        dq_HTD = torch.bmm(dscores_GMT, k_GTD).view(heads, length, width)
        dk_GTD = torch.bmm(dscores_GMT.transpose(1, 2), q_HTD.reshape(groups, -1, width))
        return dq_HTD, dk_GTD, dv_GTD, None, None


def _weights(q_HTD: Tensor, k_GTD: Tensor, scale: float, window: int | None) -> Tensor:
    """Returns the attention weights, float32 [H, T, T]."""
    heads, length, width = q_HTD.shape
    q_GMD = q_HTD.reshape(k_GTD.shape[0], -1, width)
    scores_HTT = torch.bmm(q_GMD, k_GTD.transpose(1, 2)).view(heads, length, length)
    masked = scores_HTT.float().mul_(scale).add_(_minus_infinity(window)[:length, :length])
    return masked.softmax(-1)


@lru_cache(maxsize=8)
def _minus_infinity(window: int | None) -> Tensor:
    """Returns what is added to the scores, float32 [SHORT, SHORT]; documents take a corner."""
    allowed = allowed_keys(SHORT, window, torch.device("cpu"))
    return torch.zeros(SHORT, SHORT).masked_fill(~allowed, float("-inf"))
