"""The output's weight files: the base's own partition, every tensor's place known beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glasstune.core.files import write_json_atomic
from glasstune.core.tensor_writer import TensorWriter

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
WIDTHS = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4}
WIDTHS |= {"int16": 2, "int8": 1, "uint8": 1, "bool": 1}


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of the output.

    Args:
        shape: Its shape.
        dtype: torch's name of its type.
        shard: Index of its file.
    """

    shape: tuple[int, ...]
    dtype: str
    shard: int

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * WIDTHS[self.dtype]


class ShardWriter:
    """All weight files of an output, open at once.

    Args:
        folder: Where they go; it exists.
        slots: Key to place, in the order of the files.
    """

    def __init__(self, folder: Path, slots: Mapping[str, Slot]) -> None:
        self._folder, self._slots = folder, slots
        count = 1 + max(slot.shard for slot in slots.values())
        names = shard_names(count)
        self._names = names
        self._writers: list[TensorWriter] = []
        try:
            for index, name in enumerate(names):
                layout = {
                    key: (slot.shape, slot.dtype)
                    for key, slot in slots.items()
                    if slot.shard == index
                }
                self._writers.append(TensorWriter(folder / name, layout))
        except BaseException:
            self.abandon()
            raise

    def write(self, key: str, tensor: Tensor) -> None:
        """Writes one tensor to its place."""
        self._writers[self._slots[key].shard].write(key, tensor)

    def finish(self) -> None:
        """Closes the files and writes their index.

        Raises:
            RuntimeError: A tensor never came.
        """
        left = [key for writer in self._writers for key in sorted(writer.left)]
        if left:
            raise RuntimeError(f"{len(left)} tensors were not written: {left[:3]}")
        for writer in self._writers:
            writer.close()
        self._writers.clear()
        if len(self._names) > 1:
            total = sum(slot.bytes for slot in self._slots.values())
            weights = {key: self._names[slot.shard] for key, slot in self._slots.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weights}
            write_json_atomic(self._folder / INDEX, index)

    def abandon(self) -> None:
        """Closes the files as they are; the folder is thrown away."""
        for writer in self._writers:
            writer.close(sync=False)
        self._writers.clear()


def shard_names(count: int) -> list[str]:
    """Returns the files' names, as transformers writes them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
