"""What happened to the rows: kept, dropped and why, tokens, findings.

Alike bad rows are one entry with their number and the first few places, so that a user sees
everything that is wrong at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.core.records import DataRecord
from glasstune.data.tally import Note, Tally
from glasstune.data.texts import shares

_SHOWN = 8
_SKIP = "correct the row, or set data.on_error: skip to leave it out"
_ORDER = {"error": 0, "warning": 1, "info": 2}


@dataclass
class Totals:
    """What is kept of a source.

    Args:
        rows: Rows.
        tokens: Their tokens.
        trained: Those that the loss sees.
        lengths: Number of rows of each length, int64.
    """

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def add(self, lengths: NDArray[np.int32], trained: NDArray[np.int32]) -> None:
        """Counts rows in.

        Args:
            lengths: Tokens of each, int32.
            trained: Trained tokens of each, int32.
        """
        self.rows += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))
        self.trained += int(trained.sum(dtype=np.int64))
        self.lengths = _added([self.lengths, np.bincount(lengths)])


@dataclass
class Ledger:
    """The books of one data preparation.

    Args:
        names: All sources, in order.
        on_error: Whether a bad row stops the run or is counted.
        tallies: What the rows of each source showed.
        findings: About the data as a whole.
        removed: Rows left out for what other rows hold (duplicates), per source.
    """

    names: Sequence[str]
    on_error: Literal["stop", "skip"]
    tallies: list[Tally] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    removed: Counter[int] = field(default_factory=Counter)

    def merged(self) -> Tally:
        """Returns the tally of all sources."""
        whole = Tally()
        for tally in self.tallies:
            whole.merge(tally)
        return whole

    def errors(self) -> list[Note]:
        """Returns what stops a run, bad rows first."""
        whole = self.merged()
        bad = list(whole.bad.values()) if self.on_error == "stop" else []
        return bad + [note for note in whole.notes.values() if note.severity == "error"]

    def raise_errors(self) -> None:
        """Raises what stops a run as one error.

        Raises:
            InputError: There is something.
        """
        notes = self.errors()
        if not notes:
            return
        first = notes[0]
        count = sum(note.count for note in notes)
        where = first.places[0]
        if count == 1:
            raise InputError(
                first.code,
                first.text(),
                where=where,
                fix=first.fix or _SKIP,
            )
        lines = [f"{note.places[0]}: {note.text()}" for note in notes[1:_SHOWN]]
        more = len(notes) - len(lines) - 1
        tail = [f"and {more} more kinds of faults"] if more > 0 else []
        total = f" ({count:,} bad rows in all)" if len(notes) > 1 else ""
        raise InputError(
            first.code if len({note.code for note in notes}) == 1 else "bad_rows",
            "\n  ".join([first.text() + total, *lines, *tail]),
            where=where,
            fix=first.fix or "correct the rows, or set data.on_error: skip to leave them out",
        )

    def dropped(self) -> dict[str, int]:
        """Returns rows that were left out, by reason."""
        counts = dict(self.merged().dropped)
        if any(self.removed.values()):
            counts["duplicate"] = sum(self.removed.values())
        return counts

    def nothing_left(self) -> InputError:
        """Returns the error for data of which no row can be trained."""
        listed = ", ".join(f"{count} {reason}" for reason, count in self.dropped().items())
        bad = next(iter(self.merged().bad.values()), None)
        first = f"; the first: {bad.places[0]}: {bad.message}" if bad else ""
        return InputError(
            "no_training_rows",
            f"no row is left to train ({listed or 'no rows'}){first}",
            where="data.sources",
            fix="raise data.max_length, or correct the rows"
            if {"too_long", "no_trained_tokens"} & self.dropped().keys()
            else "correct the rows",
        )

    def all_findings(self) -> list[Finding]:
        """Returns all findings, errors first, those of rows with their number."""
        whole = self.merged()
        found = list(self.findings)
        for path, count in whole.blank.items():
            message = f"{count:,} blank line{'s were' if count > 1 else ' was'} passed over"
            found.append(Finding("blank_lines", "info", path, message))
        for name, tally in zip(self.names, self.tallies, strict=True):
            if tally.columns:
                found.append(_unread(name, tally.columns))
        found += [note.finding() for note in whole.notes.values()]
        for note in whole.bad.values():
            if self.on_error == "stop":
                found.append(replace(note, fix=note.fix or _SKIP).finding())
            else:
                skipped = Note(
                    note.code,
                    "warning",
                    f"{{count}} rows skipped; the first: {note.message}",
                    note.fix,
                    note.count,
                    note.places,
                )
                found.append(skipped.finding())
        return sorted(found, key=lambda finding: _ORDER[finding.severity])

    def record(
        self, totals: Sequence[Totals], policies: dict[str, str], duplicates: int
    ) -> DataRecord:
        """Returns the record of the data check.

        Args:
            totals: Of the kept rows of each source, training and validation, before repetition.
            policies: The settings that say what becomes of rows that do not fit.
            duplicates: Training rows whose text another row has, too.
        """
        whole = self.merged()
        by_source = {
            name: {
                "rows": self.tallies[index].rows,
                "kept": own.rows,
                "tokens": own.tokens,
                "trained_tokens": own.trained,
            }
            for index, (name, own) in enumerate(zip(self.names, totals, strict=True))
        }
        lengths = _added([own.lengths for own in totals])
        kept = sum(own.rows for own in totals)
        dropped = self.dropped()
        if whole.rows != kept + sum(dropped.values()):
            raise RuntimeError(f"{whole.rows} rows, {kept} kept, dropped {dropped}")
        return DataRecord(
            rows=whole.rows,
            kept=kept,
            dropped=dropped,
            tokens=sum(own.tokens for own in totals),
            trained_tokens=sum(own.trained for own in totals),
            lengths=percentiles(lengths),
            by_source=by_source,
            findings=self.all_findings(),
            policies=policies,
            cut=whole.notes["cut"].count if "cut" in whole.notes else 0,
            duplicates=duplicates,
            scripts=shares(whole.letters),
            histogram=histogram(lengths),
        )


def _unread(source: str, columns: Mapping[str, int]) -> Finding:
    """Returns the finding about columns that nothing reads."""
    shown = ", ".join(f"{name!r} ({rows:,} rows)" for name, rows in list(columns.items())[:10])
    more = f" and {len(columns) - 10} more" if len(columns) > 10 else ""
    return Finding(
        "unread_columns",
        "info",
        source,
        f"columns that its format does not read: {shown}{more}",
        "map them with data.sources columns if they matter",
    )


def _added(counts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    longest = max((len(count) for count in counts), default=0)
    whole = np.zeros(longest, dtype=np.int64)
    for count in counts:
        whole[: len(count)] += count
    return whole


def histogram(rows: NDArray[np.int64], bins: int = 40) -> list[list[int]]:
    """Counts rows by length, in at most `bins` bins of a width of 1, 2 or 5 times a power of ten.

    Args:
        rows: Number of rows of each length in tokens, int64.
        bins: Most bins.

    Returns:
        `[first, last, rows]` of each bin, from the first one with a row to the last.
    """
    found = np.flatnonzero(rows)
    if not len(found):
        return []
    low, high = int(found[0]), int(found[-1])
    widths = (unit * 10**power for power in range(10) for unit in (1, 2, 5))
    width = next(each for each in widths if high // each - low // each < bins)
    start = low // width
    counts = np.zeros(high // width - start + 1, dtype=np.int64)
    np.add.at(counts, found // width - start, rows[found])
    return [
        [(start + at) * width, (start + at + 1) * width - 1, count]
        for at, count in enumerate(counts.tolist())
    ]


def percentiles(rows: NDArray[np.int64]) -> dict[str, int]:
    """Returns NumPy's percentiles of the lengths, from the number of rows of each length."""
    ends = np.cumsum(rows)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        return {"p50": 0, "p95": 0, "max": 0}

    def at(place: int) -> int:
        return int(np.searchsorted(ends, place, side="right"))

    found: dict[str, int] = {}
    for share in (50, 95):
        whole, part = divmod(share * (total - 1), 100)
        low, high = at(whole), at(min(whole + 1, total - 1))
        found[f"p{share}"] = low + (high - low) * part // 100
    return {**found, "max": at(total - 1)}
