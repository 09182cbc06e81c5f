"""What a text looks like: its scripts, and traces of a wrong encoding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

_BLOCKS = (
    (0x0041, 0x005A, "Latin"), (0x0061, 0x007A, "Latin"), (0x00C0, 0x024F, "Latin"),
    (0x1E00, 0x1EFF, "Latin"), (0x0370, 0x03FF, "Greek"), (0x1F00, 0x1FFF, "Greek"),
    (0x0400, 0x052F, "Cyrillic"), (0x0530, 0x058F, "Armenian"), (0x0590, 0x05FF, "Hebrew"),
    (0x0600, 0x06FF, "Arabic"), (0x0750, 0x077F, "Arabic"), (0x0900, 0x097F, "Devanagari"),
    (0x0980, 0x09FF, "Bengali"), (0x0A00, 0x0DFF, "other Indic"), (0x0E00, 0x0E7F, "Thai"),
    (0x0E80, 0x109F, "other South-East Asian"), (0x10A0, 0x10FF, "Georgian"),
    (0x1100, 0x11FF, "Hangul"), (0x3040, 0x309F, "Kana"), (0x30A0, 0x30FF, "Kana"),
    (0x3130, 0x318F, "Hangul"), (0x3400, 0x4DBF, "Han"), (0x4E00, 0x9FFF, "Han"),
    (0xAC00, 0xD7AF, "Hangul"), (0xF900, 0xFAFF, "Han"), (0x1780, 0x17FF, "Khmer"),
    (0x1200, 0x137F, "Ethiopic"), (0x20000, 0x323AF, "Han"),
)  # fmt: skip
SCRIPTS = tuple(dict.fromkeys(name for _, _, name in _BLOCKS))

# UTF-8 read as Windows-1252: a first byte of two to four, and bytes that may follow it, in the
# characters that they become there.
_FOLLOWS = "\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122"
# Two letters count only where they would be Latin, Greek or Cyrillic: "Spaß«" is right German.
_WRONG = re.compile(
    f"[\u00c2-\u00c5\u00ce-\u00d1][{_FOLLOWS}]|[\u00e2-\u00f4][{_FOLLOWS}]{{2,3}}|\ufffd"
)


@cache
def _table() -> NDArray[np.uint8]:
    table = np.zeros(0x110000, dtype=np.uint8)
    for start, end, name in _BLOCKS:
        table[start : end + 1] = SCRIPTS.index(name) + 1
    table[[0xD7, 0xF7]] = 0  # the signs of multiplication and division among the Latin letters
    return table


def count_letters(texts: Sequence[str], into: dict[str, int]) -> None:
    """Counts letters by script, judged by Unicode block.

    Args:
        texts: Any texts.
        into: Script to number; added to.
    """
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    counts = np.bincount(_table()[codes], minlength=len(SCRIPTS) + 1)
    for name, count in zip(SCRIPTS, counts[1:].tolist(), strict=True):
        if count:
            into[name] = into.get(name, 0) + count


def mojibake(text: str) -> str | None:
    """Returns a part of the text that was read in a wrong encoding, or None.

    Either the replacement character, or letters that are UTF-8 once they are written as
    Windows-1252.
    """
    if text.isascii():
        return None
    for match in _WRONG.finditer(text):
        found = match.group()
        if found == "\ufffd":
            return found
        for length in range(len(found), 1, -1):
            if _is_utf8(found[:length]):
                return found[:length]
    return None


def _is_utf8(text: str) -> bool:
    """Tells whether the text's Windows-1252 bytes are one character of UTF-8."""
    raw = bytearray()
    for letter in text:
        try:
            raw += letter.encode("cp1252")
        except UnicodeEncodeError:
            if ord(letter) > 0xFF:
                return False
            raw.append(ord(letter))  # the five bytes that Windows-1252 leaves open
    try:
        return len(raw.decode("utf-8")) == 1
    except UnicodeDecodeError:
        return False


def shares(letters: Mapping[str, int]) -> dict[str, float]:
    """Returns each script's share of all letters, largest first."""
    total = sum(letters.values())
    ordered = sorted(letters.items(), key=lambda item: (-item[1], item[0]))
    return {name: round(count / total, 4) for name, count in ordered}
