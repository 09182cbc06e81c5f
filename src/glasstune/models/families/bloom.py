"""BLOOM's packing: transformers has no hook for it, since ALiBi is made from the 2-D mask.

By mask: a packed forward gives a block-causal 4-D mask instead of the 2-D one; BLOOM hands it on to
its layers as it is, and the ALiBi builder, replaced here, reads each token's position in its
document from the same mask. Attention itself stays transformers'.

By `flex_attention`, on a GPU: transformers' own attention makes the whole scores of every head
(150 of the 318 ms of a step of 8 x 1,024 tokens of BLOOM 2.6B on an H100), so every forward without
a cache takes another one. It gives the documents' numbers in the mask's place, the builder makes
blocks and slopes of them, and the replaced attention adds ALiBi inside each block. In bfloat16 it
is nearer to the truth: transformers rounds slope * position, here the distance counts.

Shape letters: R rows, H heads, L tokens of a row, d hidden size.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import (
    BloomAttention,
    BloomModel,
    build_alibi_tensor,
    dropout_add,
)

from glasstune.kernels.document_attention.flex import (
    Blocks,
    document_blocks,
    flex_document_attention,
)


class FlexAlibi(NamedTuple):
    """What takes the place of the ALiBi tensor: blocks of the documents, and float32 slopes [H]."""

    blocks: Blocks
    slope_H: Tensor


def install(model: PreTrainedModel) -> None:
    """Replaces the ALiBi builder of a BLOOM model (idempotent); 2-D masks are treated as before."""
    backbone = next(part for part in model.modules() if isinstance(part, BloomModel))
    backbone.build_alibi_tensor = types.MethodType(_build_alibi, backbone)


def install_flex(model: nn.Module) -> None:
    """Replaces the attention of every forward without a cache (idempotent); others stay.

    A 2-D mask is taken too. Its padding gets other outputs than transformers', and distances count
    tokens that it hides between two that it does not.

    Args:
        model: A model on a GPU that holds a BLOOM model.
    """
    backbone = next(part for part in model.modules() if isinstance(part, BloomModel))
    if uses_flex(backbone):
        return
    backbone.build_alibi_tensor = types.MethodType(_build_alibi, backbone)
    backbone.register_forward_pre_hook(_numbers_for_mask, with_kwargs=True)
    for part in backbone.modules():
        if isinstance(part, BloomAttention):
            part.forward = types.MethodType(_flex_forward, part)


def uninstall_flex(model: nn.Module) -> None:
    """Gives transformers' attention back."""
    for part in model.modules():
        if isinstance(part, BloomModel):
            part.__dict__.pop("build_alibi_tensor", None)
            for key, hook in list(part._forward_pre_hooks.items()):
                if hook is _numbers_for_mask:
                    del part._forward_pre_hooks[key]
                    part._forward_pre_hooks_with_kwargs.pop(key, None)
        elif isinstance(part, BloomAttention):
            part.__dict__.pop("forward", None)


def uses_flex(model: nn.Module) -> bool:
    """Whether `install_flex` has seen the model."""
    backbone = next((part for part in model.modules() if isinstance(part, BloomModel)), None)
    hooks = () if backbone is None else backbone._forward_pre_hooks.values()
    return any(hook is _numbers_for_mask for hook in hooks)


def numbers_as_mask(document_RL: Tensor) -> Tensor:
    """Returns documents' numbers as an `attention_mask`, int32 [R, 1, 1, L]: four axes pass."""
    return document_RL[:, None, None, :]


def _numbers_for_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Gives the numbers of one document a row where there is no mask, or a 2-D one."""
    config: Any = module.config
    used = {key: kwargs.get(key) for key in ("use_cache", "output_attentions")}
    asked = [getattr(config, key) if value is None else value for key, value in used.items()]
    cached = any(kwargs.get(key) is not None for key in ("cache", "past_key_values"))
    tokens = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
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
    """Returns ALiBi [R*H, 1, L] with positions that restart at each document, or its parts."""
    if attention_mask.ndim == 2:
        plain: Tensor = build_alibi_tensor(attention_mask, num_heads, dtype)
        return plain
    ones = torch.ones(1, 2, dtype=torch.long, device=attention_mask.device)
    slope_H: Tensor = build_alibi_tensor(ones, num_heads, torch.float32)[:, 0, 1]
    if attention_mask.dtype == torch.int32:
        return FlexAlibi(document_blocks(attention_mask[:, 0, 0]), slope_H)
    rows, _, length, _ = attention_mask.shape
    # A row of the block-causal mask allows a token's own document up to itself.
    position_RL = (attention_mask[:, 0] == 0).sum(-1) - 1
    alibi = slope_H[None, :, None] * position_RL[:, None, :]
    return alibi.reshape(rows * num_heads, 1, length).to(dtype)


def _flex_forward(
    self: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor | FlexAlibi, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attends by `flex_attention` where ALiBi came in parts, else as transformers does."""
    if not isinstance(alibi, FlexAlibi):
        before: tuple[Tensor, Tensor | None] = type(self).forward(
            self, hidden_states, residual, alibi, **kwargs
        )
        return before
    q_RHLD, k_RHLD, v_RHLD = self._reshape(self.query_key_value(hidden_states))
    attended_RLHD = flex_document_attention(
        q_RHLD, k_RHLD, v_RHLD, alibi.blocks, scale=self.inv_norm_factor, slopes_H=alibi.slope_H
    )
    out_RLd = self.dense(attended_RLHD.flatten(2))
    return dropout_add(out_RLd, residual, self.hidden_dropout, self.training), None
