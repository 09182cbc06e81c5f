"""All documents of a data set, wherever their tokens lie."""

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
from glasstune.data.scratch import blocks, gathered
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
    """Shards of all sources, source by source.

    Args:
        pieces: The shards.
        leases: Whatever keeps their files from being removed.
    """

    def __init__(self, pieces: Sequence[Piece], leases: Sequence[object] = ()) -> None:
        self.pieces = tuple(pieces)
        self.leases = tuple(leases)
        self.starts = np.zeros(len(self.pieces) + 1, dtype=np.int64)
        np.cumsum([piece.rows for piece in self.pieces], out=self.starts[1:])
        self.sources = np.asarray([piece.source for piece in self.pieces], dtype=np.int16)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def walk(self) -> Iterator[tuple[int, Shard]]:
        """Yields every shard once, one mapped at a time."""
        for number, piece in enumerate(self.pieces):
            yield number, piece.open()

    def key_blocks(self) -> Iterator[NDArray[np.uint64]]:
        """Yields the text keys of all rows in order."""
        return gathered(shard.keys() for _, shard in self.walk())

    def bounds(self, source: int) -> tuple[int, int]:
        """Returns the first row of a source, and the one behind its last."""
        first, last = np.searchsorted(self.sources, [source, source + 1])
        return int(self.starts[first]), int(self.starts[last])

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
    def trained_tokens(self) -> int:
        """Trained tokens of all."""
        return sum(int(s.trained[at].sum(dtype=np.int64)) for _, s, at in self._shards())

    def source_blocks(self) -> Iterator[NDArray[np.int16]]:
        """Yields the source index of each, in order."""
        for block in blocks(self.rows):
            yield self.store.sources[self._numbers(block)]

    def length_blocks(self) -> Iterator[IntArray]:
        """Yields the tokens of each, int32, in order."""
        return gathered(shard.ids.lengths()[at] for _, shard, at in self._shards())

    def runs(self) -> Iterator[tuple[Shard, int, int]]:
        """Yields (shard, first, last + 1) of rows that follow each other there, in order."""
        held: tuple[int, Shard, int, int] | None = None
        for number, shard, places in self._shards():
            edges = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
            for start, stop in pairwise(edges):
                first, last = int(places[start]), int(places[stop - 1]) + 1
                if held is not None and (held[0], held[3]) == (number, first):
                    held = (*held[:3], last)  # a block ended inside the run
                    continue
                if held is not None:
                    yield held[1:]
                held = number, shard, first, last
        if held is not None:
            yield held[1:]

    def _numbers(self, rows: IntArray) -> NDArray[np.int64]:
        """Returns the shard of each row."""
        return np.searchsorted(self.store.starts, rows, side="right") - 1

    def _shards(self) -> Iterator[tuple[int, Shard, NDArray[np.int64]]]:
        """Yields (number, shard, places in it) of rows that lie in one shard, in order."""
        held, shard = -1, None
        for block in blocks(self.rows):
            numbers = self._numbers(block)
            edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(block)]
            for start, stop in pairwise(edges):
                number = int(numbers[start])
                if shard is None or number != held:
                    held, shard = number, self.store.pieces[number].open()
                yield number, shard, block[start:stop] - self.store.starts[number]


def length_blocks(documents: Sequence[Document]) -> Iterator[IntArray]:
    """Yields the tokens of each document, int32, in order."""
    if isinstance(documents, StoredDocuments):
        return documents.length_blocks()
    return blocks(np.asarray([len(document) for document in documents], dtype=np.int32))
