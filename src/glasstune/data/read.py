"""Files to raw rows: what a file is follows from its content, not from its name.

JSON against JSONL is decided by the first byte that is no space, Parquet by its magic number;
only CSV and TSV, which have neither, go by their ending.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from glasstune.core.errors import InputError

_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_PARQUET = b"PAR1"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was read.

    Args:
        value: Column name to value.
        origin: `file:line` (1-based physical line), with `[row]` (0-based) behind it where several
            rows share a line, or `file[row]` where a format has no lines.
    """

    value: dict[str, Any]
    origin: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """A place where a row should be and is none, in a file whose other rows can be read.

    Args:
        origin: As in `RawRow`.
        code: A stable name in snake case.
        message: What was found there.
    """

    origin: str
    code: str
    message: str


@dataclass(slots=True)
class ReadStats:
    """What a reader passed over.

    Args:
        blank_lines: Per file, lines of a JSONL file that hold nothing.
    """

    blank_lines: dict[str, int] = field(default_factory=dict)


def read_rows(path: Path, stats: ReadStats | None = None) -> Iterator[RawRow | BadRow]:
    """Reads a JSON array, JSONL, Parquet, CSV or TSV file row by row.

    Args:
        path: The file.
        stats: Where blank lines are counted.

    Yields:
        Rows in the file's order; a `BadRow` for a line that is no JSON object.

    Raises:
        InputError: The file is missing, empty, of an unknown kind, not UTF-8, or broken in a way
            that leaves no further row readable.
    """
    stats = stats if stats is not None else ReadStats()
    if path.is_dir():
        raise InputError(
            "data_is_folder",
            "is a folder, not a data file",
            where=str(path),
            fix=f"name its files, for example {path}/*.jsonl",
        )
    try:
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(0)
            if head == _PARQUET:
                yield from _read_parquet(path)
            elif path.suffix.lower() in _DELIMITERS:
                yield from _read_csv(path, _DELIMITERS[path.suffix.lower()])
            else:
                yield from _read_json(path, file, stats)
    except OSError as error:
        raise InputError(
            "unreadable_file",
            f"cannot be read: {error.strerror or error}",
            where=str(path),
            fix="check the path (it is taken relative to the current folder) and its permissions",
        ) from error


def _read_json(path: Path, file: BinaryIO, stats: ReadStats) -> Iterator[RawRow | BadRow]:
    first = _first_byte(file)
    if first == b"[":
        yield from _read_array(path, _decode(path, file.read()))
    elif first == b"{":
        yield from _read_lines(path, file, stats)
    elif first == b"":
        raise InputError("empty_file", "holds no row", where=str(path), fix="give a file with rows")
    elif first in (b"\xff", b"\xfe"):
        raise InputError(
            "not_utf8",
            "is UTF-16 (its first bytes are a byte order mark)",
            where=str(path),
            fix=f"convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}",
        )
    else:
        raise InputError(
            "unknown_file_kind",
            f"is no JSON array, JSONL, Parquet, CSV or TSV: it starts with {first!r}",
            where=str(path),
            fix="JSON starts with [ or {; CSV and TSV files must end in .csv or .tsv",
        )


def _first_byte(file: BinaryIO) -> bytes:
    """Returns the first byte that is no space; leaves the file at its start, after a BOM."""
    if file.read(3) != _BOM:
        file.seek(0)
    start = file.tell()
    while block := file.read(65536):
        if rest := block.lstrip(_SPACE):
            file.seek(start)
            return rest[:1]
    file.seek(start)
    return b""


def _decode(path: Path, raw: bytes, line: int = 1) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad_line = line + raw.count(b"\n", 0, error.start)
        raise InputError(
            "not_utf8",
            f"byte {raw[error.start]:#04x} is not UTF-8",
            where=f"{path}:{bad_line}",
            fix="save the file as UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8",
        ) from error


def _read_array(path: Path, text: str) -> Iterator[RawRow | BadRow]:
    """Walks an array item by item, so that each row knows its physical line."""
    decoder = json.JSONDecoder()
    at = _skip(text, text.index("[") + 1)
    line, counted, number, previous = 1, 0, -1, 0
    if text[at : at + 1] == "]":
        at += 1
    else:
        while True:
            line += text.count("\n", counted, at)
            counted, number = at, number + 1
            # A row that shares its line with the one before is told by its number, too.
            origin = f"{path}:{line}" + (f"[{number}]" if line == previous else "")
            previous = line
            try:
                value, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                raise _broken_array(path, text, error, at) from error
            if isinstance(value, dict):
                yield RawRow(value, origin)
            else:
                yield _no_object(origin, value)
            at = _skip(text, end)
            mark = text[at : at + 1]
            if mark == ",":
                at = _skip(text, at + 1)
                continue
            if mark != "]":
                raise _broken_array(path, text, None, at)
            at += 1
            break
    if _skip(text, at) < len(text):
        raise _broken_array(path, text, None, _skip(text, at))


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _broken_array(path: Path, text: str, error: Exception | None, at: int) -> InputError:
    if isinstance(error, json.JSONDecodeError):
        at = error.pos
    line = text.count("\n", 0, at) + 1
    found = repr(text[at : at + 20]) if at < len(text) else "the end of the file"
    return InputError(
        "bad_json",
        f"the JSON array is broken here: found {found}",
        where=f"{path}:{line}",
        fix="rows before this line are whole; correct it, or cut the file here and close it with ]",
    )


def _read_lines(path: Path, file: BinaryIO, stats: ReadStats) -> Iterator[RawRow | BadRow]:
    number = 0
    for raw in file:  # binary: only \n ends a line, U+2028 inside a string does not
        number += 1
        if not raw.strip(_SPACE):
            stats.blank_lines[str(path)] = stats.blank_lines.get(str(path), 0) + 1
            continue
        origin = f"{path}:{number}"
        try:
            value = json.loads(_decode(path, raw, number))
        except (ValueError, RecursionError):
            if number == 1 and raw.strip(_SPACE) == b"{":
                raise InputError(
                    "bad_json",
                    "is one JSON object written over several lines",
                    where=origin,
                    fix="write a JSON array of rows ([{...}, {...}]) or one row a line (JSONL)",
                ) from None
            shown = raw.strip(_SPACE)[:40].decode("utf-8", "replace")
            yield BadRow(origin, "bad_json", f"this line is no JSON: {shown!r}")
            continue
        yield RawRow(value, origin) if isinstance(value, dict) else _no_object(origin, value)


def _no_object(origin: str, value: Any) -> BadRow:
    return BadRow(
        origin,
        "not_an_object",
        f"a row must be an object with named columns, found {kind_of(value)}",
    )


def kind_of(value: Any) -> str:
    """Returns what a JSON value is, in plain words."""
    names = {bool: "true/false", str: "text", list: "a list", dict: "an object"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "another type")


def _read_csv(path: Path, delimiter: str) -> Iterator[RawRow | BadRow]:
    csv.field_size_limit(sys.maxsize)
    with path.open("r", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise InputError(
                    "bad_csv",
                    f"broken quoting: {error}",
                    where=f"{path}:{line}",
                    fix='a quote inside a quoted cell is written twice: ""',
                ) from error
            except UnicodeDecodeError as error:
                raise InputError(
                    "not_utf8",
                    f"byte {error.object[error.start]:#04x} is not UTF-8",
                    where=f"{path}:{line}",
                    fix="save the file as UTF-8",
                ) from error
            if cells is None:
                break
            if not cells:
                continue
            if header is None:
                header = _header(path, cells)
            elif len(cells) != len(header):
                yield BadRow(
                    f"{path}:{line}",
                    "wrong_cell_count",
                    f"has {len(cells)} cells where the header has {len(header)}",
                )
            else:
                yield RawRow(dict(zip(header, cells, strict=True)), f"{path}:{line}")
    if header is None:
        raise InputError("empty_file", "holds no row", where=str(path), fix="give a file with rows")


def _header(path: Path, cells: list[str]) -> list[str]:
    twice = sorted({cell for cell in cells if cells.count(cell) > 1})
    if twice:
        raise InputError(
            "bad_csv",
            f"the header names a column twice: {', '.join(twice)}",
            where=f"{path}:1",
            fix="give each column its own name",
        )
    return cells


def _read_parquet(path: Path) -> Iterator[RawRow | BadRow]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    yield RawRow(value, f"{path}[{number}]")
                    number += 1
    except pyarrow.ArrowException as error:
        raise InputError(
            "bad_parquet",
            f"the Parquet file is damaged: {str(error).splitlines()[0]}",
            where=str(path),
            fix="copy or export it again",
        ) from error
