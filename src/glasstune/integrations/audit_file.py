"""`audit.jsonl` beside a Trainer's checkpoints: one record an audited step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glasstune.core.files import disk_full_named, dump_json, write_text_atomic

FILE = "audit.jsonl"


class AuditFile:
    """Appends records.

    Args:
        path: The file; its folder is made with the first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record; visible to readers at once.

        Raises:
            RunError: The disk is full.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with disk_full_named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(dump_json(dict(record)) + "\n")

    def supersede(self, step: int) -> int:
        """Moves the records past a step beside: training starts again from there.

        A half-written last line, as a kill leaves it, is dropped.

        Args:
            step: Records up to it stay; 0 = a new training, none stay.

        Returns:
            Number of records moved.
        """
        if not self.path.exists():
            return 0
        kept: list[str] = []
        moved: list[str] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            (kept if (row.get("step") or 0) <= step else moved).append(line)
        if moved:
            with self.path.with_name(f"{self.path.stem}.superseded.jsonl").open(
                "a", encoding="utf-8"
            ) as file:
                file.writelines(line + "\n" for line in moved)
        write_text_atomic(self.path, "".join(line + "\n" for line in kept))
        return len(moved)
