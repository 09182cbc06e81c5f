"""Where a group of float8 layers keeps its weights, with room for LoRA's columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from glasstune.kernels.fp8 import Fp8Weights, Low, extra_columns, write_low
from glasstune.kernels.fp8.numbers import E4M3
from glasstune.kernels.lora_group import Layout


class Fp8Home:
    """Both copies of the members' weights side by side; the bases then hold views of them.

    Args:
        bases: `Fp8Linear` layers with one input.
        layout: Of the group, with its ranks.
    """

    def __init__(self, bases: Sequence[Any], layout: Layout) -> None:
        n, i, extra = layout.rows, layout.width, extra_columns(layout)
        device = bases[0].weight.device
        with torch.inference_mode(False), torch.no_grad():
            wide = torch.zeros(n, i + extra, dtype=E4M3, device=device)
            turned = torch.zeros(i, n + extra, dtype=E4M3, device=device)
            scale = torch.cat([base.scale for base in bases])
            # The scale of a weight that is all zero says nothing of the others' columns.
            scales = [base.turned_scale * bool(base.weight.any()) for base in bases]
            shared = torch.stack(scales).amax(0)
            shared = torch.where(shared == 0, 1.0, shared)
            for base, rows in zip(bases, layout.out_slices(), strict=True):
                wide[rows, :i].view(torch.uint8).copy_(base.weight)
                # Powers of two: a larger scale moves exponents and rounds nothing but the least.
                move = (base.turned_scale / shared)[:, None]
                turned[:, rows] = (base.turned.view(E4M3).float() * move).to(E4M3)
                base.weight.data = wide[rows, :i].view(torch.uint8)
                # Versions of their own: LoRA's columns are written often, these are watched.
                base.turned = turned.data[:, rows].view(torch.uint8)
                base.scale, base.turned_scale = scale.data[rows], shared.clone()
            self.low = Low.empty(layout, torch.bfloat16, device)
        self.weights = Fp8Weights(wide, scale, turned, shared)
        # A rewritten adapter must not look like a rewritten base to a waiting backward.
        self.plain = Fp8Weights(wide.data[:, :i], scale, turned.data[:, :n], shared)
        self._places = [base.weight.data_ptr() for base in bases]

    def write(
        self, layout: Layout, downs: list[Tensor], ups: list[Tensor], seen_to_change: bool
    ) -> None:
        """Writes A and s*B behind the weights.

        Args:
            layout: Of the group.
            downs: A of each member.
            ups: B of each member.
            seen_to_change: Whether a graph made before must not run its backward any more.
        """
        low = self.low
        wide, turned = self.weights.wide, self.weights.turned
        written = (wide, turned, *low.tensors())
        sides = (wide, self.weights.scale), (turned, self.weights.turned_scale)
        if seen_to_change:
            write_low(layout, downs, ups, low, *sides)
            return
        with _unsafe_preserve_version_counter(written):
            write_low(layout, downs, ups, low, *sides)

    def release(self, bases: Sequence[Any]) -> None:
        """Gives the bases memory of their own again."""
        with torch.inference_mode(False), torch.no_grad():
            for base, place in zip(bases, self._places, strict=True):
                if base.weight.data_ptr() == place:
                    base.weight.data = base.weight.data.contiguous()
                    base.turned, base.scale = base.turned.contiguous(), base.scale.clone()

    def tensors(self) -> list[Tensor]:
        """Returns all that a product reads beside its input."""
        weights = self.weights
        own = [weights.wide, weights.scale, weights.turned, weights.turned_scale]
        return [*own, *self.low.tensors()]
