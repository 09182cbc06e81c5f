"""Documents to packs, and packs to micro-batches.

Packs depend on documents, maximal length and seed alone; an epoch only changes their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from glasstune.core.batch import IGNORED, Document, IntArray, MicroBatch
from glasstune.data.documents import StoredDocuments, lengths_of

_ROUND = 8
"""Rows are padded to a multiple of this, so that few row lengths occur."""
_BLOCK = 1 << 16
"""Documents that are packed from one list of Python numbers."""


def shuffled(count: int, *keys: int) -> NDArray[np.int64]:
    """Returns a permutation of range(count): a pure function of its arguments.

    It sorts the raw output of PCG64, which NumPy promises never to change (unlike its own
    permutation method).

    Args:
        count: How many.
        keys: Non-negative integers that seed it.
    """
    raw = np.random.PCG64(np.random.SeedSequence(list(keys))).random_raw(count)
    return np.argsort(np.asarray(raw, dtype=np.uint64), kind="stable").astype(np.int64)


class PackTable(Sequence[IntArray]):
    """Which documents each row holds, as two arrays.

    Args:
        members: Document indices of all rows, one row after the other, int32.
        ends: Where each row's members end, starting with 0, int64 [rows + 1].
    """

    def __init__(self, members: IntArray, ends: NDArray[np.int64]) -> None:
        self.members = members
        self.ends = ends

    @classmethod
    def singles(cls, count: int) -> PackTable:
        """Returns rows of one document each."""
        return cls(np.arange(count, dtype=np.int32), np.arange(count + 1, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> IntArray: ...
    @overload
    def __getitem__(self, index: slice) -> list[IntArray]: ...
    def __getitem__(self, index: int | slice) -> IntArray | list[IntArray]:
        """Returns the documents of a row."""
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(index)
        return self.members[self.ends[row] : self.ends[row + 1]]


def pack_documents(lengths: Sequence[int] | IntArray, max_length: int, seed: int) -> PackTable:
    """Puts documents into packs: best fit, longest first, equal lengths in a seeded order.

    A million documents take seconds: the packs are kept by the room they have left.

    Args:
        lengths: Tokens of each document, none above max_length.
        max_length: Tokens that a pack holds.
        seed: Seed of the order among equal lengths.

    Returns:
        Document indices of each pack; each document is in exactly one.
    """
    sizes = np.asarray(lengths, dtype=np.int32)
    if len(sizes) and int(sizes.max()) > max_length:
        worst = int(sizes.argmax())
        raise ValueError(f"document {worst} has {sizes[worst]} tokens, a pack holds {max_length}")
    order = shuffled(len(sizes), seed, 1).astype(np.int32)
    order = order[np.argsort(-sizes[order], kind="stable")]
    pack_of = np.empty(len(sizes), dtype=np.int32)  # of the documents as `order` has them
    packs = 0
    # open_packs[room] are packs with that much room; bit `room` of `rooms` says there is one.
    open_packs: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0
    for start in range(0, len(order), _BLOCK):
        block = sizes[order[start : start + _BLOCK]].tolist()
        chosen: list[int] = []
        for size in block:
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                pack = open_packs[room].pop()
                if not open_packs[room]:
                    rooms &= ~(1 << room)
            else:
                room, pack = max_length, packs
                packs += 1
            chosen.append(pack)
            left = room - size
            open_packs[left].append(pack)
            rooms |= 1 << left
        pack_of[start : start + len(block)] = chosen
    ends = np.zeros(packs + 1, dtype=np.int64)
    np.cumsum(np.bincount(pack_of, minlength=packs), out=ends[1:])
    return PackTable(order[np.argsort(pack_of, kind="stable")], ends)


@dataclass(frozen=True)
class PackedSet:
    """A data set ready to train: documents and the rows that they form.

    Args:
        documents: All documents.
        packs: Document indices of each row; one document a row where not packed.
        packed: Whether rows may hold several documents.
        max_length: Longest row in tokens.
    """

    documents: Sequence[Document]
    packs: Sequence[IntArray]
    packed: bool
    max_length: int

    @classmethod
    def build(
        cls, documents: Sequence[Document], *, max_length: int, packed: bool, seed: int
    ) -> PackedSet:
        """Packs documents, or gives each its own row."""
        if packed:
            packs = pack_documents(lengths_of(documents), max_length, seed)
        else:
            packs = PackTable.singles(len(documents))
        return cls(documents, packs, packed, max_length)

    @property
    def rows(self) -> int:
        """Number of packs, or of documents where not packed."""
        return len(self.packs)

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(lengths_of(self.documents).sum(dtype=np.int64))

    @property
    def trained_tokens(self) -> int:
        """Labels of all documents that reach the loss."""
        if isinstance(self.documents, StoredDocuments):
            return int(self.documents.trained.sum(dtype=np.int64))
        return sum(document.trained_tokens for document in self.documents)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Returns the order of the packs in an epoch: a pure function of (seed, epoch)."""
        return shuffled(self.rows, seed, 2, epoch)

    def micro_batch(self, packs: Sequence[int], position: int, pad_id: int) -> MicroBatch:
        """Builds the batch of some packs.

        Args:
            packs: Their indices, one a row.
            position: Global position of the first in the epoch.
            pad_id: Any token id; it stands where `document_ids` is -1.

        Returns:
            Rows padded to the longest, rounded up to a multiple of 8 where max_length allows.
        """
        rows = [[self.documents[k] for k in self.packs[pack].tolist()] for pack in packs]
        longest = max(sum(len(document) for document in row) for row in rows)
        length = max(longest, min(-(-longest // _ROUND) * _ROUND, self.max_length))
        shape = (len(rows), length)
        input_ids = np.full(shape, pad_id, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        document_ids = np.full(shape, -1, dtype=np.int32)
        documents: list[Document] = []
        bounds: list[tuple[int, ...]] = []
        for number, row in enumerate(rows):
            ends = [0]
            for document in row:
                start, end = ends[-1], ends[-1] + len(document)
                input_ids[number, start:end] = document.ids
                position_ids[number, start:end] = np.arange(len(document))
                targets[number, start : end - 1] = document.labels[1:]
                document_ids[number, start:end] = len(documents)
                documents.append(document)
                ends.append(end)
            if ends[-1] < length:
                position_ids[number, ends[-1] :] = np.arange(length - ends[-1])
                ends.append(length)
            bounds.append(tuple(ends))
        return MicroBatch(
            input_ids=input_ids,
            position_ids=position_ids,
            targets=targets,
            document_ids=document_ids,
            bounds=tuple(bounds),
            documents=tuple(documents),
            position=position,
            packed=self.packed,
        )
