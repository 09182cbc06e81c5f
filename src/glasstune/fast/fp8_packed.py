"""What a group of packed layers with float8 products keeps beside its packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from glasstune.kernels.expand import Fp8Packed, Packed4bit, PackedInt8, weight_scales
from glasstune.kernels.fp8 import Low, extra_columns, write_low
from glasstune.kernels.fp8.numbers import E4M3
from glasstune.kernels.lora_group import Layout


class PackedFp8Home:
    """The powers of two of a group's rows and columns, and LoRA's columns; used as `Fp8Home` is.

    Args:
        packed: The members' weights.
        layout: Of the group, with its ranks.
        plain: The same weights without LoRA, where they were looked through before.

    Raises:
        ValueError: A weight holds NaN or Inf.
    """

    def __init__(
        self, packed: Packed4bit | PackedInt8, layout: Layout, plain: Fp8Packed | None = None
    ) -> None:
        extra = extra_columns(layout)
        with torch.inference_mode(False), torch.no_grad():
            if plain is None:
                plain = Fp8Packed(packed, layout.outs, *weight_scales(packed, layout))
            scale, turned_scale = plain.scale, plain.turned_scale
            device = scale.device
            low = torch.zeros(layout.rows, extra, dtype=E4M3, device=device)
            low_turned = torch.zeros(layout.width, extra, dtype=E4M3, device=device)
            self.low = Low.empty(layout, torch.bfloat16, device)
        self.plain = plain
        self.weights = Fp8Packed(packed, layout.outs, scale, turned_scale, low, low_turned)
        self._sides = (low, scale), (low_turned, turned_scale)

    def of_ranks(self, layout: Layout) -> PackedFp8Home:
        """Returns one of the same weights with room for another adapter."""
        return PackedFp8Home(self.plain.packed, layout, self.plain)

    def write(
        self, layout: Layout, downs: list[Tensor], ups: list[Tensor], seen_to_change: bool
    ) -> None:
        """Writes A and s*B where expansions take them from.

        Args:
            layout: Of the group.
            downs: A of each member.
            ups: B of each member.
            seen_to_change: Whether a graph made before must not run its backward any more.
        """
        wide, turned = self._sides
        if seen_to_change:
            write_low(layout, downs, ups, self.low, wide, turned)
            return
        with _unsafe_preserve_version_counter((wide[0], turned[0], *self.low.tensors())):
            write_low(layout, downs, ups, self.low, wide, turned)

    def tensors(self) -> list[Tensor]:
        """Returns what a product reads beside its input and the packed weights."""
        (low, scale), (low_turned, turned_scale) = self._sides
        return [low, scale, low_turned, turned_scale, *self.low.tensors()]

    def release(self, bases: Sequence[Any]) -> None:
        """Does nothing: the bases keep their own packed weights."""
