"""Tokenised rows as Arrow record batches, on disk or in memory.

A row's labels are kept as what differs from its ids: the spans where the label is the id itself,
and single places where it is another one (Baichuan2's rule). That form is the same for equal
labels, a few bytes long, and is what the fingerprint of a data set hashes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from glasstune.core.batch import IGNORED, Document, IntArray

KEY_BYTES = 16
_COLUMNS = "columns"


@dataclass(frozen=True, slots=True)
class Row:
    """One row to be stored.

    Args:
        ids: Token ids, int32 [T].
        labels: int32 [T], as in `Document`.
        origin: Where it came from.
        key: What is equal for equal texts, 16 bytes.
        columns: Values for a loss function.
    """

    ids: IntArray
    labels: IntArray
    origin: str
    key: bytes
    columns: Mapping[str, Any] = field(default_factory=dict)


def spans_of(
    ids: IntArray, labels: IntArray, ends: NDArray[np.int64]
) -> tuple[tuple[IntArray, IntArray], tuple[IntArray, IntArray]]:
    """Takes the labels of many rows apart.

    Args:
        ids: Of all rows, one after the other.
        labels: The same.
        ends: Where each row ends, starting with 0.

    Returns:
        Two lists of lists, each as its values and the ends of each row's part: (start, end) pairs
        where the label is the id, and (place, label) pairs where it is another one. Places count
        from the row's start.
    """
    own = labels == ids
    first = np.zeros(len(ids) + 1, dtype=bool)
    first[ends] = True
    starts = np.flatnonzero(own & (first[:-1] | ~np.roll(own, 1)))
    stops = np.flatnonzero(own & (first[1:] | ~np.roll(own, -1))) + 1
    places = np.flatnonzero(~own & (labels != IGNORED))
    base = ends[np.searchsorted(ends, starts, side="right") - 1]
    spans = np.stack([starts - base, stops - base], axis=1).reshape(-1).astype(np.int32)
    base = ends[np.searchsorted(ends, places, side="right") - 1]
    other = np.stack([places - base, labels[places]], axis=1).reshape(-1).astype(np.int32)
    return (
        (spans, 2 * np.searchsorted(starts, ends).astype(np.int32)),
        (other, 2 * np.searchsorted(places, ends).astype(np.int32)),
    )


def labels_of(ids: IntArray, spans: IntArray, other: IntArray) -> IntArray:
    """Returns the labels that `spans_of` took apart."""
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    for start, end in spans.reshape(-1, 2).tolist():
        labels[start:end] = ids[start:end]
    labels[other[::2]] = other[1::2]
    return labels


def to_batch(rows: Sequence[Row], *, keep_columns: bool, base: str = "") -> pa.RecordBatch:
    """Builds the record batch of some rows.

    Args:
        rows: The rows.
        keep_columns: Whether their columns are written, as JSON; in memory they stay as they are.
        base: What their origins start with, left out here and given to the `Shard` again.
    """
    ends = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row.ids) for row in rows], out=ends[1:])
    empty = [np.zeros(0, dtype=np.int32)]
    ids = np.concatenate([row.ids for row in rows] or empty)
    labels = np.concatenate([row.labels for row in rows] or empty)
    spans, other = spans_of(ids, labels, ends)
    seen = labels != IGNORED
    seen[ends[:-1]] = False  # nothing comes before the first position that could predict it
    sums = np.concatenate([[0], np.cumsum(seen)])
    arrays: dict[str, pa.Array] = {
        "ids": _lists(ids, ends.astype(np.int32)),
        "spans": _lists(*spans),
        "other": _lists(*other),
        "trained": _numbers(np.diff(sums[ends])),
        "origin": _texts([row.origin.removeprefix(base) for row in rows]),
        "key": pa.Array.from_buffers(
            pa.binary(KEY_BYTES), len(rows), [None, pa.py_buffer(b"".join(row.key for row in rows))]
        ),
    }
    if keep_columns:
        arrays[_COLUMNS] = _texts(
            [json.dumps(dict(row.columns), ensure_ascii=False) for row in rows]
        )
    return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


# `pa.array` and `to_numpy` would do the same, but they import pandas: a third of a second and
# tens of megabytes in every process.


def _numbers(values: NDArray[Any]) -> pa.Int32Array:
    whole = np.ascontiguousarray(values, dtype=np.int32)
    return pa.Array.from_buffers(pa.int32(), len(whole), [None, pa.py_buffer(whole)])


def _texts(texts: Sequence[str]) -> pa.StringArray:
    raw = [text.encode() for text in texts]
    ends = np.zeros(len(raw) + 1, dtype=np.int32)
    np.cumsum([len(each) for each in raw], out=ends[1:])
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(raw))]
    return pa.Array.from_buffers(pa.string(), len(raw), buffers)


def _lists(values: IntArray, ends: IntArray) -> pa.ListArray:
    return pa.ListArray.from_arrays(_numbers(ends), _numbers(values))


def batch_bytes(batch: pa.RecordBatch) -> pa.Buffer:
    """Returns a batch as an Arrow file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _view(column: pa.Int32Array) -> IntArray:
    """Returns a column as it lies in memory or in its file."""
    buffer = column.buffers()[1]
    if not len(column) or buffer is None:
        return np.zeros(0, dtype=np.int32)
    return np.frombuffer(buffer, dtype=np.int32, count=len(column), offset=4 * column.offset)


class _Lists:
    """A column of integer lists as one array and its ends."""

    def __init__(self, column: pa.ListArray) -> None:
        self.values = _view(column.values)
        self.ends = _view(column.offsets)

    def one(self, row: int) -> IntArray:
        return self.values[self.ends[row] : self.ends[row + 1]]

    def many(self, start: int, stop: int) -> IntArray:
        return self.values[self.ends[start] : self.ends[stop]]

    def lengths(self) -> IntArray:
        return np.diff(self.ends)


class Shard:
    """Some tokenised rows.

    Args:
        batch: As `to_batch` made it.
        columns: Values of a loss function per row, where they are not in the batch.
        base: What every origin starts with.
    """

    def __init__(
        self,
        batch: pa.RecordBatch,
        columns: Sequence[Mapping[str, Any]] | None = None,
        base: str = "",
    ) -> None:
        self.base = base
        self.rows: int = batch.num_rows
        self.ids = _Lists(batch.column("ids"))
        self.spans = _Lists(batch.column("spans"))
        self.other = _Lists(batch.column("other"))
        self.trained = _view(batch.column("trained"))
        self._origins = batch.column("origin")
        self._keys = batch.column("key")
        self._columns = columns
        if columns is None and _COLUMNS in batch.schema.names:
            self._columns = batch.column(_COLUMNS)

    @classmethod
    def open(cls, path: Path, base: str = "") -> Shard:
        """Maps a file into memory; nothing is read until it is asked for."""
        with pa.memory_map(str(path)) as source:
            return cls(pa.ipc.open_file(source).get_batch(0), base=base)

    def keys(self) -> NDArray[np.uint64]:
        """Returns half of each text key."""
        start = self._keys.offset * KEY_BYTES
        raw = np.frombuffer(self._keys.buffers()[1], dtype="<u8", offset=start)
        return raw[: 2 * self.rows : 2].astype(np.uint64)

    def origin(self, row: int) -> str:
        """Returns where a row came from."""
        return f"{self.base}{self._origins[row].as_py()}"

    def document(self, row: int, source: int) -> Document:
        """Returns a row; its ids are a view, its labels are built."""
        ids = self.ids.one(row)
        labels = labels_of(ids, self.spans.one(row), self.other.one(row))
        columns: Mapping[str, Any] = {}
        if self._columns is not None:
            held = self._columns[row]
            columns = held if isinstance(held, Mapping) else json.loads(held.as_py())
        return Document(ids, labels, source, self.origin(row), columns)
