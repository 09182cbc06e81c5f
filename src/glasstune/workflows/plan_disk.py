"""What a run writes, and whether there is room for it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from glasstune.core.findings import Finding
from glasstune.core.units import format_bytes
from glasstune.workflows.prepare_run import Prepared

if TYPE_CHECKING:
    from glasstune.planner.peak import Static

_SAVE_SECONDS = 600
"""Seconds between two checkpoints where `save_steps` is auto."""


def disk_bytes(prepared: Prepared, static: Static, updates: int, seconds: float) -> int:
    """Returns the most bytes of checkpoints and adapter that lie in the run folder at a time.

    Args:
        prepared: The run.
        static: Bytes of adapters and of their moments.
        updates: Of this start.
        seconds: Of training.
    """
    training, schedule = prepared.config.training, prepared.schedule
    epochs = math.ceil(updates / max(1, schedule.updates_per_epoch))
    if training.save_strategy == "epoch":
        saves = epochs
    elif training.save_steps == "auto":
        saves = epochs + int(seconds / _SAVE_SECONDS)
    else:
        saves = -(-updates // training.save_steps)
    if prepared.data.validation is not None:
        saves += 1  # the best one stays beside the newest
        limit = None if training.save_total_limit is None else training.save_total_limit + 1
    else:
        limit = training.save_total_limit
    # A new one is complete before an old one goes.
    kept = saves if limit is None else min(saves, limit + 1)
    return max(1, kept) * (static.adapters + static.optimizer) + static.adapters


def no_room(prepared: Prepared, needed: int) -> list[Finding]:
    """Says where the disk has less than the run writes."""
    output = prepared.config.training.output_dir
    folder = Path(output).expanduser().absolute() if output else Path.cwd()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free >= needed:
        return []
    text = f"the run writes {format_bytes(needed)}, and {format_bytes(free)} are free at {there}"
    fix = "free the disk, lower training.save_total_limit, or name another training.output_dir"
    return [Finding("disk_short", "warning", "training.output_dir", text, fix)]
