"""Keeps the cache of tokenised rows below a size: what was not used for longest goes first."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from glasstune.core.units import parse_bytes
from glasstune.data.cache import USE, data_cache, whole_cache_locked

LIMIT = "GLASSTUNE_CACHE_LIMIT"
DEFAULT = "20GiB"
"""About twenty data sets of half a gigabyte of JSON each."""
_GONE = ".gone-"


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What was removed.

    Args:
        entries: Number of entries.
        size: Their bytes.
        limit: Bytes that may stay.
    """

    entries: int
    size: int
    limit: int


def limit() -> int:
    """Returns the bytes that the cache may hold.

    Raises:
        InputError: The environment names no size.
    """
    return parse_bytes(os.environ.get(LIMIT) or DEFAULT, where=LIMIT)


def trim() -> Trimmed:
    """Removes the entries that were not used for longest, down to the limit.

    An entry that any process uses stays, whatever the limit.

    Raises:
        InputError: The environment names no size.
    """
    most = limit()
    found = []
    for folder in data_cache().iterdir():
        if folder.is_dir() and not folder.name.startswith("."):
            with contextlib.suppress(OSError):  # another process may remove it meanwhile
                found.append((_last_use(folder), folder.name, _size(folder), folder))
    total = sum(size for _, _, size, _ in found)
    entries = removed = 0
    for _, _, size, folder in sorted(found):
        if total - removed <= most:
            break
        if _remove(folder):
            entries += 1
            removed += size
    for left in data_cache().glob(f"{_GONE}*"):  # by this process, or by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    return Trimmed(entries, removed, most)


def _last_use(folder: Path) -> int:
    file = folder / USE
    return (file if file.exists() else folder).stat().st_mtime_ns


def _size(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def _remove(folder: Path) -> bool:
    """Takes an entry away unless it is in use; the bytes go later, outside the lock."""
    try:
        with whole_cache_locked(), (folder / USE).open("a") as use:
            fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.rename(folder.with_name(f"{_GONE}{folder.name}"))
    except OSError:  # in use, or no lock to be had here
        return False
    return True
