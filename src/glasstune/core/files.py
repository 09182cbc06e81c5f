"""Files that are whole or absent: written aside, fsynced, renamed last."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glasstune.core.errors import RunError
from glasstune.core.units import format_bytes


def fsync_path(path: Path) -> None:
    """Flushes a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flushes every file below a folder, then the folders, deepest first."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync_path(Path(root, name))
        fsync_path(Path(root))


def write_text_atomic(path: Path, text: str) -> None:
    """Replaces a text file so that a reader sees the old or the new content, never a part.

    Raises:
        RunError: The disk is full; names path, bytes needed and free.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_full_named(path, needed=len(text.encode())):
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            fsync_path(path.parent)
        finally:
            aside.unlink(missing_ok=True)


def write_json_atomic(path: Path, value: Any) -> None:
    """Writes JSON with `write_text_atomic`; NaN and Inf become null, as JSON has neither."""
    write_text_atomic(path, dump_json(value, indent=2) + "\n")


def dump_json(value: Any, indent: int | None = None) -> str:
    """Serialises to strict JSON: NaN and Inf become null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@contextmanager
def disk_full_named(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns a full disk into an error that names path, bytes needed and bytes free.

    Args:
        path: What is being written.
        needed: Expected bytes, where known.

    Raises:
        RunError: `disk_full`; other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:  # safetensors wraps the OSError in a type of its own
        if not _is_disk_full(error):
            raise
        free = shutil.disk_usage(_existing_parent(path)).free
        wanted = f"needs {format_bytes(needed)}, " if needed is not None else ""
        raise RunError(
            "disk_full",
            f"the disk is full while writing: {wanted}{format_bytes(free)} free",
            where=str(path),
            fix="free space or set training.output_dir to another disk, then run with --resume; "
            "the last complete checkpoint is untouched",
        ) from error


def _is_disk_full(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(seen).lower()
        if "no space left" in text or "os error 28" in text or "disk quota" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _existing_parent(path: Path) -> Path:
    for candidate in (path, *path.absolute().parents):
        if candidate.is_dir():
            return candidate
    return Path("/")


def cache_folder() -> Path:
    """Returns where things made once are kept: `GLASSTUNE_CACHE`, else `~/.cache/glasstune`."""
    return Path(os.environ.get("GLASSTUNE_CACHE") or Path.home() / ".cache" / "glasstune")


def sha256_file(path: Path) -> str:
    """Returns the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
