"""The tensors of one 4-bit layer of bitsandbytes, opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class FourBitParts:
    """What a `Linear4bit` holds.

    Args:
        packed: uint8, two values a byte.
        absmax: float32 [blocks], or uint8 with double quantisation.
        nested: Code [256], absmax and offset of double quantisation, or None.
        code: float32 [16].
        block: Values of a block.
    """

    packed: Tensor
    absmax: Tensor
    nested: tuple[Tensor, Tensor, Tensor] | None
    code: Tensor
    block: int


def is_four_bit(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' 4-bit linear layer."""
    return any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__) and hasattr(
        module, "compute_type_is_set"
    )


def four_bit_parts(linear: Any) -> FourBitParts | str:
    """Opens a 4-bit layer; the tensors are its own, not copies.

    Returns:
        The parts, or why they cannot be had.
    """
    weight = linear.weight
    state = getattr(weight, "quant_state", None) or getattr(linear, "quant_state", None)
    if state is None:
        return "its weight is not quantised yet"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked its weight for inference on a CPU"
    if tuple(state.shape) != (linear.out_features, linear.in_features):
        return f"its weight was packed in the shape {tuple(state.shape)}"
    nested = None
    if state.nested:
        if state.state2.blocksize != 256:
            return f"double quantisation in blocks of {state.state2.blocksize}"
        nested = (state.state2.code, state.state2.absmax, state.offset)
    # Of a sharded weight this rank's bytes are there, until FSDP2 gathers it for a call.
    stored = weight.to_local() if hasattr(weight, "to_local") else weight.data
    packed = stored.reshape(-1).view(torch.uint8)
    return FourBitParts(packed, state.absmax, nested, state.code, int(state.blocksize))
