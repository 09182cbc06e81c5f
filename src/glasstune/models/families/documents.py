"""Attention that keeps the documents of one row apart, computed one document at a time.

transformers can isolate packed documents with a 4-D mask, but then every token is multiplied with
every other token of its row. Here each document is one causal product of its own, so the work is
the sum of the squares of the documents' lengths instead of the square of the row's length, and no
mask exists. The bounds travel as a keyword that transformers hands down to every attention
function, so they are still there when a layer is recomputed in the backward pass.

Shape letters: R rows, H heads, G key/value heads, L tokens of a row, T tokens of a document,
D width of a head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from glasstune.kernels.document_attention import document_attention

NAME = "glasstune_documents"
"""Name of the attention implementation in transformers' registries."""

BOUNDS_KEYWORD = "document_bounds"
"""Keyword of the model's forward: per row the cumulative ends of its documents, from 0 to L."""
SLOPES_KEYWORD = "alibi_slopes"
"""Keyword that a model with ALiBi hands down beside bounds or blocks: float32 [H]."""

Bounds = tuple[tuple[int, ...], ...]


def register() -> None:
    """Enters the attention and its mask builder in transformers' registries (idempotent)."""
    AttentionInterface.register(NAME, documents_attention)
    AttentionMaskInterface.register(NAME, documents_mask)


def documents_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Builds the mask that sdpa would use, but none for packed rows.

    Returns:
        An empty tensor where transformers saw restarting positions: `documents_attention` then
        insists on bounds. Otherwise what `sdpa_mask` returns.
    """
    if attention_mask is None and not allow_is_causal_skip and not use_vmap:
        return torch.empty(0, dtype=torch.bool, device=kwargs.get("device"))
    mask: Tensor | None = sdpa_mask(
        *args,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        **kwargs,
    )
    return mask


def documents_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    document_bounds: Bounds | None = None,
    alibi_slopes: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends causally inside each document; without bounds it is transformers' own sdpa.

    Args:
        module: The attention layer (read for `num_key_value_groups`).
        query: [R, H, L, D].
        key: [R, G, L, D].
        value: [R, G, L, D].
        attention_mask: Ignored where bounds are given.
        dropout: Probability on the attention weights.
        scaling: Factor of the scores; None = 1/sqrt(D).
        sliding_window: A token sees itself and this many minus one before it; None = all.
        document_bounds: Per row the cumulative ends of its documents, first 0, last L.
        alibi_slopes: ALiBi inside each document, float32 [H]; without bounds it is in the mask.
        **kwargs: Whatever else transformers passes.

    Returns:
        The attended values [R, L, H, D], and None for the weights.

    Raises:
        ValueError: Positions restart inside a row but no bounds came, or the layer asks for
            something that is not computed here (soft cap, attention sinks).
    """
    if document_bounds is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise ValueError(f"packed rows need {BOUNDS_KEYWORD}= in the model's forward")
        attended, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return attended, None
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"documents_attention does not compute {name}")
    if sum(len(row) - 1 for row in document_bounds) < len(document_bounds):
        raise ValueError("each row needs the bounds of at least one document")
    rows = []
    # unbind and split have a backward that joins once; slicing would allocate a whole zero
    # gradient for every document.
    for row_bounds, q_HLD, k_GLD, v_GLD in zip(
        document_bounds, query.unbind(0), key.unbind(0), value.unbind(0), strict=True
    ):
        sizes = [end - start for start, end in pairwise(row_bounds)]
        parts = [
            document_attention(
                q,
                k,
                v,
                scale=scaling,
                window=sliding_window,
                dropout=dropout,
                slopes_H=alibi_slopes,
            )
            for q, k, v in zip(
                *(torch.split(x, sizes, dim=1) for x in (q_HLD, k_GLD, v_GLD)), strict=True
            )
        ]
        rows.append(torch.cat(parts, dim=0) if len(parts) > 1 else parts[0])
    return torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0), None
