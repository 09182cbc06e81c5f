"""The order of findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SEVERITIES = ["error", "warning", "info"]


def worst_first(findings: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sorts findings by severity; equal ones keep their order."""
    return sorted(map(dict, findings), key=lambda finding: SEVERITIES.index(finding["severity"]))
