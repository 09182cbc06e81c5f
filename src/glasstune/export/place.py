"""The output folder: whole or absent, and never another's."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from glasstune.core.errors import InputError, RunError
from glasstune.core.files import fsync_path, fsync_tree
from glasstune.core.units import format_bytes

_OURS = ("config.json", "certificate.json")
_LOCK = ".lock"
_LONG_SECONDS = 3600
_HERE = -100  # AT_FDCWD of the kernel
_RENAME_EXCHANGE = 2


def check_output(output: Path, sources: Sequence[Path], *, force: bool) -> None:
    """Refuses an output that would cost something, before anything is read.

    Args:
        output: The folder to make.
        sources: What is read: base, adapter, run.
        force: Whether a folder that is there may be replaced.

    Raises:
        InputError: `output_exists`, `output_is_file`, `output_is_source`, `output_is_held`,
            `output_not_a_model`, `output_not_writable`.
    """
    where = str(output)
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        kind = "a link" if output.is_symlink() else "a file"
        raise InputError(
            "output_is_file", f"the output is {kind}", where=where, fix="name a folder"
        )
    real = output.resolve()
    for source in sources:
        inside = source.resolve()
        if real == inside or real in inside.parents:
            raise InputError(
                "output_is_source",
                f"the output is, or holds, what is read: {source}",
                where=where,
                fix="name another folder with --output",
            )
    here = Path.cwd()
    inside_it = real == here or real in here.parents
    if output.is_dir() and (inside_it or os.path.ismount(output)):
        # Whole or absent means renamed, and such a folder cannot change its name.
        what = "is, or holds, the folder in which the command runs"
        what = what if inside_it else "is a mount point"
        raise InputError(
            "output_is_held",
            f"the output {what}",
            where=where,
            fix=f"name a new folder inside it, for example {output / 'merged'}",
        )
    if output.is_dir() and any(output.iterdir()):
        if not force:
            raise InputError(
                "output_exists",
                "the output folder is there already",
                where=where,
                fix="--force replaces it, --output names another",
            )
        if not any((output / name).is_file() for name in _OURS):
            raise InputError(
                "output_not_a_model",
                "the folder to replace holds no model (neither config.json nor certificate.json)",
                where=where,
                fix="remove it yourself, or name another folder with --output",
            )
    near = _nearest(output)
    try:
        with tempfile.TemporaryFile(dir=near):
            pass
    except OSError as error:
        raise InputError(
            "output_not_writable",
            f"nothing can be written there: {error.strerror}",
            where=str(near),
            fix="name another folder with --output",
        ) from None


def _nearest(output: Path) -> Path:
    """Returns the folder that is there already and will hold the output, or its new parents."""
    return next(folder for folder in output.absolute().parents if folder.exists())


def check_space(output: Path, needed: int) -> None:
    """Refuses a merge that the disk cannot hold, before it is begun.

    Raises:
        RunError: `disk_full`.
    """
    near = _nearest(output)
    free = shutil.disk_usage(near).free
    if free < needed:
        raise RunError(
            "disk_full",
            f"the output needs {format_bytes(needed)}, {format_bytes(free)} are free",
            where=str(near),
            fix="free space, or name a folder on another disk with --output",
        )


@contextmanager
def aside(output: Path) -> Iterator[Path]:
    """Gives a hidden folder beside the output; it is gone afterwards unless it was put in place.

    Missing parents of the output are made here, so that a refusal before leaves none of them.
    What a kill left of an earlier merge into the same output is removed first: its lock is free.

    Args:
        output: Checked by `check_output`.
    """
    prefix = f".{output.name}.merge-"
    output.parent.mkdir(parents=True, exist_ok=True)
    for left in output.parent.glob(f"{glob.escape(prefix)}*"):
        if _left_over(left):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
    folder.chmod(0o755)
    with (folder / _LOCK).open("w") as file:
        _lock(file)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, output: Path) -> None:
    """Renames a finished folder to the output.

    One that is there changes places with it in one step of the kernel, so that a kill leaves the
    old or the new; only where the file system has no such step, the old one moves away first.

    Raises:
        OSError: The file system refuses; the old output is where it was.
        RunError: `output_is_held`: the old output cannot be moved; it is where it was.
    """
    fsync_tree(folder)
    if not output.exists():
        folder.rename(output)
    elif not _exchange(folder, output):
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.merge-", dir=output.parent))
        try:
            output.rename(old / "old")
        except OSError as error:
            old.rmdir()
            raise RunError(
                "output_is_held",
                f"the folder that is there cannot be replaced: {error.strerror}",
                where=str(output),
                fix="name a new folder with --output",
            ) from error
        try:
            folder.rename(output)
        except OSError:
            (old / "old").rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    (output / _LOCK).unlink(missing_ok=True)  # held until here: nobody takes it for a leftover
    fsync_path(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step (Linux); returns whether the system could."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


def _lock(file: IO[str]) -> None:
    # A file system without locks: its leftovers stay.
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _left_over(folder: Path) -> bool:
    """Whether no process writes there any more."""
    try:
        with open(folder / _LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        # Just made, or the old output on its way out: only what stayed for long is left over.
        return time.time() - folder.stat().st_mtime > _LONG_SECONDS
    except OSError:
        return False
    return True
