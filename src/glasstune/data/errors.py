"""What is wrong with one row (whether it stops the run is decided in `ledger.py`) or a folder."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from glasstune.core.errors import GlasstuneError, InputError, RunError
from glasstune.core.units import format_bytes


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


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a failed write into an error that names the folder and the way out.

    Raises:
        InputError: The folder cannot be written.
        RunError: The disk is full.
    """
    try:
        yield
    except GlasstuneError:
        raise
    except OSError as error:
        way = "set GLASSTUNE_CACHE to a folder on another disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            root = next(path for path in folder.absolute().parents if path.is_dir())
            raise RunError(
                "disk_full",
                "the disk is full while tokenised rows are written: "
                f"{format_bytes(shutil.disk_usage(root).free)} free",
                where=str(folder),
                fix=f"free space, or {way}; what is finished is used by the next run",
            ) from error
        raise InputError(
            "cache_not_writable",
            f"tokenised rows cannot be written here: {error.strerror or error}",
            where=str(folder),
            fix=way,
        ) from error
