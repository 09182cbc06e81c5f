"""Data sources: files, globs, hub data sets and rows from Python become one stream of rows."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glasstune.core.config import SourceConfig
from glasstune.core.errors import InputError
from glasstune.data.hub import load_hub
from glasstune.data.read import BadRow, RawRow, ReadStats, kind_of, read_rows

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_ENDINGS = {".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt"}


def source_names(sources: Sequence[SourceConfig]) -> tuple[str, ...]:
    """Returns a name for each source: its own, or its file's stem; doubles get a number.

    Raises:
        InputError: Two sources were given the same name.
    """
    given = [source.name for source in sources if source.name]
    for name in given:
        if given.count(name) > 1:
            raise InputError(
                "source_name_twice",
                f"two sources are named {name!r}",
                where="data.sources",
                fix="give each its own name",
            )
    names: list[str] = []
    for source in sources:
        base = source.name or _stem(source)
        name, number = base, 2
        while name in names or (name in given and source.name is None):
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return tuple(names)


def _stem(source: SourceConfig) -> str:
    if source.rows is not None:
        return "rows"
    path = Path(source.path)
    stem = re.sub(r"[*?\[\]]+", "", path.stem).strip("-_. ")
    return stem or path.parent.name or "data"


def read_source(
    source: SourceConfig, base_folder: Path, stats: ReadStats
) -> Iterator[RawRow | BadRow]:
    """Reads all rows of a source, files of a glob in sorted order.

    Args:
        source: Path, glob, hub id or rows.
        base_folder: Folder that relative paths start from.
        stats: Where blank lines are counted.

    Raises:
        InputError: No such file or data set, or one of the reader's own errors.
    """
    if source.rows is not None:
        yield from python_rows(source.rows)
        return
    files = source_files(source, base_folder)
    if files is None:
        yield from hub_rows(load_hub(source.path, source.subset, source.split), source)
        return
    for path in files:
        yield from read_rows(path, stats)


def hub_rows(table: Any, source: SourceConfig) -> Iterator[RawRow]:
    """Yields the rows of a loaded hub data set; their origin is `name/split[row]`, 0-based."""
    for number, value in enumerate(table):
        yield RawRow(dict(value), f"{source.path}/{source.split}[{number}]")


def source_files(source: SourceConfig, base_folder: Path) -> list[Path] | None:
    """Returns a source's files, sorted where it is a glob; None for a data set of the hub.

    Raises:
        InputError: No such file, or settings that belong to the hub beside a file.
    """
    files = _files(source, base_folder)
    if files is None:
        return None
    for key, plain in (("subset", None), ("split", "train")):
        if (asked := getattr(source, key)) != plain:
            raise InputError(
                "not_for_files",
                f"{key}: {asked} belongs to a data set of the hub, and this is a file",
                where=source.path,
                fix=f"leave {key} out; a part of the rows is a file of its own",
            )
    return files


def python_rows(rows: Sequence[object]) -> Iterator[RawRow | BadRow]:
    """Yields rows that were given from Python; their origin is `rows[number]`, 0-based."""
    for number, value in enumerate(rows):
        origin = f"rows[{number}]"
        if isinstance(value, dict):
            yield RawRow(value, origin)
        else:
            yield BadRow(origin, "not_an_object", f"a row must be a dict, found {kind_of(value)}")


def _files(source: SourceConfig, base_folder: Path) -> list[Path] | None:
    """Returns the source's files, or None where the path is a hub id."""
    path = base_folder / Path(source.path).expanduser()
    if path.exists():
        return [path]
    if re.search(r"[*?\[]", source.path):
        found = sorted(glob.glob(str(path), recursive=True))
        files = [Path(name) for name in found if Path(name).is_file()]
        if not files:
            raise InputError(
                "no_file_matches",
                "no file matches this pattern",
                where=str(path),
                fix="the pattern is taken relative to the current folder; ** goes into subfolders",
            )
        return files
    explicit = source.path.startswith((".", "/", "~")) or "\\" in source.path
    named_as_file = explicit or path.suffix.lower() in _FILE_ENDINGS
    if not named_as_file and _HUB_ID.fullmatch(source.path):
        return None
    near: list[str] = []
    if path.parent.is_dir():
        names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
        near = difflib.get_close_matches(path.name, names, n=3)
    raise InputError(
        "no_such_file",
        "there is no such file",
        where=str(path),
        fix=f"did you mean {' or '.join(near)}?"
        if near
        else "check the path; relative ones start from the current folder",
    )
