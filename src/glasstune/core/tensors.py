"""The one place that reads and writes safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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
