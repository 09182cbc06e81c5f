"""What is wrong with one row. Whether it stops the run is decided in `ledger.py`."""

from __future__ import annotations

from typing import NoReturn


class RowError(Exception):
    """One row cannot be trained; the rest of the data is not concerned.

    Args:
        code: A stable name in snake case; the key under which skipped rows are counted.
        message: What is wrong, with the turn or key where there is one.
        fix: What to do; empty where the message says it.
    """

    def __init__(self, code: str, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fix = fix


def refuse(code: str, message: str, fix: str = "") -> NoReturn:
    """Raises a `RowError`."""
    raise RowError(code, message, fix)
