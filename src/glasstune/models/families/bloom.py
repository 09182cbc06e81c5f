"""BLOOM's packing: transformers has no hook for it, since ALiBi is made from the 2-D mask.

A packed forward gives a block-causal 4-D mask instead of the 2-D one; BLOOM hands it on to its
layers as it is, and the ALiBi builder, replaced here, reads each token's position in its document
from the same mask. Attention itself stays transformers'.

Shape letters: R rows, H heads, L tokens of a row.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomModel, build_alibi_tensor


def install(model: PreTrainedModel) -> None:
    """Replaces the ALiBi builder of a BLOOM model (idempotent); 2-D masks are treated as before."""
    backbone = next(part for part in model.modules() if isinstance(part, BloomModel))
    backbone.build_alibi_tensor = types.MethodType(_build_alibi, backbone)


def _build_alibi(self: Any, attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Returns ALiBi [R*H, 1, L] with positions that restart at each document."""
    if attention_mask.ndim == 2:
        plain: Tensor = build_alibi_tensor(attention_mask, num_heads, dtype)
        return plain
    rows, _, length, _ = attention_mask.shape
    # A row of the block-causal mask allows a token's own document up to itself.
    position_RL = (attention_mask[:, 0] == 0).sum(-1) - 1
    ones = torch.ones(1, 2, dtype=torch.long, device=attention_mask.device)
    slope_H: Tensor = build_alibi_tensor(ones, num_heads, torch.float32)[:, 0, 1]
    alibi = slope_H[None, :, None] * position_RL[:, None, :]
    return alibi.reshape(rows * num_heads, 1, length).to(dtype)
