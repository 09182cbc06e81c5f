"""Causal attention of whole rows that hold several documents, in one kernel on a GPU.

torch's `flex_attention` skips the blocks of 128 x 128 scores in which no query sees a key. Which
they are is computed once for all layers from the documents' numbers, on the device and in tensors
whose shapes depend on rows and length alone, so that nothing waits and nothing compiles again when
documents change. Measured on an H100 (torch 2.11, 4 rows of 2,048 tokens, 32 heads, 8 key/value
heads, width 128, forward / backward ms): rows of one document 0.43 / 1.24 (cuDNN's causal kernel
0.26 / 0.94), documents of 60 to 400 tokens 0.26 / 0.55, these with ALiBi 0.28 / 0.58, and 0.81 /
2.54 through a dense mask.

Shape letters: R rows, H heads, G key/value heads, L tokens of a row, D width of a head, n blocks
of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Tokens of a block, the size that torch's kernels expect."""
NARROWEST, WIDEST = 16, 256
"""Widths of a head: narrower ones cannot be multiplied by Triton, wider ones were not tried."""
_RECOMPILE_LIMIT = 64


class Blocks(NamedTuple):
    """Which blocks of scores are computed: whole ones as they are, the others with a mask.

    A plain tuple of tensors, so that it enters compiled code as ordinary inputs.

    Args:
        document_RL: Number of each token's document, int32 [R, L].
        kv_count: Masked key blocks of each query block, int32 [R, 1, n].
        kv_index: Their places, int32 [R, 1, n, n]; only the first `kv_count` count.
        whole_kv_count: The same of blocks without a mask.
        whole_kv_index: The same of blocks without a mask.
        q_count: Masked query blocks of each key block, for the backward.
        q_index: Their places.
        whole_q_count: The same of blocks without a mask.
        whole_q_index: The same of blocks without a mask.
        window: A token sees itself and this many minus one before it; None = all.
    """

    document_RL: Tensor
    kv_count: Tensor
    kv_index: Tensor
    whole_kv_count: Tensor
    whole_kv_index: Tensor
    q_count: Tensor
    q_index: Tensor
    whole_q_count: Tensor
    whole_q_index: Tensor
    window: int | None


def document_blocks(document_RL: Tensor, window: int | None = None) -> Blocks:
    """Finds the blocks of scores that are needed; runs on the tensor's device without waiting.

    Args:
        document_RL: Number of each token's document, int32 [R, L]. A token sees the tokens before
            it that have its number, in whatever order numbers come.
        window: A token sees itself and this many minus one before it; None = all.
    """
    rows, length = document_RL.shape
    if window is not None and window >= length:
        window = None
    count = -(-length // BLOCK)
    missing = count * BLOCK - length
    filled = document_RL
    if missing:
        filled = torch.cat([document_RL, document_RL[:, -1:].expand(rows, missing)], dim=1)
    low_Rn, high_Rn = filled.view(rows, count, BLOCK).aminmax(dim=-1)
    block = torch.arange(count, device=document_RL.device)
    apart = block[:, None] - block[None, :]
    # Numbers whose ranges meet may be equal somewhere; a block too many costs time only.
    some = (low_Rn[:, :, None] <= high_Rn[:, None, :]) & (low_Rn[:, None, :] <= high_Rn[:, :, None])
    some = some & (apart >= 0)
    # low_i = high_j and low_j = high_i leave room for one number only.
    whole = (low_Rn[:, :, None] == high_Rn[:, None, :]) & (
        low_Rn[:, None, :] == high_Rn[:, :, None]
    )
    whole = whole & (apart > 0)
    if missing:
        whole = whole & (block[:, None] < count - 1)
    if window is not None:
        some = some & (apart * BLOCK - (BLOCK - 1) < window)
        whole = whole & (apart * BLOCK + (BLOCK - 1) < window)
    masked = some & ~whole
    dense = torch.stack([masked, whole, masked.transpose(1, 2), whole.transpose(1, 2)]).int()
    counts = dense.sum(-1, dtype=torch.int32)[:, :, None]
    indices = dense.argsort(dim=-1, descending=True, stable=True).int()[:, :, None]
    # Clones: a view at an odd address would be copied again by each compiled block.
    parts = [part[kind].clone() for kind in range(4) for part in (counts, indices)]
    return Blocks._make([document_RL, *parts, window])


def flex_document_attention(
    q_RHLD: Tensor,
    k_RGLD: Tensor,
    v_RGLD: Tensor,
    blocks: Blocks,
    *,
    scale: float,
    softcap: float | None = None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """Attends causally inside each document of each row.

    Within compiled code it becomes a part of it; elsewhere on a GPU it is compiled by itself.

    Args:
        q_RHLD: Queries [R, H, L, D], D from `NARROWEST` to `WIDEST` on a GPU.
        k_RGLD: Keys [R, G, L, D]; H is a multiple of G.
        v_RGLD: Values [R, G, L, D]; the products are made in their dtype.
        blocks: What `document_blocks` found for these rows.
        scale: Factor of the scores.
        softcap: Scores become cap * tanh(score / cap); None = as they are.
        slopes_H: ALiBi: float32 [H], times the (negative) distance is added to the scores.

    Returns:
        [R, L, H, D] in v's dtype.
    """
    inside = torch.compiler.is_compiling()
    attend = _attend if inside else _compiled(q_RHLD.device.type == "cuda")
    # Rotary tables in float32 leave q and k wider than v under autocast.
    q_RHLD, k_RGLD = q_RHLD.to(v_RGLD.dtype), k_RGLD.to(v_RGLD.dtype)
    out_RHLD: Tensor = attend(q_RHLD, k_RGLD, v_RGLD, blocks, scale, softcap, slopes_H)
    return out_RHLD.transpose(1, 2)


def _attend(
    q_RHLD: Tensor,
    k_RGLD: Tensor,
    v_RGLD: Tensor,
    blocks: Blocks,
    scale: float,
    softcap: float | None,
    slopes_H: Tensor | None,
) -> Tensor:
    attended: Any = flex_attention(
        q_RHLD,
        k_RGLD,
        v_RGLD,
        score_mod=_score_mod(softcap, slopes_H),
        block_mask=_block_mask(blocks),
        scale=scale,
        enable_gqa=q_RHLD.shape[1] != k_RGLD.shape[1],
    )
    out: Tensor = attended
    return out


def _block_mask(blocks: Blocks) -> BlockMask:
    document_RL, window = blocks.document_RL, blocks.window
    length = document_RL.shape[1]

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (document_RL[row, query] == document_RL[row, key])
        return seen if window is None else seen & (query - key < window)

    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=blocks.kv_count,
        kv_indices=blocks.kv_index,
        full_kv_num_blocks=blocks.whole_kv_count,
        full_kv_indices=blocks.whole_kv_index,
        q_num_blocks=blocks.q_count,
        q_indices=blocks.q_index,
        full_q_num_blocks=blocks.whole_q_count,
        full_q_indices=blocks.whole_q_index,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )


def _score_mod(softcap: float | None, slopes_H: Tensor | None) -> Callable[..., Tensor] | None:
    if softcap is None and slopes_H is None:
        return None

    def changed(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if slopes_H is None else score + slopes_H[head] * (key - query)

    return changed


@lru_cache(maxsize=2)
def _compiled(fused: bool) -> Callable[..., Any]:
    """Returns `_attend` compiled by itself; rows of other lengths share one graph of any length.

    Uncompiled it is wrong, not only slow: under non-reentrant checkpointing torch 2.13 traces the
    score changes' gradients through the checkpoint's own hooks.

    Args:
        fused: Whether to one kernel; torch has none with a backward but on a GPU.
    """
    import torch._dynamo.config as dynamo

    compiled = torch.compile(_attend, backend="inductor" if fused else "aot_eager")

    def attend(*args: Any) -> Any:
        # Scale and cap are constants of a kernel. With and without gradients, windows and lengths
        # there are more graphs than torch's 8, past which it would compute every score of a row.
        limit = max(dynamo.recompile_limit, _RECOMPILE_LIMIT)
        with dynamo.patch(specialize_float=True, recompile_limit=limit):
            return compiled(*args)

    return attend
