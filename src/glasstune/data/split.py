"""Which texts are the same, which are held out, and how often a source's rows appear.

Two rows are the same text when all their texts are equal after Unicode NFKC, case folding and
joining runs of white space. Held-out texts are chosen by a hash of seed and text, so the choice
does not depend on the order of the rows, and all rows of one text go to the same side.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from glasstune.core.batch import IntArray
from glasstune.data.packing import shuffled

_BLOCK = 1 << 16


def text_key(texts: Sequence[str]) -> bytes:
    """Returns 16 bytes that are equal for equal normalised texts."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
        plain = " ".join(folded.split())
        digest.update(plain.encode("utf-8", "surrogatepass") + b"\x00")
    return digest.digest()


def held_out(keys: NDArray[np.uint64], share: float, seed: int) -> NDArray[np.bool_]:
    """Chooses the texts that are held out.

    Args:
        keys: Text keys of all rows.
        share: Part of the different texts, below 1.
        seed: Seed of the choice.

    Returns:
        Per row whether its text is held out: at least one text where share is above 0 and there
        are two or more, and never all.
    """
    # One to one, so rows share a rank as they share a text. Sorting in place needs 8 bytes a row,
    # np.unique's table 50.
    ordered = _mixed(keys, seed)
    ordered.sort()
    new = ordered[1:] != ordered[:-1]
    different = int(new.sum()) + min(len(keys), 1)
    if share <= 0 or different < 2:
        return np.zeros(len(keys), dtype=bool)
    count = min(max(1, round(share * different)), different - 1)
    last = int(np.searchsorted(np.cumsum(new, dtype=np.int32), count - 1)) + 1 if count > 1 else 0
    highest = ordered[last]
    del ordered, new
    chosen: NDArray[np.bool_] = _mixed(keys, seed) <= highest
    return chosen


def _mixed(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Mixes the bits of each key and the seed (the finaliser of SplitMix64), one to one."""
    salt = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    mixed = keys ^ salt
    for start in range(0, len(mixed), _BLOCK):  # few temporary numbers at a time
        part = mixed[start : start + _BLOCK]
        part ^= part >> np.uint64(30)
        part *= np.uint64(0xBF58476D1CE4E5B9)
        part ^= part >> np.uint64(27)
        part *= np.uint64(0x94D049BB133111EB)
        part ^= part >> np.uint64(31)
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


def first_of_each(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Returns the index of the first row of each text, in order."""
    return np.sort(np.unique(keys, return_index=True)[1])
