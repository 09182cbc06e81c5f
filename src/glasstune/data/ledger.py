"""What happened to the rows: kept, dropped and why, tokens, findings.

Alike bad rows are one entry with their number and the first few places, so that a user sees
everything that is wrong at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glasstune.core.batch import IntArray
from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.core.records import DataRecord
from glasstune.data.documents import StoredDocuments
from glasstune.data.tally import Note, Tally
from glasstune.data.texts import shares

_SHOWN = 8
_ORDER = {"error": 0, "warning": 1, "info": 2}


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
                fix=first.fix or "correct the row, or set data.on_error: skip to leave it out",
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
        if self.removed:
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
            fix="raise data.max_length where rows are too long, or correct the rows",
        )

    def all_findings(self) -> list[Finding]:
        """Returns all findings, errors first, those of rows with their number."""
        whole = self.merged()
        found = list(self.findings)
        for path, count in whole.blank.items():
            message = f"{count} blank lines were passed over"
            found.append(Finding("blank_lines", "info", path, message))
        found += [note.finding() for note in whole.notes.values()]
        for note in whole.bad.values():
            if self.on_error == "stop":
                found.append(note.finding())
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
        self, documents: StoredDocuments, policies: dict[str, str], duplicates: int
    ) -> DataRecord:
        """Returns the record of the data check.

        Args:
            documents: All kept documents, training and validation, before repetition.
            policies: The settings that say what becomes of rows that do not fit.
            duplicates: Training rows whose text another row has, too.
        """
        whole = self.merged()
        lengths, trained, sources = documents.lengths, documents.trained, documents.sources
        by_source: dict[str, dict[str, int]] = {}
        for index, name in enumerate(self.names):
            own = sources == index
            by_source[name] = {
                "rows": self.tallies[index].rows,
                "kept": int(own.sum()),
                "tokens": int(lengths.sum(dtype=np.int64, where=own)),
                "trained_tokens": int(trained.sum(dtype=np.int64, where=own)),
            }
        dropped = self.dropped()
        if whole.rows != len(documents) + sum(dropped.values()):
            raise RuntimeError(f"{whole.rows} rows, {len(documents)} kept, dropped {dropped}")
        return DataRecord(
            rows=whole.rows,
            kept=len(documents),
            dropped=dropped,
            tokens=int(lengths.sum(dtype=np.int64)),
            trained_tokens=int(trained.sum(dtype=np.int64)),
            lengths=_percentiles(lengths),
            by_source=by_source,
            findings=self.all_findings(),
            policies=policies,
            cut=whole.notes["cut"].count if "cut" in whole.notes else 0,
            duplicates=duplicates,
            scripts=shares(whole.letters),
            histogram=histogram(documents.lengths),
        )


def histogram(lengths: NDArray[np.int32], bins: int = 40) -> list[list[int]]:
    """Counts rows by length, in at most `bins` bins of a width of 1, 2 or 5 times a power of ten.

    Args:
        lengths: Tokens of each row, int32.
        bins: Most bins.

    Returns:
        `[first, last, rows]` of each bin, from the first one with a row to the last.
    """
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    widths = (unit * 10**power for power in range(10) for unit in (1, 2, 5))
    width = next(each for each in widths if high // each - low // each < bins)
    start = low // width
    counts = np.bincount(lengths // width - start).tolist()
    return [
        [(start + at) * width, (start + at + 1) * width - 1, count]
        for at, count in enumerate(counts)
    ]


def _percentiles(lengths: IntArray) -> dict[str, int]:
    """Returns NumPy's percentiles of an array that may be sorted, without its copies in float64."""
    if not len(lengths):
        return {"p50": 0, "p95": 0, "max": 0}
    lengths.sort()
    found: dict[str, int] = {}
    for share in (50, 95):
        whole, part = divmod(share * (len(lengths) - 1), 100)
        above = min(whole + 1, len(lengths) - 1)
        low, high = int(lengths[whole]), int(lengths[above])
        found[f"p{share}"] = low + (high - low) * part // 100
    return {**found, "max": int(lengths[-1])}
