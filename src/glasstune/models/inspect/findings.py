"""Traps of a base model and its precision, as findings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glasstune.core.findings import Finding

if TYPE_CHECKING:
    from glasstune.models.inspect.source import ModelSource


def source_findings(source: ModelSource) -> list[Finding]:
    """Returns what holds at every precision."""
    return []
