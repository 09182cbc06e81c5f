"""The second generation's head: logits of rows that are scaled to length one.

logit_v = hidden . w_v / |w_v|, where w is the weight that a merge would write: with LoRA on the
head, that is W + s B A. A frozen head is scaled once (`fold`); else the division stands behind the
product, so that gradients reach whatever is trained in it.

Shape letters: V entries of the vocabulary, d hidden size, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glasstune.core.errors import InputError

_ROWS = 4096
"""Rows that are scaled at a time: a whole head in float32 would be 2 GB."""
_SMALLEST = 1e-12
_MARK = "_glasstune_unit_rows"


def fold(head: nn.Module) -> bool:
    """Scales the rows of a frozen head to length one, in place and once.

    Args:
        head: What `get_output_embeddings` returns.

    Returns:
        Whether its rows now have length one; False where it is trained or adapted.
    """
    if type(head) is not nn.Linear or head.weight.requires_grad:
        return False
    if is_folded(head):
        return True
    weight = head.weight
    with torch.no_grad():
        for start in range(0, weight.shape[0], _ROWS):
            part = weight[start : start + _ROWS]
            norm_V1 = _norms(part).clamp_min(_SMALLEST).unsqueeze(1)
            part.copy_(part.to(norm_V1.dtype) / norm_V1)
    # Whatever writes into the weight later raises its version, and the mark holds no more.
    setattr(weight, _MARK, weight._version)
    return True


def is_folded(head: nn.Module) -> bool:
    """Whether `fold` has scaled this very weight, and nobody has written into it since."""
    weight = getattr(head, "weight", None)
    return weight is not None and getattr(weight, _MARK, None) == weight._version


def scaled_logits(head: nn.Module, logits: Tensor) -> Tensor:
    """Divides each logit by the length of its row.

    Args:
        head: What made them: a linear layer, bare or with PEFT around it.
        logits: [..., V].

    Returns:
        The same shape and dtype.

    Raises:
        InputError: `head_adapter`: the head has an adapter other than plain LoRA, or one that was
            added after its rows had been scaled.
    """
    if type(head) is nn.Linear and is_folded(head):
        return logits
    return (logits / row_norms(head)).to(logits.dtype)


def row_norms(head: Any) -> Tensor:
    """Returns the length of each row of the weight that a merge would write, [V].

    Args:
        head: A linear layer, bare or with PEFT around it.

    Returns:
        In float32, or float64 as the weight.

    Raises:
        InputError: As `scaled_logits`.
    """
    if hasattr(head, "modules_to_save"):
        active = [] if head.disable_adapters else [*head.active_adapters]
        saved = [name for name in active if name in head.modules_to_save]
        return row_norms(head.modules_to_save[saved[0]] if saved else head.original_module)
    if hasattr(head, "base_layer"):
        return _adapted_norms(head)
    return _norms(head.weight).clamp_min(_SMALLEST)


def _norms(weight: Tensor) -> Tensor:
    kind = _exact(weight)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=kind)
    return norms


def _exact(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _adapted_norms(head: Any) -> Tensor:
    """Returns the row lengths of W + s B A without making that sum."""
    weight = head.base_layer.weight
    if is_folded(head.base_layer):
        raise _refused("was scaled to rows of length one before the adapter was added")
    active = [name for name in head.active_adapters if name in getattr(head, "lora_A", {})]
    if head.disable_adapters or head.merged or not active:
        return _norms(weight).clamp_min(_SMALLEST)
    if getattr(head, "lora_variant", None) or len(active) != len(head.active_adapters):
        raise _refused("has an adapter that is not plain LoRA")
    downs = torch.cat([head.lora_A[name].weight for name in active])
    ups = torch.cat([head.scaling[name] * head.lora_B[name].weight for name in active], dim=1)
    # |w + u|^2 = |w|^2 + 2 w.u + |u|^2, row by row, with u = (s B) A.
    kind = _exact(weight)
    across_Vr = nn.functional.linear(weight, downs.to(weight.dtype)).to(kind)
    downs, ups = downs.to(kind), ups.to(kind)
    square = _norms(weight).square() + 2 * (across_Vr * ups).sum(1)
    square = square + (ups @ (downs @ downs.T) * ups).sum(1)
    return square.clamp_min(_SMALLEST**2).sqrt()


def _refused(says: str) -> InputError:
    return InputError(
        "head_adapter",
        f"this model's head {says}, and it divides each logit by the length of its row",
        where="adapter.target_modules",
        fix="leave lm_head out, use plain LoRA there, or name it in modules_to_save",
    )
