"""Attention of packed rows on a GPU: one `flex_attention` a layer, its blocks found once a forward.

The documents' numbers become blocks of scores outside the layers (`packed_blocks`); they travel as
a keyword that transformers hands down to every attention function, so they are still there when a
layer is recomputed, and they enter compiled layers as tensors of one shape. Where each row is one
document no mask is needed and torch's causal kernel, the fastest, does it.

Shape letters: R rows, H heads, G key/value heads, L tokens of a row, D width of a head.
"""

from __future__ import annotations

import math
import shutil
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from glasstune.kernels.document_attention.flex import (
    NARROWEST,
    WIDEST,
    Blocks,
    document_blocks,
    flex_document_attention,
)
from glasstune.models.families.documents import Bounds, documents_mask

NAME = "glasstune_flex"
"""Name of the attention implementation in transformers' registries."""
CAPPED_NAME = "glasstune_flex_capped"
"""The same for families whose scores are capped: what is not packed runs their own eager code."""
BLOCKS_KEYWORD = "document_blocks"
"""Keyword of the model's forward: blocks of layers that see all, and of those with a window."""

PackedBlocks = tuple[Blocks | None, Blocks | None]


def register() -> None:
    """Enters attention and mask builders in transformers' registries (idempotent)."""
    AttentionInterface.register(NAME, flex_attention_forward)
    AttentionMaskInterface.register(NAME, documents_mask)
    AttentionInterface.register(CAPPED_NAME, flex_attention_forward)
    AttentionMaskInterface.register(CAPPED_NAME, eager_mask)


def why_not(config: Any, device: torch.device) -> str | None:
    """Returns why a model's attention cannot be `flex_attention`, or None where it can.

    Args:
        config: Of the model.
        device: Where it is.
    """
    if device.type != "cuda":
        return f"flex_attention has no backward on a {device.type}"
    from torch.utils._triton import has_triton

    if not has_triton():
        return "flex_attention needs Triton, which is not installed or does not know this GPU"
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "flex_attention needs a C compiler (gcc), which is not installed"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not NARROWEST <= width <= WIDEST:
        return f"heads of width {width} are not in flex_attention's {NARROWEST} to {WIDEST}"
    for key in ("attention_dropout", "attn_pdrop"):
        share = getattr(config, key, None) or 0.0
        if share > 0:
            return f"flex_attention has no dropout and the model's {key} is {share:g}"
    return None


def packed_blocks(
    bounds: Bounds, device: torch.device | str, *, window: int | None = None, capped: bool = False
) -> PackedBlocks:
    """Returns what the attention of packed rows needs; the host does not wait for the device.

    Args:
        bounds: Per row the cumulative ends of its documents, from 0 to L.
        device: Where the forward runs.
        window: Of the layers that have one.
        capped: Whether scores are capped, so that the causal kernel never does.

    Returns:
        Blocks of the layers that see all and of those with a window; None where no mask is needed
        because each row is one document.
    """
    length = bounds[0][-1]
    single = not capped and all(len(ends) == 2 for ends in bounds)
    narrow = window is not None and window < length
    if single and not narrow:
        return None, None
    document_RL = document_numbers(bounds, device)
    return (
        None if single else document_blocks(document_RL),
        document_blocks(document_RL, window) if narrow else None,
    )


def unpacked_blocks(embeds_RLd: Tensor, mask_RL: Tensor | None) -> PackedBlocks:
    """Returns the blocks of rows that are one document each; hidden tokens see each other.

    Args:
        embeds_RLd: What tells rows, length and device.
        mask_RL: 1 on tokens, 0 on padding; None = no padding.
    """
    if mask_RL is None:
        rows, length = embeds_RLd.shape[:2]
        numbers_RL = torch.zeros(rows, length, dtype=torch.int32, device=embeds_RLd.device)
    else:
        numbers_RL = mask_RL.to(embeds_RLd.device).bool().int() - 1
    return document_blocks(numbers_RL), None


def document_numbers(bounds: Bounds, device: torch.device | str) -> Tensor:
    """Returns the number of each token's document in its row, int32 [R, L]."""
    numbers = np.zeros((len(bounds), bounds[0][-1]), dtype=np.int32)
    for row, ends in enumerate(bounds):
        # A segment of no tokens marks no start.
        numbers[row, [end for end in ends[1:-1] if end < ends[-1]]] = 1
    on_host = torch.from_numpy(numbers.cumsum(axis=1, dtype=np.int32))
    if torch.device(device).type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


def no_mask(device: torch.device | str) -> Tensor:
    """Returns an `attention_mask` that transformers hands on untouched, since it has four axes.

    With None it would compare positions on the device, and wait for the answer.
    """
    return torch.empty(0, 0, 0, 0, dtype=torch.bool, device=device)


def flex_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    document_blocks: PackedBlocks | None = None,
    alibi_slopes: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attends causally inside each document; without blocks it is transformers' own attention.

    Args:
        module: The attention layer (read for `num_key_value_groups`).
        query: [R, H, L, D].
        key: [R, G, L, D].
        value: [R, G, L, D].
        attention_mask: Ignored where blocks are given.
        dropout: Probability on the attention weights; 0 where blocks are given.
        scaling: Factor of the scores; None = 1/sqrt(D).
        sliding_window: A token sees itself and this many minus one before it; None = all.
        softcap: Scores become cap * tanh(score / cap); None = as they are.
        document_blocks: From `packed_blocks`.
        alibi_slopes: ALiBi inside each document, float32 [H]; without blocks it is in the mask.
        **kwargs: Whatever else transformers passes.

    Returns:
        The attended values [R, L, H, D], and the weights or None.

    Raises:
        ValueError: Positions restart inside a row but no blocks came, or the layer asks for
            something that is not computed here (dropout, attention sinks, another window).
    """
    if document_blocks is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise ValueError(f"packed rows need {BLOCKS_KEYWORD}= in the model's forward")
        attend: Any = sdpa_attention_forward
        if softcap is not None:
            attend = sys.modules[type(module).__module__].eager_attention_forward
            kwargs["softcap"] = softcap
        plain: tuple[Tensor, Tensor | None] = attend(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"flex_attention_forward does not compute {name}")
    length = query.shape[2]
    narrow = sliding_window is not None and sliding_window < length
    blocks = document_blocks[1 if narrow else 0]
    if blocks is None and not narrow and softcap is None and alibi_slopes is None:
        causal: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, None, dropout=dropout, scaling=scaling, is_causal=True
        )
        return causal
    if blocks is None or blocks.window != (sliding_window if narrow else None):
        raise ValueError(f"no blocks for a window of {sliding_window} and a soft cap of {softcap}")
    if dropout > 0:
        raise ValueError("flex_attention_forward has no dropout")
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    attended = flex_document_attention(
        query, key, value, blocks, scale=scale, softcap=softcap, slopes_H=alibi_slopes
    )
    return attended, None
