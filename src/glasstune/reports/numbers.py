"""Sizes, counts and shares as the reports of a model write them.

Sizes are decimal (1 GB = 10^9 bytes): so are the sizes on model cards and in most papers.
"""

from __future__ import annotations

from collections.abc import Iterable

UNITS = "1 kB = 1,000 bytes, 1 MB = 1,000 kB, 1 GB = 1,000 MB"


def size_text(count: float) -> str:
    """Writes bytes with a decimal unit and three digits or more: `5.70 GB`, `236.3 MB`, `64 B`."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        # What rounds to 1000.0 already belongs to the next unit.
        if abs(value) < 999.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.2f} GB"


def count_text(count: float) -> str:
    """Writes a count shortly: `950`, `24.8 thousand`, `2.56 million`, `70.55 billion`."""
    for limit, word, digits in ((1e9, "billion", 2), (1e6, "million", 2), (1e4, "thousand", 1)):
        if abs(count) >= limit:
            return f"{count / (limit if limit != 1e4 else 1e3):,.{digits}f} {word}"
    return f"{count:,.0f}"


def counted(count: int, one: str) -> str:
    """Writes how many: `1 row`, `1,200 rows`; the plural takes an s."""
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


def percent_text(share: float) -> str:
    """Writes a share of 0 to 1; what is not zero never reads as zero, nor a part as the whole."""
    if 0 < share < 0.001:
        return "under 0.1%"
    if 0.999 < share < 1:
        return "over 99.9%"
    return f"{share:.1%}"


def shape_text(shape: Iterable[int] | None) -> str:
    """Writes a shape as `2560 × 7680`; empty without one."""
    return " × ".join(str(size) for size in shape or ())
