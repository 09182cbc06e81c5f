"""Bytes of tensors by part: by formula from logical shapes, or as they lie in memory.

n is a weight's logical number of elements, b = 64 the block of 4-bit weights.

| stored as | weights | scales | code tables |
|---|---|---|---|
| 16 bit | 2n | | |
| LLM.int8, w8a16 | n | 4 a row | |
| NF4, FP4 | ceil(n/2) | 4 ceil(n/b) | 64 |
| the same, double quantisation | ceil(n/2) | ceil(n/b) + 4 ceil(ceil(n/b)/256) + 4 | 64 + 1024 |

CUDA's allocator rounds each tensor up to 512 bytes; that is not counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from glasstune.kernels.int8_linear import Int8Linear

_NESTED_BLOCK = 256
_CODE_4BIT = 16 * 4
_CODE_8BIT = 256 * 4
_OFFSET = 4


def bytes_4bit(
    elements: int, *, double: bool, blocksize: int = 64, storage_bytes: int = 1
) -> dict[str, int]:
    """Returns the bytes of a 4-bit weight by part.

    Args:
        elements: Logical number of elements.
        double: Whether the scales are quantised again.
        blocksize: Elements a scale.
        storage_bytes: Size of `bnb_4bit_quant_storage`; the packed weight is whole elements of it.
    """
    packed = -(-elements // 2)
    packed = packed // storage_bytes * storage_bytes
    blocks = -(-elements // blocksize)
    if not double:
        return {"weights": packed, "scales": 4 * blocks, "code": _CODE_4BIT}
    scales = blocks + 4 * -(-blocks // _NESTED_BLOCK) + _OFFSET
    return {"weights": packed, "scales": scales, "code": _CODE_4BIT + _CODE_8BIT}


def bytes_8bit(rows: int, width: int) -> dict[str, int]:
    """Returns the bytes of an int8 weight with a float32 scale a row."""
    return {"weights": rows * width, "scales": 4 * rows}


@dataclass(slots=True)
class OwnTensors:
    """What one module holds itself, without its children.

    Args:
        parts: Bytes by `weights`, `scales`, `code`, `bias`, `buffers`.
        stored: The same bytes by `16bit`, `8bit`, `4bit`, `scales`, `code`, `buffers`.
        parameters: Logical number of elements of parameters.
        kept: Of them, those that are not quantised.
        transient: Bytes that a pass expands to.
        shape: Logical shape of the weight or the largest parameter.
        dtype: Of the same.
        trainable: Whether a parameter needs a gradient.
        tied_to: Name under which a shared parameter was counted before.
        double_extra: Bytes by which double quantisation is larger than plain; 0 where it is not.
    """

    parts: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)
    parameters: int = 0
    kept: int = 0
    transient: int = 0
    shape: list[int] | None = None
    dtype: str = ""
    trainable: bool = False
    tied_to: str | None = None
    double_extra: int = 0

    def add(self, parts: dict[str, int], kind: str) -> None:
        """Books bytes; `kind` is how the weights themselves are stored."""
        for part, count in parts.items():
            self.parts[part] += count
            self.stored[kind if part in ("weights", "bias") else part] += count


class Ledger:
    """Counts a model's tensors module by module, each tensor once.

    Args:
        dtype: Type of activations, for what is expanded where a layer names none.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._seen: dict[Any, str] = {}

    def own(self, path: str, module: nn.Module) -> OwnTensors:
        """Counts the tensors that a module holds itself.

        Tensors that were counted before add nothing. What expands: a 4-bit weight to the compute
        dtype in forward and backward; an int8 weight to the activations' dtype, of LLM.int8 in
        the backward (its forward multiplies int8), of w8a16 in both (a float32 copy of the
        expansion lives for a moment beside it and is not counted).
        """
        found = OwnTensors()
        main = _main_parameter(module)
        for name, value in module._parameters.items():
            if value is None:
                continue
            shape = _logical_shape(module, name, value)
            elements = _product(shape)
            if name == main:
                found.shape = list(shape)
                found.dtype = _label(module, name, value, self._dtype)
            found.trainable |= value.requires_grad
            full = f"{path}.{name}" if path else name
            first = self._first(value, full)
            if first != full:
                found.tied_to = first
                continue
            self._book(found, module, name, value, elements)
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            full = f"{path}.{name}" if path else name
            if self._first(buffer, full) != full:
                continue
            scale = isinstance(module, Int8Linear) and name == "scale"
            found.add({"scales" if scale else "buffers": _stored(buffer)}, "16bit")
        return found

    def _first(self, tensor: Tensor, name: str) -> str:
        return self._seen.setdefault(_identity(tensor), name)

    def _book(
        self, found: OwnTensors, module: nn.Module, name: str, value: nn.Parameter, elements: int
    ) -> None:
        found.parameters += elements
        kind = type(value).__name__
        if kind == "Params4bit" and (value.is_meta or _state(value) is not None):
            parts = _parts_4bit(value, elements)
            found.add(parts, "4bit")
            compute = getattr(module, "compute_dtype", None) or self._dtype
            found.transient += elements * compute.itemsize
            found.double_extra = _double_extra(value, elements)
        elif is_int8(module, name, value):
            found.add(_parts_8bit(module, value), "8bit")
            found.transient += elements * self._dtype.itemsize
        else:
            dtype = self._dtype if kind in ("Params4bit", "Int8Params") else value.dtype
            size = elements * dtype.itemsize if value.is_meta else _stored(value)
            found.add({"bias" if name == "bias" else "weights": size}, "16bit")
            found.kept += elements


def is_int8(module: nn.Module, name: str, value: Tensor) -> bool:
    """Whether a parameter is an int8 weight: bitsandbytes' (planned or real) or our own."""
    if isinstance(module, Int8Linear):
        return name == "weight"
    if type(value).__name__ != "Int8Params" or getattr(value, "has_fp16_weights", False):
        return False
    return value.is_meta or value.dtype == torch.int8


def model_dtype(model: nn.Module) -> torch.dtype:
    """Returns the floating type that holds most of a model's unquantised elements."""
    sizes: Counter[torch.dtype] = Counter()
    for value in model.parameters():
        if value.is_floating_point() and type(value).__name__ not in ("Params4bit", "Int8Params"):
            sizes[value.dtype] += value.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _main_parameter(module: nn.Module) -> str:
    """Returns the name of the parameter that stands for a module: `weight`, else the largest."""
    sizes = {name: value.numel() for name, value in module._parameters.items() if value is not None}
    if "weight" in sizes or not sizes:
        return "weight"
    return max(sizes, key=lambda name: sizes[name])


def _identity(tensor: Tensor) -> Any:
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    try:
        storage = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor subclass without storage
        return id(tensor)
    return (str(tensor.device), storage, tensor.storage_offset(), tuple(tensor.shape), tensor.dtype)


def _stored(tensor: Tensor) -> int:
    """Returns the bytes of a tensor; an expanded view counts what it stores."""
    size = tensor.numel() * tensor.dtype.itemsize
    if tensor.is_meta:
        return size
    try:
        return min(size, tensor.untyped_storage().nbytes())
    except (RuntimeError, NotImplementedError):
        return size


def _state(value: Tensor) -> Any:
    return getattr(value, "quant_state", None)


def _parts_4bit(value: Tensor, elements: int) -> dict[str, int]:
    state = _state(value)
    if value.is_meta or state is None:
        planned: Any = value
        return bytes_4bit(
            elements,
            double=bool(planned.compress_statistics),
            blocksize=planned.blocksize,
            storage_bytes=planned.quant_storage.itemsize,
        )
    parts = {
        "weights": _stored(value),
        "scales": _stored(state.absmax),
        "code": _stored(state.code),
    }
    if state.state2 is not None:
        parts["scales"] += _stored(state.state2.absmax) + _stored(state.offset)
        parts["code"] += _stored(state.state2.code)
    return parts


def _double_extra(value: Any, elements: int) -> int:
    if not value.compress_statistics:
        return 0
    plain, double = (
        sum(bytes_4bit(elements, double=kind, blocksize=value.blocksize).values())
        for kind in (False, True)
    )
    return max(0, double - plain)


def _parts_8bit(module: nn.Module, value: Tensor) -> dict[str, int]:
    if value.is_meta:
        rows, width = value.shape
        parts = bytes_8bit(rows, width)
        return {"weights": parts["weights"]} if isinstance(module, Int8Linear) else parts
    if isinstance(module, Int8Linear):
        return {"weights": _stored(value)}
    # The first forward moves the scales from the weight to the layer's state.
    scales = getattr(value, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    return {"weights": _stored(value), "scales": 0 if scales is None else _stored(scales)}


def _logical_shape(module: nn.Module, name: str, value: Tensor) -> tuple[int, ...]:
    if type(value).__name__ == "Params4bit" and not value.is_meta:
        state = _state(value)
        if state is not None:
            return tuple(int(size) for size in state.shape)
    return tuple(value.shape)


def _label(module: nn.Module, name: str, value: Any, dtype: torch.dtype) -> str:
    kind = type(value).__name__
    if kind == "Params4bit" and (value.is_meta or _state(value) is not None):
        return str(value.quant_type)
    if is_int8(module, name, value):
        return "int8"
    if kind in ("Params4bit", "Int8Params") and value.is_meta:
        return str(dtype).removeprefix("torch.")
    return str(value.dtype).removeprefix("torch.")


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
