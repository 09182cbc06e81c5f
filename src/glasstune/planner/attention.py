"""Attention that a GPU run replaces, as far as memory depends on it."""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from glasstune.models.families.table import family_of


def replace_attention(model: nn.Module) -> None:
    """Gives BLOOM's layers attention that keeps what `flex_attention` does: no scores.

    Its kernel cannot be traced without a GPU; torch's causal one keeps the same tensors (queries,
    keys, values, result and a number a row and head), and ALiBi's slopes are a few bytes.

    Args:
        model: Any model; others pass unchanged.
    """
    family = family_of(getattr(model, "config", None))
    if family is None or family.packing != "bloom":
        return
    for part in model.modules():
        if type(part).__name__ == "BloomAttention":
            part.forward = types.MethodType(_forward, part)


def _forward(
    self: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    q_RHLD, k_RHLD, v_RHLD = self._reshape(self.query_key_value(hidden_states))
    attended_RHLD = functional.scaled_dot_product_attention(q_RHLD, k_RHLD, v_RHLD, is_causal=True)
    out_RLd: Tensor = self.dense(attended_RHLD.transpose(1, 2).flatten(2))
    out_RLd = functional.dropout(out_RLd, self.hidden_dropout, self.training) + residual
    return out_RLd, None
