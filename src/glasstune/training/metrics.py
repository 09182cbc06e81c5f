"""`metrics.jsonl`: one object an event, appended and never rewritten except on resume."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from glasstune.core import jsonl
from glasstune.core.files import disk_full_named, dump_json
from glasstune.core.memory import peak_resident_bytes
from glasstune.core.protocols import MetricsWriter

FILE = "metrics.jsonl"
AUDIT_FILE = "audit.jsonl"
"""What the audit writes beside it (see `core.protocols.StepAudit`)."""


class MetricsLog:
    """Appends events to the run's file and passes them to other writers.

    Args:
        folder: The run folder.
        attempt: 1 for the first start, one more for each resume.
        writers: Further sinks.
    """

    def __init__(self, folder: Path, attempt: int, writers: Sequence[MetricsWriter] = ()) -> None:
        self.path = folder / FILE
        self.attempt = attempt
        self.writers = tuple(writers)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, event: Mapping[str, Any]) -> None:
        """Writes one event; visible to readers at once.

        Raises:
            RunError: The disk is full.
        """
        full = {**event, "attempt": self.attempt}
        with disk_full_named(self.path):
            self._file.write(dump_json(full) + "\n")
            self._file.flush()
        for writer in self.writers:
            writer.write(full)

    def sync(self) -> None:
        """Flushes to the disk, so that a checkpoint is never newer than its metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file and the writers."""
        self._file.close()
        for writer in self.writers:
            writer.close()


class Unwritten:
    """Stands where another rank writes the metrics."""

    def write(self, event: Mapping[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def supersede(folder: Path, step: int) -> int:
    """Moves the rows past a checkpoint to `*.superseded.jsonl`, of metrics and audits alike.

    Args:
        folder: The run folder.
        step: The checkpoint's update; rows up to it stay.

    Returns:
        Number of metrics rows moved.
    """
    jsonl.supersede(folder / AUDIT_FILE, step)
    return jsonl.supersede(folder / FILE, step)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the run so far: allocated bytes on a GPU, resident bytes of the process else."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
