"""Float8 products in a plan: layers without data, what stays of them, what their making takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glasstune.fast.bases import asks_fp8
from glasstune.kernels.expand import Fp8Packed, Packed4bit, PackedInt8
from glasstune.kernels.fp8 import Fp8Linear, Fp8Weights, Low, extra_columns
from glasstune.kernels.fp8.numbers import E4M3
from glasstune.kernels.lora_group import Layout
from glasstune.models.classes import Conv1D
from glasstune.models.fp8 import kept, mark_fp8
from glasstune.models.skips import eligible

MAKING = 10
"""Bytes an entry while a weight is rounded: rows, columns and two float32 copies (`turn`)."""


def give_fp8(base: Any, skip_modules: Sequence[str] | None, keep: Sequence[str]) -> None:
    """Gives a model on the meta device the layers that `to_fp8` would.

    Args:
        base: Before its adapters.
        skip_modules: `llm_int8_skip_modules`, or None.
        keep: `training.fp8_keep`.

    Raises:
        InputError: `bad_weights`: a packed layer's width is no multiple of 16.
    """
    for path, module in eligible(base, skip_modules):
        if kept(path, keep):
            continue
        weight: Any = module.weight
        bias: Any = module.bias
        outs, width = weight.T.shape if isinstance(module, Conv1D) else weight.shape
        fresh = Fp8Linear(
            int(width), int(outs), bias is not None, device="meta",
            dtype=None if bias is None else bias.dtype,
        )  # fmt: skip
        base.set_submodule(path, fresh)
    mark_fp8(base, keep)


@dataclass(frozen=True)
class PlannedHome:
    """What `Fp8Home` or `PackedFp8Home` keeps of a group, without data."""

    weights: Fp8Weights | Fp8Packed
    plain: Fp8Weights | Fp8Packed
    low: Low

    @classmethod
    def of(cls, layout: Layout, source: Packed4bit | PackedInt8 | None, device: Any) -> PlannedHome:
        """Makes it for a layout with its ranks; `source` is that of packed weights."""
        n, i, extra = layout.rows, layout.width, extra_columns(layout)

        def rows(count: int, width: int) -> Tensor:
            return torch.empty(count, width, dtype=E4M3, device=device)

        scales = torch.empty(n, device=device), torch.empty(i, device=device)
        low = Low.empty(layout, torch.bfloat16, device)
        if source is not None:
            packed = Fp8Packed(source, layout.outs, *scales, rows(n, extra), rows(i, extra))
            return cls(packed, Fp8Packed(source, layout.outs, *scales), low)
        wide, turned = rows(n, i + extra), rows(i, n + extra)
        whole = Fp8Weights(wide, scales[0], turned, scales[1])
        return cls(whole, Fp8Weights(wide[:, :i], scales[0], turned[:, :n], scales[1]), low)

    def tensors(self) -> list[Tensor]:
        """Returns all that is held for good."""
        parts = (*_tensors(self.weights), *_tensors(self.plain), *self.low.tensors())
        return [part for part in parts if isinstance(part, Tensor)]

    def beside(self, layout: Layout) -> int:
        """Bytes beside the weights: LoRA's columns, its copies, scales of packed ones."""
        extra = extra_columns(layout) * (layout.rows + layout.width)
        packed = isinstance(self.weights, Fp8Packed)
        scales = 4 * (layout.rows + layout.width) if packed else 0
        return (
            extra + scales + sum(part.numel() * part.element_size() for part in self.low.tensors())
        )


def _tensors(weights: Fp8Weights | Fp8Packed) -> tuple[Any, ...]:
    if isinstance(weights, Fp8Weights):
        return weights.wide, weights.scale, weights.turned, weights.turned_scale
    return weights.scale, weights.turned_scale, weights.low, weights.low_turned


def grown_base(model: nn.Module, itemsize: int, times: Callable[[str], int]) -> int:
    """Returns by how many bytes the base grows when its 16-bit weights become e4m3 twice.

    Args:
        model: With its `Fp8Linear` layers.
        itemsize: Bytes of an entry before.
        times: Path -> how many layers of the real model it stands for.
    """
    total = 0
    for path, module in model.named_modules():
        if type(module) is Fp8Linear:
            n, i = module.out_features, module.in_features
            total += times(path) * ((2 - itemsize) * n * i + 4 * (n + i))
    return total


def making_bytes(model: nn.Module, groups: Iterable[Any]) -> int:
    """Returns the most bytes beside the base while weights are rounded, then laid side by side."""
    sizes = [
        module.out_features * module.in_features
        for module in model.modules()
        if type(module) is Fp8Linear
    ]
    found = [MAKING * max(sizes, default=0)]
    for group in groups:
        if group.kind == "fp8":
            layout, extra = group.layout, extra_columns(group.layout)
            both = layout.rows * (layout.width + extra) + layout.width * (layout.rows + extra)
            # The members' own copies are still there; the widest is moved through float32.
            found.append(both + MAKING * max(layout.outs) * layout.width)
    return max(found)


def expansion(group: Any) -> int:
    """Returns the bytes of a packed group's larger float8 expansion."""
    layout = group.layout
    extra = extra_columns(layout)
    return int(max(layout.rows * (layout.width + extra), layout.width * (layout.rows + extra)))


def float8_flops(
    groups: Iterable[Any], times: Callable[[str], int], tokens: int, forwards: float
) -> int:
    """Returns the operations of a step's float8 products, each counted as half of a bfloat16 one.

    Args:
        groups: Of the fast path.
        times: Path -> how many layers of the real model it stands for.
        tokens: Of the forward.
        forwards: How often a layer's forward runs, on average: 1, and more where it is made again.
    """
    total = 0.0
    for group in groups:
        if group.fp8:
            n, i, extra = group.layout.rows, group.layout.width, extra_columns(group.layout)
            once = n * (i + extra) * forwards + i * (n + extra)
            total += times(group.paths[0]) * tokens * once
    return round(total)


def is_fp8(base: Any) -> bool:
    """Whether a layer's products are float8."""
    return type(base) is Fp8Linear or asks_fp8(base)


def emulated_bytes(name: str, inputs: Sequence[Any]) -> int:
    """Bytes that float8 operations allocate inside where they are emulated (a CPU).

    Source: `fp8_product` and `widened_rows`: both factors and their product in float32, then twice
    that with the scales; rows in float32, once more in units of their scales, and the result.

    Args:
        name: Of the operation.
        inputs: Its arguments.
    """
    if name.startswith("glasstune.fp8_product"):
        left, right = inputs[0], inputs[2]
        out = left.shape[0] * right.shape[0]
        return int(4 * max(left.numel() + right.numel() + out, 3 * out))
    if name.startswith("glasstune.fp8_rows"):
        width = sum(part.shape[1] for part in inputs[0])
        joined = sum(part.numel() * part.element_size() for part in inputs[0])
        return int(9 * inputs[0][0].shape[0] * width) + (joined if len(inputs[0]) > 1 else 0)
    return 0
