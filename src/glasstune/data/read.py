"""Files to raw rows: what a file is follows from its content, not from its name.

JSON against JSONL is decided by the first byte that is no space, Parquet by its magic number;
only CSV and TSV, which have neither, go by their ending.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from glasstune.core.errors import InputError

_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_PARQUET = b"PAR1"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zX": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


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
        blank_lines: Per file, lines that hold nothing.
        handle: The file that is open, to ask how far it was read.
    """

    blank_lines: dict[str, int] = field(default_factory=dict)
    handle: BinaryIO | None = None


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
            stats.handle = file
            head = file.read(4)
            file.seek(0)
            if head == _PARQUET:
                yield from _read_parquet(path)
            elif delimiter := delimiter_of(path):
                yield from _read_csv(path, file, delimiter, stats)
            else:
                yield from _read_json(path, file, stats)
    except OSError as error:
        raise InputError(
            "unreadable_file",
            f"cannot be read: {error.strerror or error}",
            where=str(path),
            fix="check the path (it is taken relative to the current folder) and its permissions",
        ) from error


def delimiter_of(path: Path) -> str | None:
    """Returns what parts the cells of a file whose name says that it is a table of text."""
    return _DELIMITERS.get(path.suffix.lower())


def is_line_file(path: Path) -> bool:
    """Tells whether `read_rows` would read a file line by line, as JSONL."""
    if delimiter_of(path) or not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(4) == _PARQUET:
            return False
        file.seek(0)
        return first_byte(file) == b"{"


def _read_json(path: Path, file: BinaryIO, stats: ReadStats) -> Iterator[RawRow | BadRow]:
    first = first_byte(file)
    if first == b"[":
        from glasstune.data.read_array import read_array

        yield from read_array(path, file)
    elif first == b"{":
        yield from read_lines(path, file, 1, stats)
    elif first == b"":
        raise InputError("empty_file", "holds no row", where=str(path), fix="give a file with rows")
    else:
        raise unknown_kind(path, file.read(4))


def unknown_kind(path: Path, head: bytes) -> InputError:
    """Returns the error for a file of no known kind, with the way out where its kind is plain."""
    where = str(path)
    for magic, (kind, command) in _COMPRESSED.items():
        if head.startswith(magic):
            return InputError(
                "compressed_file",
                f"is compressed ({kind})",
                where=where,
                fix=f"unpack it: {command} {path.name}",
            )
    if head[:1] in (b"\xff", b"\xfe"):
        return InputError(
            "not_utf8",
            "is UTF-16 (its first bytes are a byte order mark)",
            where=where,
            fix=f"convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}",
        )
    return InputError(
        "unknown_file_kind",
        "is no JSON array, JSONL, Parquet, CSV or TSV: it starts with "
        f"{head[:1].decode('latin-1')!r}",
        where=where,
        fix="JSON starts with [ or {; CSV and TSV files must end in .csv or .tsv; a plain text is "
        'a row of its own: {"text": "..."}',
    )


def first_byte(file: BinaryIO) -> bytes:
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


def read_lines(
    path: Path, lines: Iterable[bytes], first: int, stats: ReadStats
) -> Iterator[RawRow | BadRow]:
    """Reads lines of a JSONL file.

    Args:
        path: The file, for origins.
        lines: Whole lines; only a line feed ends one, U+2028 inside a string does not.
        first: 1-based number of the first.
        stats: Where blank lines are counted.

    Raises:
        InputError: The file is one object over several lines, or a line is not UTF-8.
    """
    for number, raw in enumerate(lines, first):
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
        yield RawRow(value, origin) if isinstance(value, dict) else no_object(origin, value)


def _decode(path: Path, raw: bytes, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, raw[error.start], line) from error


def not_utf8(path: Path, byte: int, line: int) -> InputError:
    """Returns the error for a byte that is not UTF-8."""
    return InputError(
        "not_utf8",
        f"byte {byte:#04x} is not UTF-8",
        where=f"{path}:{line}",
        fix="save the file as UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8",
    )


def no_object(origin: str, value: Any) -> BadRow:
    """Returns the bad row for a value that is no object."""
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


def _read_csv(
    path: Path, binary: BinaryIO, delimiter: str, stats: ReadStats
) -> Iterator[RawRow | BadRow]:
    csv.field_size_limit(sys.maxsize)
    head = binary.read(4)
    if head.startswith(tuple(_COMPRESSED)):
        raise unknown_kind(path, head)
    binary.seek(0)
    with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
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
                raise not_utf8(path, error.object[error.start], line) from error
            if cells is None:
                break
            if not cells:
                stats.blank_lines[str(path)] = stats.blank_lines.get(str(path), 0) + 1
            elif header is None:
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
    if len(cells) == 1 and cells[0].count(";") > 0:
        raise InputError(
            "semicolon_csv",
            f"the header is one column with semicolons in its name: {cells[0]!r}",
            where=f"{path}:1",
            fix="cells are separated by commas in .csv and by tabs in .tsv: save it with commas "
            '(in Excel: "CSV UTF-8, comma delimited")',
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
