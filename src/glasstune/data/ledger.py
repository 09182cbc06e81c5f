"""What happened to the rows: kept, dropped and why, tokens, findings.

Errors of rows are collected, so that a user sees several at once and not one a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from glasstune.core.batch import Document
from glasstune.core.errors import InputError
from glasstune.core.findings import Finding, Severity
from glasstune.core.records import DataRecord
from glasstune.data.errors import RowError

ERROR_CAP = 50
"""Row errors after which the rest of the data is not read."""
_SHOWN = 8


@dataclass(slots=True)
class _Seen:
    """Rows that share an observation."""

    severity: Severity
    message: str
    fix: str
    where: str
    count: int = 0


@dataclass
class Ledger:
    """The books of one data preparation.

    Args:
        names: All sources, in order.
        on_error: Whether a bad row stops the run or is counted.
    """

    names: Sequence[str]
    on_error: Literal["stop", "skip"]
    rows: Counter[int] = field(default_factory=Counter)
    dropped: list[Counter[str]] = field(default_factory=list)
    errors: list[tuple[str, RowError]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    _seen: dict[str, _Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dropped = [Counter() for _ in self.names]

    def bad_row(self, source: int, origin: str, error: RowError) -> None:
        """Notes a bad row.

        Raises:
            InputError: The cap is reached and `on_error` is stop.
        """
        self.dropped[source][error.code] += 1
        if len(self.errors) < ERROR_CAP:
            self.errors.append((origin, error))
        if self.on_error == "stop" and len(self.errors) >= ERROR_CAP:
            self.raise_errors()

    def drop(self, source: int, reason: str) -> None:
        """Counts a row that is left out without being wrong."""
        self.dropped[source][reason] += 1

    def note(self, code: str, severity: Severity, where: str, message: str, fix: str = "") -> None:
        """Notes an observation of one row; equal codes become one finding with their number.

        Args:
            code: A stable name in snake case.
            severity: As in `Finding`.
            where: The row; the first one is shown.
            message: May hold `{count}`.
            fix: What to do.
        """
        seen = self._seen.setdefault(code, _Seen(severity, message, fix, where))
        seen.count += 1

    def raise_errors(self) -> None:
        """Raises the collected row errors as one.

        Raises:
            InputError: There are any and `on_error` is stop.
        """
        if self.on_error == "skip" or not self.errors:
            return
        origin, first = self.errors[0]
        if len(self.errors) == 1:
            raise InputError(
                first.code,
                first.message,
                where=origin,
                fix=first.fix or "correct the row, or set data.on_error: skip to leave it out",
            )
        codes = {error.code for _, error in self.errors}
        count = f"{len(self.errors)}" + (" or more" if len(self.errors) >= ERROR_CAP else "")
        lines = [f"{place}: {error.message}" for place, error in self.errors[1:_SHOWN]]
        more = len(self.errors) - len(lines) - 1
        tail = [f"and {more} more"] if more > 0 else []
        raise InputError(
            first.code if len(codes) == 1 else "bad_rows",
            "\n  ".join([f"{first.message} ({count} bad rows in all)", *lines, *tail]),
            where=origin,
            fix=first.fix or "correct the rows, or set data.on_error: skip to leave them out",
        )

    def all_findings(self) -> list[Finding]:
        """Returns all findings, those of rows with their number."""
        dropped = sum(self.dropped, Counter[str]())
        found = list(self.findings)
        for code, seen in self._seen.items():
            message = seen.message.replace("{count}", str(seen.count))
            found.append(Finding(code, seen.severity, seen.where, message, seen.fix))
        if self.on_error == "skip":
            for code in dict.fromkeys(error.code for _, error in self.errors):
                origin, error = next(pair for pair in self.errors if pair[1].code == code)
                message = f"{dropped[code]} rows skipped; the first: {error.message}"
                found.append(Finding(code, "warning", origin, message, error.fix))
        return found

    def record(self, documents: Sequence[Document]) -> DataRecord:
        """Returns the record of the data check.

        Args:
            documents: All kept documents, training and validation, before repetition.
        """
        lengths = np.asarray([len(document) for document in documents] or [0])
        by_source: dict[str, dict[str, int]] = {}
        for index, name in enumerate(self.names):
            own = [document for document in documents if document.source == index]
            by_source[name] = {
                "rows": self.rows[index],
                "kept": len(own),
                "tokens": sum(len(document) for document in own),
                "trained_tokens": sum(document.trained_tokens for document in own),
            }
        return DataRecord(
            rows=sum(self.rows.values()),
            kept=len(documents),
            dropped=dict(sum(self.dropped, Counter[str]())),
            tokens=int(lengths.sum()),
            trained_tokens=sum(document.trained_tokens for document in documents),
            lengths={
                "p50": int(np.percentile(lengths, 50)),
                "p95": int(np.percentile(lengths, 95)),
                "max": int(lengths.max()),
            },
            by_source=by_source,
            findings=self.all_findings(),
        )
