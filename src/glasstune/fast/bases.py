"""The frozen layers under the adapters: which can share a product, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glasstune.kernels.expand import Packed4bit, PackedInt8
from glasstune.kernels.fp8 import Fp8Linear
from glasstune.kernels.int8_linear import Int8Linear
from glasstune.models.classes import Conv1D
from glasstune.models.packed import four_bit_parts, is_four_bit

Kind = Literal["full", "4bit", "int8", "fp8"]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class BaseKey:
    """What the members of one group have in common."""

    kind: Kind
    width: int
    dtype: torch.dtype
    device: torch.device
    details: tuple[Any, ...] = ()
    fp8: bool = False


def base_key(base: nn.Module, shared: set[int]) -> BaseKey | str:
    """Returns what must be equal within a group, or why the layer can be in none.

    Args:
        base: The layer under the adapter.
        shared: `id` of weights that several modules hold.
    """
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        return f"its base, {type(base).__name__}, has no weight"
    trained = [name for name, tensor in base.named_parameters() if tensor.requires_grad]
    if trained:
        return f"the base's own {', '.join(trained)} is trained"
    if "forward" in base.__dict__:
        return "its base's forward was replaced (a trained bias, or another tool)"
    if hasattr(base, "_hf_hook"):
        return "accelerate moves its weights between devices"
    if weight.device.type == "meta":
        return "its weight is not in memory"
    if hasattr(base, "parametrizations"):
        return "its weight is parametrised"
    if id(weight) in shared:
        return "its weight is also that of another module (tied)"
    if asks_fp8(base) and _odd_for_fp8(base):
        return "float8 products take multiples of 16 rows and columns"
    if is_four_bit(base):
        return _four_bit_key(base)
    if type(base) is Int8Linear:
        return BaseKey("int8", base.in_features, torch.int8, weight.device, fp8=asks_fp8(base))
    if type(base) is Fp8Linear:
        return BaseKey("fp8", base.in_features, torch.uint8, weight.device)
    return _full_key(base, weight)


def _four_bit_key(base: Any) -> BaseKey | str:
    parts = four_bit_parts(base)
    if isinstance(parts, str):
        return parts
    details = (parts.block, parts.nested is None, parts.code.tolist(), base.compute_dtype)
    return BaseKey(
        "4bit", base.in_features, torch.uint8, base.weight.device, tuple(map(str, details)),
        asks_fp8(base),
    )  # fmt: skip


def asks_fp8(base: Any) -> bool:
    """Whether a packed layer was marked for float8 products."""
    return bool(getattr(base, "_glasstune_fp8", False))


def _odd_for_fp8(base: Any) -> bool:
    return bool(base.in_features % 16 or base.out_features % 16)


def is_sharded(weight: Any) -> bool:
    """Whether only this rank's part of a weight is there: a DTensor, until FSDP2 gathers it."""
    return hasattr(weight, "to_local")


def _full_key(base: nn.Module, weight: Tensor) -> BaseKey | str:
    if is_sharded(weight):
        return "fsdp2 gathers its weight for each call: a joined copy would be held for good"
    if type(weight) is not nn.Parameter or weight.layout != torch.strided:
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in _FLOATS:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if type(base) is Conv1D:
        return BaseKey("full", weight.shape[0], weight.dtype, weight.device)
    if not isinstance(base, nn.Linear) or weight.dim() != 2:
        return f"its base is a {type(base).__name__}"
    if type(base) is not nn.Linear and not _is_a_linear_product(base):
        return f"its base, {type(base).__name__}, computes something else than nn.Linear"
    return BaseKey("full", weight.shape[1], weight.dtype, weight.device)


@torch.no_grad()
def _is_a_linear_product(base: nn.Linear) -> bool:
    """Tries a subclass of `nn.Linear` on a few numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, base.in_features, generator=generator).to(base.weight)
    try:
        mine, theirs = nn.functional.linear(x, base.weight, base.bias), base(x)
    except (TypeError, RuntimeError, ValueError):
        return False
    if not isinstance(theirs, Tensor) or theirs.shape != mine.shape:
        return False
    return bool((mine - theirs).abs().max() <= 1e-2 * mine.abs().max())


def shared_weights(model: nn.Module) -> set[int]:
    """Returns `id` of each parameter that more than one module holds."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def out_features(base: Any) -> int:
    """Returns the width of the layer's output."""
    return int(base.weight.shape[1]) if type(base) is Conv1D else int(base.out_features)


def rows_of(base: Any) -> Tensor:
    """Returns the weight of a kept base as [n, i], a view."""
    weight: Tensor = base.weight.data
    return weight.t() if type(base) is Conv1D else weight


def put_rows(base: Any, rows_ni: Tensor) -> None:
    """Makes [n, i] the memory of the layer's weight."""
    base.weight.data = rows_ni.t() if type(base) is Conv1D else rows_ni


def stored_bits(base: Any) -> int:
    """Returns the bits of a stored weight."""
    if is_four_bit(base):
        return 4
    if isinstance(base, Int8Linear):
        return 8  # also where a sharded base's bytes pass for another type
    weight = getattr(base, "weight", None)
    return 16 if not isinstance(weight, Tensor) else 8 * weight.element_size()


def packed_source(bases: list[Any], kind: Kind) -> Packed4bit | PackedInt8:
    """Returns the packed weights of a group, as they are now."""
    if kind == "int8":
        return PackedInt8([base.rows.data for base in bases], [base.scale for base in bases])
    parts = []
    for base in bases:
        part = four_bit_parts(base)
        if isinstance(part, str):
            raise ValueError(part)
        parts.append(part)
    nested = [part.nested for part in parts if part.nested is not None]
    return Packed4bit(
        [part.packed for part in parts],
        [part.absmax for part in parts],
        [code for code, _, _ in nested],
        [absmax for _, absmax, _ in nested],
        [offset for _, _, offset in nested],
        parts[0].code,
        parts[0].block,
    )
