"""Tokenised rows kept on disk, found again by everything that their ids and labels follow from.

An entry is a folder of shards, one a piece of the source, each with a small JSON file beside it:
rows, size and checksum of the shard, and the tally of its rows. Both are written aside and
renamed, the JSON last; a piece without it, or one that does not fit it, is made again. So a run
that was killed goes on with the pieces that were finished, and a damaged file is never trained.

Files of the data are named nowhere in it: their bytes are part of the key, and origins are kept
without the name. What grows over a size is removed again (see `trim`), but never an entry that a
process uses: it holds a lock on the entry's file `use` as long as it lives, and its last change
tells when the entry was used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import pyarrow as pa

from glasstune.core.files import cache_folder, dump_json
from glasstune.data.documents import Piece
from glasstune.data.errors import writing
from glasstune.data.shards import Shard
from glasstune.data.tally import Tally

_READ = 1 << 20
_DONE = "complete.json"
USE = "use"
"""File of an entry that is locked and touched by who uses it."""


def data_cache() -> Path:
    """Returns the folder of all entries."""
    return cache_folder() / "data"


class Lease:
    """Says that a process uses an entry; it ends with the object.

    Args:
        file: The locked file.
    """

    def __init__(self, file: IO[str]) -> None:
        self.end = weakref.finalize(self, file.close)


@contextlib.contextmanager
def whole_cache_locked() -> Iterator[None]:
    """Keeps other processes from taking or removing entries; held for moments only.

    Raises:
        OSError: The folder cannot be written.
    """
    data_cache().mkdir(parents=True, exist_ok=True)
    with (data_cache() / ".lock").open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True, slots=True)
class Kept:
    """A piece in the cache.

    Args:
        rows: Its rows.
        tally: What happened to the rows that were read for it; places without the file's name.
        file: Index of their file among the source's files.
    """

    rows: int
    tally: Tally
    file: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """The cache entry of one source.

    Args:
        folder: Where it lies.
    """

    folder: Path

    @classmethod
    def of(cls, key: str) -> Entry:
        """Returns the entry of a key; nothing is made yet."""
        return cls(data_cache() / key)

    def lease(self) -> Lease:
        """Makes the folder, and keeps it from being removed while the lease is held.

        Raises:
            InputError: The folder cannot be written.
            RunError: The disk is full.
        """
        with writing(self.folder), whole_cache_locked():
            self.folder.mkdir(parents=True, exist_ok=True)
            use = (self.folder / USE).open("a")
            os.utime(use.fileno())
            with contextlib.suppress(OSError):  # a disk without locks: nothing is removed there
                fcntl.flock(use, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return Lease(use)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and keeps other processes out while the entry is written.

        Raises:
            InputError: The folder cannot be written.
            RunError: The disk is full.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def shard_path(self, number: int) -> Path:
        """Returns the file of a piece."""
        return self.folder / f"{number:06d}.arrow"

    def _note_path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    def keep(self, number: int, data: pa.Buffer, kept: Kept) -> None:
        """Writes a piece.

        Raises:
            InputError: The folder cannot be written.
            RunError: The disk is full.
        """
        body = {
            "rows": kept.rows,
            "file": kept.file,
            "size": data.size,
            "crc32": zlib.crc32(data),
            "tally": kept.tally.to_dict(),
        }
        text = dump_json({"body": body, "sha256": _hash(dump_json(body))})
        with writing(self.folder):
            _write(self.shard_path(number), data)
            _write(self._note_path(number), text.encode())

    def kept(self, number: int) -> Kept | None:
        """Returns a piece if it is there and whole; reads all its bytes."""
        try:
            note = json.loads(self._note_path(number).read_text(encoding="utf-8"))
            body = note["body"]
            if note["sha256"] != _hash(dump_json(body)):
                return None
            if _checksum(self.shard_path(number)) != (body["size"], body["crc32"]):
                return None
            return Kept(body["rows"], Tally.from_dict(body["tally"]), body["file"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def finish(self, pieces: int) -> None:
        """Marks the entry as complete."""
        with writing(self.folder):
            _write(self.folder / _DONE, dump_json({"pieces": pieces}).encode())

    def finished(self) -> list[Kept] | None:
        """Returns all pieces of a complete entry, or None; what is damaged is made again."""
        try:
            count = int(json.loads((self.folder / _DONE).read_text(encoding="utf-8"))["pieces"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        found: list[Kept] = []
        for number in range(count):
            piece = self.kept(number)
            if piece is None:
                return None
            found.append(piece)
        return found

    def pieces(self, source: int, kept: list[Kept], bases: Sequence[str]) -> list[Piece]:
        """Returns the shards as pieces of a store.

        Args:
            source: Index of their source.
            kept: All of them.
            bases: What origins start with, for each file of the source.
        """
        return [
            Piece(
                source, piece.rows, partial(Shard.open, self.shard_path(number), bases[piece.file])
            )
            for number, piece in enumerate(kept)
        ]

    def remove(self) -> None:
        """Removes the entry."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_READ):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _write(path: Path, data: pa.Buffer | bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
