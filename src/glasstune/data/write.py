"""Writes rows to a file in the format that its name says."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glasstune.core.errors import InputError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Writes rows as a JSON array, JSON lines, CSV, TSV or Parquet, by the file's suffix.

    Args:
        rows: The rows; for CSV and TSV the first row's keys are the columns.
        path: The file; its folder exists.

    Returns:
        The path.

    Raises:
        InputError: The suffix is none of the five.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    elif suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    elif suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            delimiter = "," if suffix == ".csv" else "\t"
            writer = csv.DictWriter(file, list(rows[0]) if rows else [], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        raise InputError(
            "unknown_suffix",
            f"rows cannot be written as {suffix or 'a file without a suffix'}",
            where=str(path),
            fix="use one of " + ", ".join(SUFFIXES),
        )
    return path
