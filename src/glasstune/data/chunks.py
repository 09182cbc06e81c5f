"""A source in pieces of a few thousand rows: the unit of work, of storage and of going on.

Where pieces begin follows from the data alone, never from the number of processes, so a piece
that was finished before a kill is the same piece in the next run.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from glasstune.core.errors import InputError
from glasstune.data.choose import OpenSource
from glasstune.data.read import BadRow, RawRow, ReadStats, is_line_file, read_lines, read_rows

ROWS = 4096
BYTES = 8 << 20
"""Bytes of a file after which a piece ends, so that long rows do not pile up in memory."""


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines of a JSONL file, read by whoever works on them.

    Args:
        offset: Byte where the first starts.
        size: Their bytes.
        first: 1-based number of the first.
    """

    offset: int
    size: int
    first: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a source.

    Args:
        number: Its place among the source's pieces.
        path: The file, where the rows are one's.
        lines: Where its rows stand, if they are lines.
        rows: Else the rows themselves.
        blank: Blank lines among `rows`.
        size: Bytes of the file, or rows of another source, that it takes: for progress.
        file: Index of the file among the source's files.
    """

    number: int
    path: str = ""
    lines: Lines | None = None
    rows: tuple[RawRow | BadRow, ...] = ()
    blank: int = 0
    size: int = 0
    file: int = 0

    def read(self, stats: ReadStats) -> Iterator[RawRow | BadRow]:
        """Reads the rows.

        Raises:
            InputError: As `read_lines`.
        """
        if self.lines is None:
            if self.blank:
                stats.blank_lines[self.path] = self.blank
            yield from self.rows
            return
        with Path(self.path).open("rb") as file:
            file.seek(self.lines.offset)
            raw = file.read(self.lines.size)
        yield from read_lines(Path(self.path), io.BytesIO(raw), self.lines.first, stats)


def chunks(source: OpenSource) -> Iterator[Chunk]:
    """Cuts a source into pieces.

    Raises:
        InputError: A file cannot be read any further.
    """
    number = 0
    if source.files is None:
        for rows in _grouped(source.rows(ReadStats())):
            yield Chunk(number, rows=rows, size=len(rows))
            number += 1
        return
    for index, path in enumerate(source.files):
        pieces = _line_chunks(path) if is_line_file(path) else _row_chunks(path)
        for piece in pieces:
            yield replace(piece, number=number, path=str(path), file=index)
            number += 1


def _grouped(rows: Iterable[RawRow | BadRow]) -> Iterator[tuple[RawRow | BadRow, ...]]:
    group: list[RawRow | BadRow] = []
    for row in rows:
        group.append(row)
        if len(group) == ROWS:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _line_chunks(path: Path) -> Iterator[Chunk]:
    try:
        with path.open("rb") as file:
            offset = start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
            file.seek(start)
            first, count = 1, 0
            for line in file:
                offset += len(line)
                count += 1
                if count == ROWS or offset - start >= BYTES:
                    yield Chunk(0, lines=Lines(start, offset - start, first), size=offset - start)
                    first, start, count = first + count, offset, 0
            if count:
                yield Chunk(0, lines=Lines(start, offset - start, first), size=offset - start)
    except OSError as error:
        raise InputError(
            "unreadable_file",
            f"cannot be read: {error.strerror or error}",
            where=str(path),
            fix="check the path and its permissions",
        ) from error


def _row_chunks(path: Path) -> Iterator[Chunk]:
    """Cuts a file that only one reader can walk through."""
    stats = ReadStats()
    total = path.stat().st_size
    group: list[RawRow | BadRow] = []
    start = blank = 0
    for row in read_rows(path, stats):
        group.append(row)
        at = stats.handle.tell() if stats.handle and not stats.handle.closed else start
        if len(group) == ROWS or at - start >= BYTES:
            seen = stats.blank_lines.get(str(path), 0)
            yield Chunk(0, rows=tuple(group), blank=seen - blank, size=at - start)
            group, start, blank = [], at, seen
    seen = stats.blank_lines.get(str(path), 0)
    if group or seen > blank:
        yield Chunk(0, rows=tuple(group), blank=seen - blank, size=max(0, total - start))
