"""Bytes, durations and counts, as people read them."""

from __future__ import annotations

import re

from glasstune.core.errors import InputError

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(text: str | int, *, where: str = "") -> int:
    """Reads a size such as `22GiB` or `500 MB`.

    Args:
        text: A number with a unit (decimal `GB`, binary `GiB`), or plain bytes.
        where: The config key, for the message.

    Returns:
        Bytes.

    Raises:
        InputError: The text is no size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise InputError(
            "bad_size",
            f"{text!r} is not a size",
            where=where,
            fix='write a number and a unit, for example "22GiB"',
        )
    return int(float(match.group(1)) * factor)


def format_bytes(count: int | float) -> str:
    """Formats bytes with a binary unit: `1.5 GiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_bytes_up(count: int) -> str:
    """Formats bytes like `format_bytes`, rounded up: what it says, read back, is no less."""
    size = 1
    while size < 2**40 and count >= 1024 * size:
        size *= 1024
    if size == 1:
        return f"{count} B"
    text = format_bytes(-(-count * 10 // size) * size / 10)
    return (
        text if parse_bytes(text) >= count else format_bytes((count * 10 // size + 2) * size / 10)
    )


def format_seconds(seconds: float) -> str:
    """Formats a duration: `45 s`, `3 min 05 s`, `2 h 10 min`."""
    total = round(seconds)
    if total < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"
