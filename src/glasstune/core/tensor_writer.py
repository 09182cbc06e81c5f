"""Writes a safetensors file whose tensors arrive one by one, in any order.

The header is known before any tensor is, so each tensor goes straight to its place and nothing
but the tensor at hand is in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from glasstune.core.tensors import _TORCH_NAMES

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 8
_FORMAT_NAMES = {torch_name: (name, width) for name, (torch_name, width) in _TORCH_NAMES.items()}


class TensorWriter:
    """One safetensors file, open for writing.

    Args:
        path: The file; its folder exists.
        layout: Name to (shape, torch's name of the type), in the order of the file.
        metadata: Strings stored in the header.

    Raises:
        OSError: The file cannot be made, for example on a full disk.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[tuple[int, ...], str]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.left = set(layout)
        self._layout = dict(layout)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
        end = 0
        for name, (shape, dtype) in layout.items():
            code, width = _FORMAT_NAMES[dtype]
            self._offsets[name] = end
            stop = end + math.prod(shape) * width
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, stop]}
            end = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = 8 + len(text)
        self.size = self._start + end
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        _write_all(self._file, memoryview(len(text).to_bytes(8, "little") + text), 0)
        os.ftruncate(self._file, self.size)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor to its place.

        Raises:
            ValueError: It is not of the shape or type that the layout says, or was written before.
            OSError: The disk is full.
        """
        import torch

        shape, dtype = self._layout[name]
        found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if found != (tuple(shape), dtype):
            raise ValueError(f"{name} is {found}, planned as {(tuple(shape), dtype)}")
        if name not in self.left:
            raise ValueError(f"{name} is written twice")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        _write_all(self._file, data, self._start + self._offsets[name])
        self.left.discard(name)

    def close(self, *, sync: bool = True) -> None:
        """Closes the file, flushed to the disk."""
        if sync:
            os.fsync(self._file)
        os.close(self._file)


def _write_all(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        # The kernel takes at most 2 GiB at a time.
        done += os.pwrite(file, data[done : done + 2**30], offset + done)
