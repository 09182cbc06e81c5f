"""A JSON array, row by row: a block of the file and one row are in memory at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from glasstune.core.errors import InputError
from glasstune.data.read import BadRow, RawRow, no_object, not_utf8

BLOCK = 1 << 20
"""Bytes that are read at a time; a longer row doubles what is read until it is whole."""
_NUMBER = 64
"""Characters from the end within which a number or word may go on in the next block."""


class _Text:
    """The decoded part of a file that is not used up yet, and the line it starts at."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""
        self.at = 0
        self.line = 1  # of `at`
        self.ended = False
        self.rows = 0  # whole ones before `at`

    def more(self) -> bool:
        """Reads on, at least doubling what is left; False at the end of the file.

        Raises:
            InputError: A byte is not UTF-8.
        """
        if self.ended:
            return False
        rest = self.text[self.at :]
        raw = self.file.read(max(BLOCK, len(rest)))
        self.ended = not raw
        pending = self.decoder.getstate()[0]
        try:
            fresh = self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            whole = pending + raw
            before = whole[: error.start].count(b"\n")
            line = self.line + rest.count("\n") + before
            raise not_utf8(self.path, whole[error.start], line) from error
        self.text, self.at = rest + fresh, 0
        return True

    def to(self, at: int) -> None:
        """Moves on, counting lines."""
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def next_mark(self) -> str:
        """Returns the next character that is no space, or nothing at the end of the file."""
        while True:
            at = self.at
            while at < len(self.text) and self.text[at] in " \t\r\n":
                at += 1
            self.to(at)
            if at < len(self.text):
                return self.text[at]
            if not self.more():
                return ""

    def value(self) -> object:
        """Returns the JSON value that starts here and moves behind it.

        Raises:
            InputError: There is none.
        """
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                # A row that goes on behind this block looks the same as a broken one.
                if not isinstance(error, RecursionError) and self.more():
                    continue
                raise self.broken(error) from error
            whole = isinstance(value, (dict, list, str)) or end + _NUMBER < len(self.text)
            if whole or not self.more():
                self.to(end)
                return value

    def broken(self, error: Exception | None = None) -> InputError:
        """Returns the error for an array that is broken here, or where the parser says."""
        at = error.pos if isinstance(error, json.JSONDecodeError) else self.at
        line = self.line + self.text.count("\n", self.at, at)
        found = repr(self.text[at : at + 20]) if at < len(self.text) else "the end of the file"
        deep = isinstance(error, RecursionError)
        return InputError(
            "bad_json",
            f"the JSON array is {'nested too deeply' if deep else 'broken'} here, behind "
            f"{self.rows:,} whole row{'' if self.rows == 1 else 's'}: found {found}",
            where=f"{self.path}:{line}",
            fix="correct it, or cut the file behind the last whole row and close it with ]",
        )


def read_array(path: Path, file: BinaryIO) -> Iterator[RawRow | BadRow]:
    """Walks an array item by item, so that each row knows its physical line.

    Args:
        path: The file, for origins.
        file: Open at its start; the first character that is no space is the bracket.

    Yields:
        Rows; a `BadRow` for an item that is no object.

    Raises:
        InputError: The array is broken, or not UTF-8.
    """
    text = _Text(path, file)
    text.next_mark()
    text.to(text.at + 1)
    number, previous = 0, 0
    if text.next_mark() == "]":
        text.to(text.at + 1)
    else:
        while True:
            text.next_mark()
            # A row that shares its line with the one before is told by its number, too.
            origin = f"{path}:{text.line}" + (f"[{number}]" if text.line == previous else "")
            previous = text.line
            value = text.value()
            number += 1
            text.rows = number
            yield RawRow(value, origin) if isinstance(value, dict) else no_object(origin, value)
            mark = text.next_mark()
            if mark not in ("]", ","):
                raise text.broken()
            text.to(text.at + 1)
            if mark == "]":
                break
    if text.next_mark():
        raise text.broken()
