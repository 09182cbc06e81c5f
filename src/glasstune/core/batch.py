"""Documents and batches: what data hands to training. NumPy only, so that no torch is imported.

Shape letters: R rows of a micro-batch, L tokens of a row, T tokens of a document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
"""Label of a position that is not trained (torch's `ignore_index`)."""

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Document:
    """One training example after the tokenizer.

    Args:
        ids: Token ids, int32 [T].
        labels: For each token the value trained at it, int32 [T]: usually its own id, -100 where
            it is context, and sometimes another id (Baichuan2 labels the human marker with the
            end token). Not shifted: the label at position t is what position t-1 must predict.
        source: Index of the data source.
        origin: `file:line` (or `file[row]`) that the row came from.
        columns: Extra values of the row that a loss function asked for.
    """

    ids: IntArray
    labels: IntArray
    source: int = 0
    origin: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """Number of labels that reach the loss (the first position is never predicted)."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model in one forward.

    Args:
        input_ids: int64 [R, L].
        position_ids: int64 [R, L]; restart at 0 with each document.
        targets: int64 [R, L]; the id that each position must predict, -100 = none. Already
            shifted inside each document, so no document predicts the next one's first token.
        document_ids: int32 [R, L]; index into `documents`, -1 on padding.
        bounds: Per row the cumulative ends of its documents, starting with 0; where the row is
            padded the padding is one last segment, so the last value is always L.
        documents: The documents in order of their index.
        position: Global position in the epoch of the first row; seeds dropout.
        packed: Whether rows may hold several documents. If not, each row is one document and
            `attention_mask` marks its tokens.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    document_ids: IntArray
    bounds: tuple[tuple[int, ...], ...]
    documents: tuple[Document, ...]
    position: int
    packed: bool

    @property
    def attention_mask(self) -> NDArray[np.int64]:
        """1 on tokens, 0 on padding; int64 [R, L]."""
        return (self.document_ids >= 0).astype(np.int64)

    @property
    def tokens(self) -> int:
        """Number of real tokens (padding not counted)."""
        return int((self.document_ids >= 0).sum())

    @property
    def trained_tokens(self) -> int:
        """Number of positions that have a target."""
        return int((self.targets != IGNORED).sum())
