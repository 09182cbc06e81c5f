"""Files of one JSON object a line, written while a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

from glasstune.core.files import write_text_atomic


def supersede(path: Path, step: int) -> int:
    """Moves the rows past a checkpoint to `NAME.superseded.jsonl` beside the file.

    A half-written last line, as a kill leaves it, is dropped.

    Args:
        path: The file; nothing happens where there is none.
        step: The checkpoint's update; rows up to it stay.

    Returns:
        Number of rows moved.
    """
    if not path.exists():
        return 0
    kept: list[str] = []
    moved: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        (kept if (row.get("step") or 0) <= step else moved).append(line)
    if moved:
        with path.with_name(f"{path.stem}.superseded.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in moved)
    write_text_atomic(path, "".join(line + "\n" for line in kept))
    return len(moved)
