"""Which texts are the same, which are held out, and how often a source's rows appear.

Two rows are the same text when all their texts are equal after Unicode NFKC, case folding and
joining runs of white space. Held-out texts are chosen by a hash of seed and text, so the choice
does not depend on the order of the rows, and all rows of one text go to the same side.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from glasstune.data.packing import shuffled

_SPACES = re.compile(r"\s+")


def text_key(texts: Sequence[str]) -> bytes:
    """Returns 16 bytes that are equal for equal normalised texts."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        plain = _SPACES.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
        digest.update(plain.encode("utf-8", "surrogatepass") + b"\x00")
    return digest.digest()


def held_out(keys: Sequence[bytes], share: float, seed: int) -> set[bytes]:
    """Chooses the texts that are held out.

    Args:
        keys: Text keys of all rows.
        share: Part of the different texts, below 1.
        seed: Seed of the choice.

    Returns:
        Keys: at least one where share is above 0 and there are two texts or more, and never all.
    """
    different = sorted(set(keys))
    if share <= 0 or len(different) < 2:
        return set()
    count = min(max(1, round(share * len(different))), len(different) - 1)
    salt = seed.to_bytes(8, "big")
    ranked = sorted(different, key=lambda key: hashlib.blake2b(salt + key).digest())
    return set(ranked[:count])


def repeated(count: int, repeat: float, seed: int, source: int) -> list[int]:
    """Returns row indices so that a source's rows appear `repeat` times in an epoch.

    Whole repetitions take every row; what is left of `repeat` takes a fixed part, chosen by seed.
    """
    whole = int(repeat)
    part = round((repeat - whole) * count)
    extra = sorted(shuffled(count, seed, 3, source)[:part].tolist()) if part else []
    return list(range(count)) * whole + extra


def first_of_each(keys: Sequence[bytes]) -> list[int]:
    """Returns the index of the first row of each text, in order."""
    seen: set[bytes] = set()
    kept: list[int] = []
    for index, key in enumerate(keys):
        if key not in seen:
            seen.add(key)
            kept.append(index)
    return kept
