"""Row-wise int8 weights in plain torch: quantise, expand, multiply.

A row of the weight is stored as int8 q and one float32 s = the row's largest magnitude, so that
the weight is about q * s / 127: the format of bitsandbytes' `int8_vectorwise_quant`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to int8 by its own largest magnitude.

    Args:
        weight: Floating point [out, in].

    Returns:
        The int8 weight [out, in] and the rows' largest magnitudes, float32 [out].

    Raises:
        ValueError: The weight holds NaN or Inf.
    """
    scale = weight.abs().amax(dim=1).float()
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("the weight holds NaN or Inf")
    factor = torch.where(scale > 0, 127.0 / scale, torch.zeros_like(scale))
    rounded = torch.round(weight.float() * factor.unsqueeze(1))
    return rounded.to(torch.int8), scale


def expand_rows(quantized: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the weight that int8 rows stand for.

    Args:
        quantized: int8 [out, in].
        scale: float32 [out], largest magnitude of each row.
        dtype: Type of the result; the product is rounded once.

    Returns:
        [out, in] in `dtype`.
    """
    return (quantized.float() * (scale / 127.0).unsqueeze(1)).to(dtype)


def int8_linear_reference(
    x: Tensor, quantized: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiplies by the expanded weight with autograd's own backward.

    Args:
        x: [..., in].
        quantized: int8 [out, in].
        scale: float32 [out].
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype.
    """
    return functional.linear(x, expand_rows(quantized, scale, x.dtype), bias)
