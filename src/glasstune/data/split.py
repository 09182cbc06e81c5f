"""Which texts are the same, which are held out, and how often a source's rows appear.

Two rows are the same text when all their texts are equal after Unicode NFKC, case folding and
joining runs of white space. Held-out texts are chosen by a hash of seed and text, so the choice
does not depend on the order of the rows, and all rows of one text go to the same side.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glasstune.core.batch import IntArray
from glasstune.data.packs import shuffled
from glasstune.data.scratch import Parts, part_size

_RECORD = [("key", "<u8"), ("row", "<i4")]
TRAINED, HELD_OUT, LEFT_OUT = range(3)
"""Where a row goes."""

Sides = NDArray[np.uint8]
"""One of the three for each row."""


def text_key(texts: Sequence[str]) -> bytes:
    """Returns 16 bytes that are equal for equal normalised texts."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
        plain = " ".join(folded.split())
        digest.update(plain.encode("utf-8", "surrogatepass") + b"\x00")
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Part:
    """All rows of some texts.

    Args:
        keys: A number for each row that is equal for equal texts, ascending.
        rows: The rows; those of one text ascend.
    """

    keys: NDArray[np.uint64]
    rows: IntArray

    def of(self, sides: Sides, side: int) -> Part:
        """Returns those on one side."""
        chosen = sides[self.rows] == side
        return Part(self.keys[chosen], self.rows[chosen])

    def firsts(self) -> NDArray[np.bool_]:
        """Tells of each row whether it is the first of its text."""
        first = np.ones(len(self.keys), dtype=bool)
        first[1:] = self.keys[1:] != self.keys[:-1]
        return first


class Texts:
    """The rows of a data set by what their texts say, some texts at a time.

    A row's text is known by 8 bytes of its key: two of a million texts agree once in 30 million
    times. They are mixed with the seed, and the parts follow each other by the mixed numbers, so
    the first texts are a choice by chance.

    Args:
        keys: Text keys of all rows, block by block.
        count: How many there are.
        seed: Seed of the choice.

    Raises:
        InputError: The cache folder cannot be written.
        RunError: The disk is full.
    """

    def __init__(self, keys: Iterable[NDArray[np.uint64]], count: int, seed: int) -> None:
        bits = (-(-count // part_size(count)) - 1).bit_length() if count else 0
        self._parts = Parts(1 << bits, _RECORD)
        start = 0
        for block in keys:
            records = np.zeros(len(block), dtype=_RECORD)
            records["key"] = _mixed(block, seed)
            records["row"] = np.arange(start, start + len(block))
            start += len(block)
            # A shift by all 64 bits is undefined, so it is made in two.
            part = (records["key"] >> np.uint64(1)) >> np.uint64(63 - bits)
            self._parts.add(part.astype(np.int64), records)

    def __iter__(self) -> Iterator[Part]:
        for number in range(len(self._parts)):
            found = self._parts.part(number)
            order = np.argsort(found["key"], kind="stable")
            yield Part(found["key"][order], found["row"][order])


def hold_out(texts: Texts, sides: Sides, share: float) -> None:
    """Chooses the texts that are held out, and marks their rows.

    Args:
        texts: All texts.
        sides: Of each row; trained ones may become held out.
        share: Part of the different texts of trained rows, below 1: at least one text where it is
            above 0 and there are two or more, and never all.
    """
    if share <= 0:
        return
    different = sum(int(part.of(sides, TRAINED).firsts().sum()) for part in texts)
    if different < 2:
        return
    left = min(max(1, round(share * different)), different - 1)
    for part in texts:
        own = part.of(sides, TRAINED)
        number = np.cumsum(own.firsts())  # of each row's text, from 1
        sides[own.rows[number <= left]] = HELD_OUT
        left -= int(number[-1]) if len(number) else 0
        if left <= 0:
            return


def _mixed(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Mixes the bits of each key and the seed (the finaliser of SplitMix64), one to one."""
    salt = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    mixed: NDArray[np.uint64] = keys ^ salt
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def repeated(count: int, repeat: float, seed: int, source: int) -> IntArray:
    """Returns row indices so that a source's rows appear `repeat` times in an epoch.

    Whole repetitions take every row; what is left of `repeat` takes a fixed part, chosen by seed.
    """
    whole = int(repeat)
    part = round((repeat - whole) * count)
    every = [np.arange(count, dtype=np.int32)] * whole
    extra = [np.sort(shuffled(count, seed, 3, source)[:part]).astype(np.int32)] if part else []
    return np.concatenate([np.zeros(0, dtype=np.int32), *every, *extra])
