"""The run folder: where it is, when it may be written, and what it records of a run."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.core.config_load import dump_config
from glasstune.core.errors import InputError
from glasstune.core.files import write_json_atomic, write_text_atomic

# What a run writes; `--overwrite` removes these and nothing else.
OWN_FILES = (
    "config.yaml",
    "run.json",
    "fp8.json",
    "metrics.jsonl",
    "metrics.superseded.jsonl",
    "audit.jsonl",
    "audit.superseded.jsonl",
    "report.html",
)
OWN_FOLDERS = ("adapter", "checkpoints", "tensorboard")

# Keys that may differ on resume: they change no number, or only the schedule's length.
FREE_ON_RESUME = re.compile(
    r"audit\.|data\.num_workers$|data\.(sources|validation)\.\d+\.path$|model\.path$"
    r"|training\.(output_dir|recompute|logging_steps|save_|eval_|report_to|run_name|num_train_epochs"
    r"|max_steps|load_best|metric_for_best|early_stopping|max_memory|distributed)"
)

PACKAGES = (
    "glasstune", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "datasets",
    "tokenizers", "numpy",
)  # fmt: skip


def output_folder(config: Config, choices: Choices) -> Path:
    """Returns `training.output_dir`, or runs/<model>-<data> where it is not set or empty."""
    if not config.training.output_dir:
        model = (
            Path(config.model.path).stem
            if config.model.path.endswith(".gguf")
            else Path(config.model.path.rstrip("/")).name
        )
        first = config.data.sources[0]
        data = first.name or Path(first.path).stem
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model}-{data}").strip("-").lower() or "run"
        config.training.output_dir = choices.record(
            "training.output_dir", f"runs/{name}", "named after model and data"
        )
    return Path(str(config.training.output_dir))


def claim_folder(folder: Path, resume: bool, overwrite: bool) -> list[Path]:
    """Makes the folder, or refuses to touch a run that is there; nothing is removed yet.

    Returns:
        The folders that were made, the innermost first.

    Raises:
        InputError: It holds a run and neither way was named, both were, it is a file, or there
            is nothing to resume.
    """
    if resume and overwrite:
        raise InputError(
            "resume_and_overwrite",
            "--resume and --overwrite exclude each other",
            fix="keep one of them",
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(
            "output_is_file",
            "training.output_dir is a file",
            where=str(folder),
            fix="name a folder",
        )
    holds_run = _holds_run(folder)
    if resume and not holds_run:
        raise InputError(
            "nothing_to_resume",
            "there is no run in this folder",
            where=str(folder),
            fix="check training.output_dir, or start without --resume",
        )
    if holds_run and not resume and not overwrite:
        raise InputError(
            "output_exists",
            "this folder already holds a run",
            where=str(folder),
            fix="--resume goes on with it, --overwrite starts anew, "
            "training.output_dir=... writes elsewhere",
        )
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _remove_empty(made)
        raise InputError(
            "output_not_writable",
            f"nothing can be written there: {error.strerror}",
            where=str(folder),
            fix="training.output_dir=... names another folder",
        ) from None
    return made


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (*OWN_FILES, *OWN_FOLDERS))


def _remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders, the innermost first, as far as nothing is in them."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def resumed_by_torchrun(
    folder: Path, restart: int, resume: str | bool | None, overwrite: bool, choices: Choices
) -> tuple[str | bool | None, bool]:
    """Returns `resume` and `overwrite` of this start: torchrun repeats the words of the first.

    Args:
        folder: The run folder.
        restart: How often torchrun has started the run again.
        resume: As given.
        overwrite: As given.
        choices: Where it is noted.
    """
    if restart == 0 or attempts(folder) == 0:
        return resume, overwrite
    choices.record("restart", restart, "torchrun has started the run again: it is resumed")
    return True, False


@contextmanager
def sole_writer(folder: Path, choices: Choices, made: Sequence[Path] = ()) -> Iterator[None]:
    """Holds the folder's lock, so that two runs never mix their checkpoints.

    The kernel lets go of the lock when the process dies: a kill leaves nothing to clean up. A start
    that fails before it has written anything takes its lock and the folders it made away again.

    Args:
        folder: The run folder.
        choices: Where a file system without locks is noted.
        made: Folders that this start has made, the innermost first.

    Raises:
        InputError: Another process is training into this folder.
    """
    path = folder / ".lock"
    fresh = not path.exists()
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder) from None
        except OSError as error:
            choices.record("run_folder.lock", False, f"this file system has none: {error.strerror}")
        if not _still_there(path, file):  # a start that failed has just taken it away
            raise _in_use(folder)
        try:
            yield
        except BaseException:
            if fresh and not _holds_run(folder):
                path.unlink(missing_ok=True)
                _remove_empty(made)
            raise


def _opened(path: Path) -> IO[str]:
    try:
        return path.open("w")
    except FileNotFoundError:  # its folder went with a start that failed
        raise _in_use(path.parent) from None


def _still_there(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _in_use(folder: Path) -> InputError:
    return InputError(
        "output_in_use",
        "another run is writing into this folder right now",
        where=str(folder),
        fix="wait for it or stop it, or name another training.output_dir",
    )


def clear_run(folder: Path) -> None:
    """Removes what an earlier run wrote, for `--overwrite`.

    Call it once the new run's data, model and adapter are read: a mistake in the config must not
    cost the old run, and the new one may start from the old one's adapter.
    """
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in OWN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings and lists to dotted keys."""
    if isinstance(value, dict):
        items: list[tuple[str, Any]] = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {prefix: value}
    result: dict[str, Any] = {}
    for key, item in items:
        result.update(flat(item, f"{prefix}.{key}" if prefix else key))
    return result


def binding_config(config: Config) -> dict[str, Any]:
    """The flat config without what may change on resume."""
    every = flat(config.model_dump(mode="json", by_alias=True))
    return {key: value for key, value in every.items() if not FREE_ON_RESUME.match(key)}


def versions() -> dict[str, str]:
    """Versions of Python and of every package that can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def attempts(folder: Path) -> int:
    """Number of starts that a run has had, by its `run.json`."""
    path = folder / "run.json"
    if not path.is_file():
        return 0
    return int(json.loads(path.read_text(encoding="utf-8")).get("attempt", 0))


def write_start(folder: Path, config: Config, choices: Choices, extra: dict[str, Any]) -> None:
    """Writes `config.yaml` (resolved) and `run.json`."""
    write_text_atomic(folder / "config.yaml", dump_config(config))
    write_run(folder, choices, extra)


def write_run(folder: Path, choices: Choices, extra: dict[str, Any]) -> None:
    """Writes `run.json`: versions, device, choices with reasons, the adapter's checkpoint."""
    record = {"versions": versions(), **extra, "choices": choices.to_list()}
    write_json_atomic(folder / "run.json", record)
