"""The one place that reads and writes safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasstune.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_TORCH_NAMES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
}
"""safetensors' name of a type to torch's and its bytes."""

_LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the format."""


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to a safetensors file (contiguous copies on the CPU).

    Args:
        tensors: Name to tensor; what shares memory is written once for each name.
        path: The file; its folder exists.
        metadata: Strings stored in the file's header.

    Raises:
        OSError: The file cannot be written, for example on a full disk.
    """
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        plain[name] = value.clone() if value.data_ptr() in written else value
        written.add(value.data_ptr())
    save_file(plain, path, metadata=dict(metadata or {"format": "pt"}))


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Reads a safetensors file whole.

    Raises:
        OSError: The file cannot be read.
        Exception: `safetensors.SafetensorError` where the file is damaged.
    """
    from safetensors.torch import load_file

    loaded: dict[str, Tensor] = load_file(path, device=device)
    return loaded


def tensor_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Reads only the header: name to (shape, dtype name such as `F32`)."""
    from safetensors import safe_open

    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a safe_open handle is not iterable
            part = file.get_slice(name)
            shapes[name] = (tuple(part.get_shape()), str(part.get_dtype()))
    return shapes


def tensor_metadata(path: Path) -> dict[str, str]:
    """Reads the strings in a safetensors file's header; empty where it cannot be read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length <= _LARGEST_HEADER else b""
    try:
        return dict(json.loads(raw).get("__metadata__") or {})
    except (ValueError, AttributeError, TypeError):
        return {}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in a safetensors file.

    Args:
        file: The file.
        name: Its key there.
        shape: Its shape.
        dtype: The format's name of its type, such as `BF16`.
        offset: Of its first byte, from the start of the file.
        size: Bytes.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int

    @property
    def torch_dtype(self) -> str:
        """The type's name in torch; the format's own where torch has none."""
        return _TORCH_NAMES[self.dtype][0] if self.dtype in _TORCH_NAMES else self.dtype


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Reads the header of a safetensors file: name to place, in the order of the header.

    Raises:
        InputError: `bad_weights`: no header, a bad one, or one that speaks of more or fewer
            bytes than the file has.
        OSError: The file cannot be read.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > min(total - 8, _LARGEST_HEADER):
            raise _damaged(path, f"the header claims {length:,} bytes, the file has {total:,}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        found = {name: _place(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, f"its header is not one of safetensors ({error})") from error
    end = max((place.offset + place.size for place in found.values()), default=8 + length)
    if end != total:
        raise _damaged(path, f"its tensors end at byte {end:,}, the file has {total:,}")
    return found


def read_rows(tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Reads rows of a stored tensor, and nothing else of its file.

    Plain reads, not a memory map: pages of a map count as this process's memory until the system
    takes them back, so a large checkpoint would seem to be held whole.

    Args:
        tensor: From `stored_tensors`.
        start: First row (index of the first dimension).
        stop: Row after the last; None for the end.

    Returns:
        A tensor of its own memory on the CPU, [stop - start, ...].

    Raises:
        InputError: `bad_weights`: the file has become shorter.
        OSError: The file cannot be read.
    """
    import torch

    name, width = _TORCH_NAMES[tensor.dtype]
    rows = tensor.shape[0] if tensor.shape else 1
    stop = rows if stop is None else min(stop, rows)
    row = math.prod(tensor.shape[1:]) * width
    out = torch.empty(max(0, stop - start) * row, dtype=torch.uint8)
    view = out.numpy().data
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.offset + start * row)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise _damaged(tensor.file, f"it ends inside {tensor.name}")
            done += count
    shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
    return out.view(getattr(torch, name)).reshape(shape)


def _place(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = str(entry["dtype"])
    if dtype in _TORCH_NAMES and math.prod(shape) * _TORCH_NAMES[dtype][1] != end - begin:
        raise ValueError(f"{name} of shape {list(shape)} has {end - begin:,} bytes")
    if begin < 0 or end < begin:
        raise ValueError(f"{name} lies at {begin}..{end}")
    return StoredTensor(path, name, shape, dtype, data + begin, end - begin)


def _damaged(path: Path, says: str) -> InputError:
    return InputError(
        "bad_weights",
        f"the file is damaged or was cut short: {says}",
        where=str(path),
        fix="download or save it again",
    )
