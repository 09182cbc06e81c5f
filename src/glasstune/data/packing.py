"""Documents to packs, and packs to micro-batches.

Packs depend on documents, maximal length and seed alone; an epoch only changes their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glasstune.core.batch import IGNORED, Document, IntArray, MicroBatch
from glasstune.data.documents import StoredDocuments, length_blocks
from glasstune.data.packs import PackTable, pack_blocks, shuffled

_ROUND = 8
"""Rows are padded to a multiple of this, so that few row lengths occur."""


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
            packs = pack_blocks(lambda: length_blocks(documents), max_length, seed)
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
        return sum(int(block.sum(dtype=np.int64)) for block in length_blocks(self.documents))

    @property
    def trained_tokens(self) -> int:
        """Labels of all documents that reach the loss."""
        if isinstance(self.documents, StoredDocuments):
            return self.documents.trained_tokens
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
