"""What one piece of the data showed: counts and notes, small enough to keep beside the rows.

A tally is plain JSON, so that a later run which finds the rows in the cache says the same about
them. Tallies are merged in the order of the pieces, whoever made them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from glasstune.core.findings import Finding, Severity
from glasstune.data.errors import RowError

PLACES = 5
"""Rows that a note names."""
_SHAPES = 20
"""Different messages of one code that are kept apart."""
_CHANGING = re.compile(r"\d+")
_COLUMNS = 50
"""Names of unread columns that are counted; rows may use texts of their own as names."""
_ONE = (
    ("{count} rows do not train an end token, so they do not", "1 row does not train an end token, "
     "so it does not"),
    ("{count} rows have an empty answer: they teach", "1 row has an empty answer: it teaches"),
    ("{count} rows are", "1 row is"), (" and are left out", " and is left out"),
    (" and were cut", " and was cut"), ("texts of {count} rows", "texts of 1 row"),
    ("in {count} rows", "in 1 row"), ("{count} rows skipped", "1 row skipped"),
    ("{count} rows have", "1 row has"), ("{count} rows hold", "1 row holds"),
    ("{count} rows list", "1 row lists"), ("{count} rows start", "1 row starts"),
    ("{count} rows bring", "1 row brings"), (": only their text is", ": only its text is"),
    ("{count} validation rows have", "1 validation row has"),
    ("{count} values are", "1 value is"),
    ("{count} texts appear", "1 text appears"),
)  # fmt: skip
"""How a message reads where it counts one row."""


@dataclass(slots=True)
class Note:
    """Rows that share an observation.

    Args:
        code: A stable name in snake case.
        severity: As in `Finding`.
        message: Of the first row; may hold `{count}`.
        fix: What to do.
        count: How many rows.
        places: The first of them.
    """

    code: str
    severity: Severity
    message: str
    fix: str = ""
    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, other: Note) -> None:
        """Takes in the rows of another note."""
        self.count += other.count
        self.places += other.places[: PLACES - len(self.places)]

    def text(self) -> str:
        """Returns the message with number and places."""
        counted = "{count}" in self.message
        message = self.message
        for many, one in _ONE if counted and self.count == 1 else ():
            message = message.replace(many, one)
        message = message.replace("{count}", f"{self.count:,}")
        if self.count < 2:
            return message
        more = self.count - len(self.places)
        file = self.places[0].rpartition(":")[0] + ":"
        also = ", ".join(self.places[1:])
        if len(file) > 1 and all(place.startswith(file) for place in self.places[1:]):
            word = "line " if len(self.places) == 2 and not more else "lines "
            also = word + ", ".join(place.removeprefix(file) for place in self.places[1:])
        also += f" and {more:,} more" if more else ""
        return f"{message} ({'' if counted else f'{self.count:,} such rows; '}also {also})"

    def finding(self, severity: Severity | None = None) -> Finding:
        """Returns it as a finding at its first place."""
        where = self.places[0] if self.places else ""
        return Finding(self.code, severity or self.severity, where, self.text(), self.fix)


@dataclass(slots=True)
class Tally:
    """Counts and notes of some rows.

    Args:
        rows: Rows read, bad ones included.
        kept: Rows that became documents.
        dropped: Rows that did not, by reason.
        bad: Notes of rows that are wrong, by code and kind of message.
        notes: Other notes, by code.
        blank: Blank lines by file.
        counts: Rows of which something is known that is only judged at the end.
        letters: Letters by script.
        added: Ids of added tokens in the rows.
        columns: Rows that have something in a column that nothing reads, by its name.
    """

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bad: dict[str, Note] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)
    blank: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    letters: dict[str, int] = field(default_factory=dict)
    added: list[int] = field(default_factory=list)
    columns: dict[str, int] = field(default_factory=dict)

    def bad_row(self, origin: str, error: RowError) -> None:
        """Counts a row that is wrong; alike ones share a note."""
        self.drop(error.code)
        note = Note(error.code, "error", error.message, error.fix, 1, [origin])
        _merge_bad(self.bad, note)

    def drop(self, reason: str) -> None:
        """Counts a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def note(self, code: str, severity: Severity, where: str, message: str, fix: str = "") -> None:
        """Notes an observation of one row; equal codes become one finding with their number.

        Args:
            code: A stable name in snake case.
            severity: As in `Finding`.
            where: The row.
            message: May hold `{count}`.
            fix: What to do.
        """
        note = self.notes.setdefault(code, Note(code, severity, message, fix))
        note.add(Note(code, severity, message, fix, 1, [where]))

    def count(self, name: str) -> None:
        """Counts a row of some kind."""
        self.counts[name] = self.counts.get(name, 0) + 1

    def column(self, name: str, rows: int = 1) -> None:
        """Counts rows with something in a column that nothing reads."""
        if name in self.columns or len(self.columns) < _COLUMNS:
            self.columns[name] = self.columns.get(name, 0) + rows

    def merge(self, other: Tally) -> None:
        """Takes in the tally of the rows that follow."""
        self.rows += other.rows
        self.kept += other.kept
        for mine, theirs in (
            (self.dropped, other.dropped),
            (self.blank, other.blank),
            (self.counts, other.counts),
            (self.letters, other.letters),
        ):
            for key, number in theirs.items():
                mine[key] = mine.get(key, 0) + number
        for name, number in other.columns.items():
            self.column(name, number)
        for note in other.bad.values():
            _merge_bad(self.bad, note)
        for code, note in other.notes.items():
            own = self.notes.setdefault(code, Note(code, note.severity, note.message, note.fix))
            own.add(note)
        self.added = sorted({*self.added, *other.added})

    def moved(self, old: str, new: str) -> Tally:
        """Returns it with places that start with another file's name.

        Args:
            old: What they start with now.
            new: What they start with then.
        """

        def at(notes: Mapping[str, Note]) -> dict[str, Note]:
            return {
                key: replace(note, places=[new + place.removeprefix(old) for place in note.places])
                for key, note in notes.items()
            }

        blank = {new + path.removeprefix(old): count for path, count in self.blank.items()}
        return replace(self, bad=at(self.bad), notes=at(self.notes), blank=blank)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Tally:
        """Reads what `to_dict` gave."""
        tally = cls(**value)
        tally.bad = {key: Note(**note) for key, note in value["bad"].items()}
        tally.notes = {key: Note(**note) for key, note in value["notes"].items()}
        return tally


def _merge_bad(into: dict[str, Note], note: Note) -> None:
    """Adds a note of bad rows to those of its kind.

    Two messages are of a kind when they agree up to numbers and to what follows a colon, which
    mostly quotes the row.
    """
    kind = _CHANGING.sub("", note.message.partition(": ")[0])
    key = f"{note.code}: {kind}"
    same_code = [found for found in into.values() if found.code == note.code]
    if key not in into and len(same_code) >= _SHAPES:
        same_code[-1].add(note)
        return
    into.setdefault(key, Note(note.code, note.severity, note.message, note.fix)).add(note)
