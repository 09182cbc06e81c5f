"""What a forward takes, on its device: one shape for all where blocks are compiled.

Shape letters: R rows of a micro-batch, L tokens of a row; those of the forward may be more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasstune.core.batch import IGNORED, MicroBatch
from glasstune.data.packing import PackedSet

_LOOKED_AT = 64
"""Packs whose length is looked at before a run."""

MULTIPLE = 64
"""Tokens; lengths of rows that are not packed are rounded up to this where blocks are compiled."""


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copies from the host without waiting for the device; what is there already stays.

    A copy out of ordinary memory would wait until the device has done all work before it.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class FixedShape:
    """Shapes that batches are padded to, so that few graphs are compiled and none too often.

    Args:
        rows: Numbers of rows that are not padded, ascending; a batch of fewer takes the next.
        length: Tokens of every row.
        longest: What a longer row is padded to.
        multiple: Where rows are not packed: their length is rounded up to a multiple of this, in
            place of `length` for all. Graphs then have a length of any such size.
    """

    rows: tuple[int, ...]
    length: int
    longest: int
    multiple: int = 0

    @classmethod
    def of_run(cls, batch: int, micro: int, sets: Sequence[PackedSet | None]) -> FixedShape | None:
        """Returns the shapes of a run, or None where it has no rows.

        Args:
            batch: Rows of an update.
            micro: Rows of a forward.
            sets: Training and held-out rows.
        """
        there = [data for data in sets if data is not None and data.rows]
        if not there:
            return None
        sizes = {min(batch, micro), batch % micro} - {0}
        most = max(data.max_length for data in there)
        if not all(data.packed for data in there):
            longest = max(len(document) for data in there for document in data.documents)
            return cls(tuple(sorted(sizes)), _up(longest, MULTIPLE, most), most, MULTIPLE)
        # Packs are made longest document first, so the first ones are among the fullest.
        longest = 0
        for data in there:
            first = data.micro_batch(range(min(data.rows, _LOOKED_AT)), 0, 0)
            longest = max(longest, first.input_ids.shape[1])
        return cls(tuple(sorted(sizes)), longest, most)

    def of(self, batch: MicroBatch) -> tuple[int, int]:
        """Returns rows and length of the forward of a batch; a larger batch stays as it is."""
        rows, length = batch.input_ids.shape
        if self.multiple:
            fitting = _up(length, self.multiple, self.longest)
        else:
            fitting = self.length if length <= self.length else max(length, self.longest)
        return next((size for size in self.rows if size >= rows), rows), fitting


def _up(length: int, multiple: int, most: int) -> int:
    """Rounds up, but not above what a row may have."""
    return max(length, min(-(-length // multiple) * multiple, most))


@dataclass(frozen=True)
class Inputs:
    """The inputs of a forward, on the host.

    Args:
        input_ids: int64 [R, L].
        position_ids: int64 [R, L].
        attention_mask: int64 [R, L]; 1 on tokens.
        bounds: See `MicroBatch`.
        trained: int64 [N]; places with a target, in the flattened [R * L].
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    bounds: tuple[tuple[int, ...], ...]
    trained: NDArray[np.int64]

    @property
    def rows(self) -> int:
        """R, padding included."""
        return int(self.input_ids.shape[0])


def inputs_of(batch: MicroBatch, shape: FixedShape | None = None) -> Inputs:
    """Returns a batch's inputs, padded to a shape; padding is never trained nor seen.

    Args:
        batch: The rows.
        shape: None leaves them as they are.
    """
    at_row, at_place = np.nonzero(batch.targets != IGNORED)
    old_rows, old_length = batch.input_ids.shape
    rows, length = (old_rows, old_length) if shape is None else shape.of(batch)
    trained = (at_row * length + at_place).astype(np.int64)
    mask = batch.attention_mask
    if (rows, length) == (old_rows, old_length):
        return Inputs(batch.input_ids, batch.position_ids, mask, batch.bounds, trained)
    ids = np.zeros((rows, length), dtype=np.int64)
    places = np.tile(np.arange(length, dtype=np.int64), (rows, 1))
    places[:old_rows, old_length:] -= old_length  # a document of its own
    wide = np.zeros((rows, length), dtype=np.int64)
    ids[:old_rows, :old_length] = batch.input_ids
    places[:old_rows, :old_length] = batch.position_ids
    wide[:old_rows, :old_length] = mask
    bounds = [
        (*row, length) if old_length < length else row for row in batch.bounds
    ] + [(0, length)] * (rows - old_rows)  # fmt: skip
    return Inputs(ids, places, wide, tuple(bounds), trained)
