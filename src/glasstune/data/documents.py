"""All documents of a data set, wherever their tokens lie: a few bytes a row in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

from glasstune.core.batch import Document, IntArray
from glasstune.data.shards import Shard

_OPEN = 256
"""Shards that stay mapped; more would come near the usual limit of open files."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A shard of a source.

    Args:
        source: Index of the source.
        rows: Its rows.
        open: Gives the shard.
    """

    source: int
    rows: int
    open: Callable[[], Shard]


class Store:
    """Shards of all sources in order, with the numbers that every row needs in memory.

    Args:
        pieces: The shards.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        self.starts = np.zeros(len(self.pieces) + 1, dtype=np.int64)
        np.cumsum([piece.rows for piece in self.pieces], out=self.starts[1:])
        total = int(self.starts[-1])
        self.lengths = np.zeros(total, dtype=np.int32)
        self.trained = np.zeros(total, dtype=np.int32)
        self.sources = np.zeros(total, dtype=np.int16)
        for number, shard in self.walk():
            rows = slice(self.starts[number], self.starts[number + 1])
            self.lengths[rows] = shard.ids.lengths()
            self.trained[rows] = shard.trained
            self.sources[rows] = self.pieces[number].source
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def walk(self) -> Iterator[tuple[int, Shard]]:
        """Yields every shard once, one mapped at a time."""
        for number, piece in enumerate(self.pieces):
            yield number, piece.open()

    def keys(self) -> NDArray[np.uint64]:
        """Returns the text keys of all rows."""
        keys = np.zeros(len(self), dtype=np.uint64)
        for number, shard in self.walk():
            keys[self.starts[number] : self.starts[number + 1]] = shard.keys()
        return keys

    def place(self, row: int) -> tuple[int, int]:
        """Returns the shard of a row and its place there."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, row - int(self.starts[number])

    def shard(self, number: int) -> Shard:
        """Returns a shard, mapped from now on or since its last use."""
        with self._lock:
            shard = self._open.pop(number, None) or self.pieces[number].open()
            self._open[number] = shard
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return shard

    def document(self, row: int) -> Document:
        """Returns a row."""
        number, at = self.place(row)
        return self.shard(number).document(at, self.pieces[number].source)

    def origin(self, row: int) -> str:
        """Returns where a row came from."""
        number, at = self.place(row)
        return self.shard(number).origin(at)


class StoredDocuments(Sequence[Document]):
    """A choice of a store's rows, in an order of its own; a document is built when asked for.

    Args:
        store: The store.
        rows: Their numbers in it.
    """

    def __init__(self, store: Store, rows: IntArray) -> None:
        self.store = store
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        """Returns a document, or a list of those in a slice."""
        if isinstance(index, slice):
            return [self.store.document(int(row)) for row in self.rows[index]]
        return self.store.document(int(self.rows[index]))

    @property
    def lengths(self) -> IntArray:
        """Tokens of each, int32."""
        return self.store.lengths[self.rows]

    @property
    def trained(self) -> IntArray:
        """Trained tokens of each, int32."""
        return self.store.trained[self.rows]

    @property
    def sources(self) -> NDArray[np.int16]:
        """Source index of each."""
        return self.store.sources[self.rows]

    def runs(self) -> Iterator[tuple[Shard, int, int]]:
        """Yields (shard, first, last + 1) of rows that follow each other there, in order."""
        if not len(self.rows):
            return
        inner = self.store.starts[1:-1]
        breaks = np.diff(self.rows) != 1
        if len(inner):
            breaks |= np.diff(np.searchsorted(inner, self.rows, side="right")) != 0
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(self.rows)]
        held, shard = -1, None
        for start, stop in pairwise(edges):
            number, at = self.store.place(int(self.rows[start]))
            if shard is None or number != held:
                held, shard = number, self.store.pieces[number].open()
            yield shard, at, at + stop - start


def lengths_of(documents: Sequence[Document]) -> IntArray:
    """Returns the tokens of each document, int32."""
    if isinstance(documents, StoredDocuments):
        return documents.lengths
    return np.asarray([len(document) for document in documents], dtype=np.int32)
