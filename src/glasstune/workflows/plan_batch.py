"""The largest batch of a run: what is planned for, and what `--measure` runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from glasstune.core.batch import MicroBatch
from glasstune.data.documents import length_blocks
from glasstune.data.packing import PackedSet
from glasstune.kernels.document_attention.op import SHORT

if TYPE_CHECKING:
    from glasstune.planner.trace import Batch

_LOOKED_AT = 256
"""Packs that are looked at: they are made longest first, so the first are among the fullest."""


def longest_rows(data: PackedSet, count: int) -> list[int]:
    """Returns the numbers of the longest rows, longest first.

    Args:
        data: A packed set, or one of single documents.
        count: How many.
    """
    if data.packed:
        looked = range(min(data.rows, max(count, _LOOKED_AT)))
        sizes = [_tokens(data, row) for row in looked]
    else:
        sizes = [int(size) for block in length_blocks(data.documents) for size in block]
    order = np.argsort(-np.asarray(sizes), kind="stable")
    return [int(row) for row in order[: max(1, count)]]


def largest_batch(data: PackedSet, rows: int, pad_id: int) -> MicroBatch:
    """Returns the batch of the longest rows."""
    return data.micro_batch(longest_rows(data, min(rows, data.rows)), 0, pad_id)


def shape_of(
    sets: Sequence[PackedSet | None], rows: int, pad_id: int, *, documents: bool, mask: bool
) -> Batch:
    """Returns the shape that no batch of a run exceeds.

    Args:
        sets: Training and held-out rows.
        rows: Rows of a forward.
        pad_id: Padding token.
        documents: Whether attention runs over each document.
        mask: Whether packed documents are kept apart by a mask.
    """
    from glasstune.planner.trace import Batch

    batches = [largest_batch(data, rows, pad_id) for data in sets if data is not None and data.rows]
    longest = max(batches, key=lambda batch: batch.input_ids.size)
    return Batch(
        rows=max(batch.input_ids.shape[0] for batch in batches),
        length=max(batch.input_ids.shape[1] for batch in batches),
        trained=max(1, *(batch.trained_tokens for batch in batches)),
        masked=longest.packed and mask,
        bounds=tuple(map(_joined, longest.bounds)) if documents and longest.packed else None,
    )


def _joined(ends: tuple[int, ...]) -> tuple[int, ...]:
    """Joins neighbouring short documents: they keep the same, and are sooner traced as one."""
    found = [0]
    for before, end in pairwise(ends):
        if len(found) > 1 and end - found[-2] <= SHORT and before == found[-1]:
            found[-1] = end
        else:
            found.append(end)
    return tuple(found)


def _tokens(data: PackedSet, row: int) -> int:
    return sum(len(data.documents[k]) for k in data.packs[row].tolist())
