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

from glasstune.data.packing import shuffled


def text_key(texts: Sequence[str]) -> bytes:
    """Returns 16 bytes that are equal for equal normalised texts."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
        plain = " ".join(folded.split())
        digest.update(plain.encode("utf-8", "surrogatepass") + b"\x00")
    return digest.digest()


def held_out(keys: NDArray[np.bytes_], share: float, seed: int) -> NDArray[np.bool_]:
    """Chooses the texts that are held out.

    Args:
        keys: Text keys of all rows, S16 [rows].
        share: Part of the different texts, below 1.
        seed: Seed of the choice.

    Returns:
        Per row whether its text is held out: at least one text where share is above 0 and there
        are two or more, and never all.
    """
    different, which = np.unique(keys, return_inverse=True)
    if share <= 0 or len(different) < 2:
        return np.zeros(len(keys), dtype=bool)
    count = min(max(1, round(share * len(different))), len(different) - 1)
    salt, size = seed.to_bytes(8, "big"), different.itemsize
    ranks = np.empty(len(different), dtype=np.uint64)
    raw = different.tobytes()
    for k in range(len(different)):
        digest = hashlib.blake2b(salt + raw[k * size : (k + 1) * size]).digest()
        ranks[k] = int.from_bytes(digest[:8], "big")
    chosen = np.zeros(len(different), dtype=bool)
    chosen[np.argsort(ranks, kind="stable")[:count]] = True
    return chosen[which]


def repeated(count: int, repeat: float, seed: int, source: int) -> NDArray[np.int64]:
    """Returns row indices so that a source's rows appear `repeat` times in an epoch.

    Whole repetitions take every row; what is left of `repeat` takes a fixed part, chosen by seed.
    """
    whole = int(repeat)
    part = round((repeat - whole) * count)
    extra = np.sort(shuffled(count, seed, 3, source)[:part])
    return np.concatenate([np.tile(np.arange(count), whole), extra])


def first_of_each(keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Returns the index of the first row of each text, in order."""
    return np.sort(np.unique(keys, return_index=True)[1])
