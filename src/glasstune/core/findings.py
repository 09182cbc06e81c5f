"""Findings: what a check saw, where, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One observation of a check (the same record in every command).

    Args:
        code: A stable name in snake case.
        severity: `error` stops a run, `warning` is printed, `info` is recorded.
        where: File and line, row, module path, tensor or config key.
        message: What was seen, with its numbers.
        fix: What to do; empty where nothing needs doing.
    """

    code: str
    severity: Severity
    where: str
    message: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        """Returns the JSON object of the contract."""
        return asdict(self)
