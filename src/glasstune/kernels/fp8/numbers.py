"""Float8 numbers (e4m3) of rows with a scale each.

A number of e4m3 has 4 significant bits, 448 is the largest, 2**-6 the smallest with all 4. Scales
are powers of two: they lose nothing, since a float's precision does not depend on them. And they
change nothing: the same weight stored by rows and by columns stands for the same numbers, so that
the backward is that of the forward; a row is rounded alike alone, beside others and with LoRA's
columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn

LARGEST = 448.0

ROOM = 440.0
"""What a row is scaled to: a bound that is computed in floats may be exceeded by a last bit."""

_WEAKEST = 2.0**-10
"""A row much weaker than the strongest shares its scale from here on, a row of zeros as well."""


def power_scales(rows_ni: Tensor) -> Tensor:
    """Returns a power of two for each row, so that none of its values exceeds 448.

    Args:
        rows_ni: Float [n, i], finite.

    Returns:
        float32 [n]; 1 where all is zero.

    Raises:
        ValueError: NaN or Inf among the values.
    """
    return scales_of(rows_ni.abs().amax(1).float())


def scales_of(peaks: Tensor) -> Tensor:
    """Returns what `power_scales` does, of each row's largest magnitude [n].

    Raises:
        ValueError: NaN or Inf among them.
    """
    highest = peaks.max()
    if not bool(torch.isfinite(highest)):
        raise ValueError("the weight holds NaN or Inf")
    if float(highest) == 0:
        return torch.ones_like(peaks)
    return next_power(torch.maximum(peaks, highest * _WEAKEST) / LARGEST)


def next_power(values: Tensor) -> Tensor:
    """Returns the least power of two not below each positive float32; NaN for NaN and Inf."""
    bits = values.contiguous().view(torch.int32)
    power = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(torch.isfinite(values), power, torch.nan)


def to_rows(rows_ni: Tensor, scale_n: Tensor) -> Tensor:
    """Rounds rows to e4m3: [n, i] in units of their scales."""
    return (rows_ni.float() / scale_n[:, None]).to(E4M3)


def two_parts(values: Tensor) -> tuple[Tensor, Tensor]:
    """Splits float32 values of at most 448 into a sum of two e4m3 numbers: 8 significant bits.

    That is what bfloat16 has. Values below 2**-5 keep fewer.
    """
    first = values.to(E4M3)
    return first, (values - first.float()).to(E4M3)
