"""Which documents share a row: best fit, longest first.

What needs a number for each document is written to disk in parts (see `scratch`), so a million
documents are packed in seconds and in a few megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from glasstune.core.batch import IntArray
from glasstune.data.scratch import BLOCK, Numbers, Parts, blocks, part_size

_SORTED = [("size", "<i4"), ("raw", "<u8"), ("index", "<i4")]
_CHOSEN = [("pack", "<i4"), ("index", "<i4")]


def _raw(*keys: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence(list(keys)))


def shuffled(count: int, *keys: int) -> NDArray[np.int64]:
    """Returns a permutation of range(count): a pure function of its arguments.

    It sorts the raw output of PCG64, which NumPy promises never to change (unlike its own
    permutation method).

    Args:
        count: How many.
        keys: Non-negative integers that seed it.
    """
    raw = np.asarray(_raw(*keys).random_raw(count), dtype=np.uint64)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)


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
        members, ends = Numbers(np.int32), Numbers(np.int64)
        for start in range(0, count, BLOCK):
            members.add(np.arange(start, min(start + BLOCK, count)))
        for start in range(0, count + 1, BLOCK):
            ends.add(np.arange(start, min(start + BLOCK, count + 1)))
        return cls(members.whole(), ends.whole())

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
    """Packs documents whose lengths are in memory; see `pack_blocks`."""
    sizes = np.asarray(lengths, dtype=np.int32)
    return pack_blocks(lambda: blocks(sizes), max_length, seed)


def pack_blocks(lengths: Callable[[], Iterable[IntArray]], max_length: int, seed: int) -> PackTable:
    """Puts documents into packs: best fit, longest first, equal lengths in a seeded order.

    Args:
        lengths: Gives the tokens of all documents, block by block, as often as it is called;
            none above max_length.
        max_length: Tokens that a pack holds.
        seed: Seed of the order among equal lengths.

    Returns:
        Document indices of each pack; each document is in exactly one.

    Raises:
        InputError: The cache folder cannot be written.
        RunError: The disk is full.
    """
    counts = np.zeros(max_length + 1, dtype=np.int64)
    seen = 0
    for block in lengths():
        if len(block) and int(block.max()) > max_length:
            worst = int(block.argmax())
            raise ValueError(
                f"document {seen + worst} has {block[worst]} tokens, a pack holds {max_length}"
            )
        counts += np.bincount(block, minlength=max_length + 1)
        seen += len(block)
    chosen, ends = _fit(_longest_first(lengths(), counts, seed), counts, max_length)
    return _grouped(chosen, ends)


def _longest_first(
    lengths: Iterable[IntArray], counts: NDArray[np.int64], seed: int
) -> Iterator[NDArray[np.void]]:
    """Yields all documents as `_SORTED`: longest first, equal ones in the seeded order.

    Args:
        lengths: Tokens of all documents.
        counts: Documents of each length.
        seed: Of the order.
    """
    most = part_size(int(counts.sum()))
    first, bits = np.zeros(len(counts), dtype=np.int64), np.zeros(len(counts), dtype=np.uint64)
    number = held = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        count = int(counts[size])
        if held and held + count > most:
            number, held = number + 1, 0
        first[size] = number
        held += count
        if count > most:  # one length, divided by the first bits of what orders it
            bits[size] = (-(-count // most) - 1).bit_length()
            number, held = number + (1 << int(bits[size])), 0
    parts = Parts(number + 1, _SORTED)
    order, start = _raw(seed, 1), 0
    for block in lengths:
        records = np.zeros(len(block), dtype=_SORTED)
        records["size"] = block
        records["raw"] = order.random_raw(len(block))
        records["index"] = np.arange(start, start + len(block))
        start += len(block)
        # A shift by all 64 bits is undefined, so it is made in two.
        within = (records["raw"] >> np.uint64(1)) >> (np.uint64(63) - bits[block])
        parts.add(first[block] + within.astype(np.int64), records)
    for part in range(len(parts)):
        found = parts.part(part)
        yield found[np.lexsort((found["raw"], -found["size"]))]


def _fit(
    documents: Iterable[NDArray[np.void]], counts: NDArray[np.int64], max_length: int
) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """Chooses a pack for each document.

    Returns:
        The documents as `_CHOSEN`, as they came, and where each pack's documents end.
    """
    stream = Numbers(_CHOSEN)
    smallest = int(np.flatnonzero(counts)[0]) if counts.any() else 0
    sizes_of_packs = np.zeros(0, dtype=np.int32)
    packs = 0
    # open_packs[room] are packs with that much room; bit `room` of `rooms` says there is one.
    open_packs: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0
    for block in documents:
        chosen: list[int] = []
        for size in block["size"].tolist():
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
            if left >= smallest:  # else nothing fits there any more
                open_packs[left].append(pack)
                rooms |= 1 << left
        records = np.zeros(len(block), dtype=_CHOSEN)
        records["pack"], records["index"] = chosen, block["index"]
        stream.add(records)
        sizes_of_packs = np.pad(sizes_of_packs, (0, packs - len(sizes_of_packs)))
        np.add.at(sizes_of_packs, records["pack"], 1)
    ends = Numbers(np.int64)
    total = 0
    ends.add(np.zeros(1, dtype=np.int64))
    for some in blocks(sizes_of_packs):
        found = np.cumsum(some, dtype=np.int64) + total
        ends.add(found)
        total = int(found[-1])
    return stream.whole(), ends.whole()


def _grouped(chosen: NDArray[np.void], ends: NDArray[np.int64]) -> PackTable:
    """Sorts documents by pack; inside a pack they stay in the order in which they were put in."""
    most = part_size(len(chosen))
    parts = Parts(len(chosen) // most + 1, _CHOSEN)
    for block in blocks(chosen):
        parts.add(ends[block["pack"]] // most, block)
    members = Numbers(np.int32)
    for part in range(len(parts)):
        found = parts.part(part)
        members.add(found["index"][np.argsort(found["pack"], kind="stable")])
    return PackTable(members.whole(), ends)
