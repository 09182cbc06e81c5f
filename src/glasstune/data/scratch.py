"""Numbers of all rows: in memory while they are few, then in a file that has no name.

Sorting a million rows by text or by length would take tens of bytes a row in memory. Here they are
sorted into parts first, and one part is in memory at a time.
"""

from __future__ import annotations

import contextlib
import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from glasstune.core.files import cache_folder
from glasstune.data.errors import writing

BLOCK = 1 << 16
"""Rows that are worked on at a time."""
PART = 1 << 17
"""Rows of a part, as far as they can be divided so."""
MOST_PARTS = 64
"""Parts at most; from eight million rows on they are larger instead."""
IN_MEMORY = 1 << 20
"""Bytes that are not worth a file."""

Array = NDArray[Any]


def part_size(count: int) -> int:
    """Returns how many of some rows a part shall hold."""
    return max(PART, -(-count // MOST_PARTS))


def blocks(values: Array) -> Iterator[Array]:
    """Yields an array in blocks; of a mapped one only the block that is read stays in memory."""
    for start in range(0, len(values), BLOCK):
        yield values[start : start + BLOCK]
        if isinstance(values, np.memmap):
            values._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def gathered(pieces: Iterable[Array]) -> Iterator[Array]:
    """Joins small arrays to some of about a block each."""
    held: list[Array] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= BLOCK:
            yield np.concatenate(held)
            held, size = [], 0
    if held:
        yield np.concatenate(held)


class _Bytes:
    """Bytes that are only appended to, and read at any place."""

    def __init__(self) -> None:
        self.size = 0
        self._memory = bytearray()
        self._file: IO[bytes] | None = None

    def append(self, values: Array) -> tuple[int, int]:
        """Returns where they lie: offset and size.

        Raises:
            InputError: The cache folder cannot be written.
            RunError: The disk is full.
        """
        raw = np.ascontiguousarray(values).view(np.uint8).data
        place = self.size, len(raw)
        self.size += len(raw)
        if self._file is None and self.size <= IN_MEMORY:
            self._memory += raw
            return place
        folder = cache_folder() / "data"
        with writing(folder):
            if self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives on
                weakref.finalize(self, self._file.close)
                self._file.write(self._memory)
                self._memory = bytearray()
            self._file.write(raw)
        return place

    def read(self, offset: int, size: int) -> bytes:
        """Returns bytes at a place."""
        if self._file is None:
            return bytes(self._memory[offset : offset + size])
        self._file.seek(offset)
        found = self._file.read(size)
        self._file.seek(0, 2)
        return found

    def whole(self, dtype: np.dtype[Any]) -> Array:
        """Returns all of them as an array; one of a file is mapped, so nothing is read yet."""
        if self._file is None:
            return np.frombuffer(bytes(self._memory), dtype=dtype)
        with writing(cache_folder() / "data"), contextlib.closing(self._file) as file:
            file.flush()
            return np.memmap(file, dtype=dtype, mode="r")


class Numbers:
    """A long array that is written once, from its start to its end.

    Args:
        dtype: Of its elements.
    """

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._bytes = _Bytes()

    def add(self, values: Array) -> None:
        """Appends some.

        Raises:
            InputError: The cache folder cannot be written.
            RunError: The disk is full.
        """
        self._bytes.append(values.astype(self.dtype, copy=False))

    def whole(self) -> Array:
        """Returns the array, read-only; nothing can be added any more."""
        return self._bytes.whole(self.dtype)


class Parts:
    """Records sorted into numbered parts.

    Args:
        count: How many parts.
        dtype: Of a record.
    """

    def __init__(self, count: int, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._places: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        self._bytes = _Bytes()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, part: Array, records: Array) -> None:
        """Adds some records.

        Args:
            part: The part of each.
            records: As many.

        Raises:
            InputError: The cache folder cannot be written.
            RunError: The disk is full.
        """
        order = np.argsort(part, kind="stable")
        ordered = part[order]
        edges = [0, *(np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist(), len(order)]
        for start, stop in pairwise(edges):
            if start < stop:
                place = self._bytes.append(records[order[start:stop]])
                self._places[int(ordered[start])].append(place)

    def part(self, number: int) -> Array:
        """Returns the records of a part in the order in which they were added."""
        found = [self._bytes.read(*place) for place in self._places[number]]
        return np.frombuffer(b"".join(found), dtype=self.dtype)
