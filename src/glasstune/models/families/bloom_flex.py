"""BLOOM's attention on a GPU by `flex_attention`, ALiBi inside each document.

transformers' own makes the whole scores of every head (150 of the 318 ms of a step of 8 x 1,024
tokens of BLOOM 2.6B on an H100), so every forward without a cache takes this one. The model gets
the documents' numbers in the mask's place, the ALiBi builder makes blocks and slopes of them, and
the replaced attention adds slope * distance. In bfloat16 it is nearer to the truth: transformers
rounds slope * position.

Shape letters: R rows, H heads, L tokens of a row, D width of a head, d hidden size.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.bloom import modeling_bloom as theirs

from glasstune.kernels.document_attention.flex import (
    Blocks,
    document_blocks,
    flex_document_attention,
)


class FlexAlibi(NamedTuple):
    """What takes the place of the ALiBi tensor: blocks of the documents, and float32 slopes [H]."""

    blocks: Blocks
    slope_H: Tensor


def install(model: nn.Module) -> None:
    """Replaces the attention of every forward without a cache (idempotent); others stay.

    A 2-D mask is taken too. Its padding gets other outputs than transformers', and distances count
    tokens that it hides between two that it does not.

    Args:
        model: A model that holds a BLOOM model.
    """
    uninstall(model)
    for part in model.modules():
        if isinstance(part, theirs.BloomModel):
            part.build_alibi_tensor = types.MethodType(_build_alibi, part)
            part.register_forward_pre_hook(_numbers_for_mask, with_kwargs=True)
        elif isinstance(part, theirs.BloomAttention):
            part.forward = types.MethodType(_forward, part)


def uninstall(model: nn.Module) -> None:
    """Gives transformers' attention back; another model passes unchanged."""
    if not installed(model):
        return
    for part in model.modules():
        if isinstance(part, theirs.BloomModel):
            part.__dict__.pop("build_alibi_tensor", None)
            for key in [key for key, hook in part._forward_pre_hooks.items() if _is_ours(hook)]:
                del part._forward_pre_hooks[key]
                part._forward_pre_hooks_with_kwargs.pop(key, None)
        elif isinstance(part, theirs.BloomAttention):
            part.__dict__.pop("forward", None)


def installed(model: nn.Module) -> bool:
    """Whether `install` has seen the model."""
    backbone = next((part for part in model.modules() if isinstance(part, theirs.BloomModel)), None)
    return backbone is not None and any(map(_is_ours, backbone._forward_pre_hooks.values()))


def numbers_as_mask(document_RL: Tensor) -> Tensor:
    """Returns documents' numbers as an `attention_mask`, int32 [R, 1, 1, L]: four axes pass."""
    return document_RL[:, None, None, :]


def _is_ours(hook: object) -> bool:
    return hook is _numbers_for_mask


def _numbers_for_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Gives the numbers of one document a row where there is no mask, or a 2-D one."""
    config: Any = module.config
    used = {key: kwargs.get(key) for key in ("use_cache", "output_attentions")}
    asked = [getattr(config, key) if value is None else value for key, value in used.items()]
    cached = any(kwargs.get(key) is not None for key in ("cache", "past_key_values"))
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    mask = kwargs.get("attention_mask")
    if cached or any(asked) or len(args) > 1 or tokens is None:
        return None
    if mask is None:
        rows, length = tokens.shape[:2]
        number_RL = torch.zeros(rows, length, dtype=torch.int32, device=tokens.device)
    elif mask.ndim == 2:
        number_RL = mask.to(tokens.device).bool().int() - 1  # hidden tokens see each other
    else:
        return None
    return args, {**kwargs, "attention_mask": numbers_as_mask(number_RL)}


def _build_alibi(
    self: Any, attention_mask: Tensor, num_heads: int, dtype: torch.dtype
) -> Tensor | FlexAlibi:
    """Returns transformers' ALiBi [R*H, 1, L], or its parts where the mask holds numbers."""
    if attention_mask.ndim == 2 or attention_mask.dtype != torch.int32:
        plain: Tensor = theirs.build_alibi_tensor(attention_mask, num_heads, dtype)
        return plain
    ones = torch.ones(1, 2, dtype=torch.long, device=attention_mask.device)
    slope_H = theirs.build_alibi_tensor(ones, num_heads, torch.float32)[:, 0, 1].contiguous()
    return FlexAlibi(document_blocks(attention_mask[:, 0, 0]), slope_H)


def _forward(
    self: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor | FlexAlibi, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attends by `flex_attention` where ALiBi came in parts, else as transformers does."""
    if not isinstance(alibi, FlexAlibi):
        before: tuple[Tensor, Tensor | None] = theirs.BloomAttention.forward(
            self, hidden_states, residual, alibi, **kwargs
        )
        return before
    q_RHLD, k_RHLD, v_RHLD = self._reshape(self.query_key_value(hidden_states))
    attended_RLHD = flex_document_attention(
        q_RHLD, k_RHLD, v_RHLD, alibi.blocks, scale=self.inv_norm_factor, slopes_H=alibi.slope_H
    )
    out_RLd = self.dense(attended_RLHD.flatten(2))
    out_RLd = theirs.dropout_add(out_RLd, residual, self.hidden_dropout, self.training)
    return out_RLd, None
