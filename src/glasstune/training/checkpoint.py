"""Checkpoints: written aside, flushed, marked complete, renamed last.

A folder `checkpoints/step-N` holds a PEFT adapter (usable as it is), `optimizer.pt`, `random.pt`
and `state.json`; `complete.json` lists every file with size and SHA-256. A folder without that
mark is no checkpoint.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from glasstune.adapters.state import restore_state
from glasstune.core.errors import InputError, RunError
from glasstune.core.files import (
    disk_full_named,
    dump_json,
    fsync_path,
    fsync_tree,
    sha256_file,
)
from glasstune.core.tensors import load_tensors
from glasstune.training.distributed import World
from glasstune.training.rng import random_state, restore_random_state

FORMAT = 1
MARK = "complete.json"
STATE, OPTIMIZER, RANDOM, ADAPTER = (
    "state.json",
    "optimizer.pt",
    "random.pt",
    "adapter_model.safetensors",
)


@dataclass
class LoopState:
    """Where the loop stands. Everything else follows from the config and the data.

    Args:
        step: Updates done.
        epoch: 0-based epoch of the next row.
        position: Rows of that epoch already used.
        trained_tokens: Targets trained so far.
        skipped: Updates passed over because they had no trained token.
        best_step: Update with the lowest held-out loss, or None.
        best_loss: That loss.
        loss_before: Held-out loss before the first update.
        last_loss: Newest held-out loss.
        last_eval: Update of the newest evaluation; -1 = none.
        stale: Evaluations since the best.
        seconds: Time spent in earlier attempts and this one.
        attempt: Number of starts.
        total: Updates that the run is planned for.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    loss_before: float | None = None
    last_loss: float | None = None
    last_eval: int = -1
    stale: int = 0
    seconds: float = 0.0
    attempt: int = 1
    total: int = 0


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to; compared on resume.

    Args:
        config: Flat resolved config without the keys that may change.
        data: Fingerprint of rows, labels and packing.
        base: Fingerprint of the base model.
        parameters: Names and shapes of the trained tensors, in the optimiser's order.
        environment: Versions, device, threads, instruction set: a difference costs the exact
            bits, so it is said, but stops nothing.
    """

    config: Mapping[str, Any]
    data: str
    base: str
    parameters: Mapping[str, list[int]]
    environment: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(
    root: Path,
    state: LoopState,
    identity: Identity,
    optimizer: Optimizer,
    write_adapter: Callable[[Path], None],
) -> Path:
    """Writes `root/step-N` so that a kill at any moment leaves the old ones or the new one.

    Args:
        root: The `checkpoints` folder.
        state: Where the loop stands.
        identity: What the run is.
        optimizer: Its state is saved.
        write_adapter: Writes the PEFT adapter with tokenizer and template into a folder.

    Returns:
        The checkpoint's folder.

    Raises:
        RunError: The disk is full; nothing half is left.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{state.step}"
    aside = root / f".step-{state.step}.{os.getpid()}.tmp"
    needed = _size(_newest_folder(root)) or _state_bytes(optimizer)
    try:
        with disk_full_named(final, needed):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            write_adapter(aside)
            _write_state(optimizer.state_dict(), aside / OPTIMIZER)
            _write_state(random_state(), aside / RANDOM)
            record = {"format": FORMAT, "loop": asdict(state), "identity": asdict(identity)}
            (aside / STATE).write_text(dump_json(record, indent=1), encoding="utf-8")
            files = {
                str(path.relative_to(aside)): [path.stat().st_size, sha256_file(path)]
                for path in sorted(aside.rglob("*"))
                if path.is_file()
            }
            (aside / MARK).write_text(dump_json({"files": files}, indent=1), encoding="utf-8")
            fsync_tree(aside)
            if final.exists():  # the same update, saved again after a resume
                shutil.rmtree(final)
            aside.rename(final)
            fsync_path(root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def _write_state(value: Any, path: Path) -> None:
    """Serialises in memory first: torch's own writer hides a full disk behind other errors."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def _size(folder: Path | None) -> int:
    if folder is None:
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _state_bytes(optimizer: Optimizer) -> int:
    tensors = [value for group in optimizer.param_groups for value in group["params"]]
    return sum(3 * int(value.numel()) * int(value.element_size()) for value in tensors)


def _newest_folder(root: Path) -> Path | None:
    steps = complete_steps(root)
    return root / f"step-{steps[-1]}" if steps else None


def _folders(root: Path) -> list[tuple[int, Path]]:
    found = []
    for path in root.glob("step-*") if root.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def complete_steps(root: Path) -> list[int]:
    """Updates with a checkpoint that carries its completeness mark, ascending."""
    return [step for step, path in _folders(root) if (path / MARK).is_file()]


def find_checkpoint(root: Path, which: str | None, say: Callable[[str], None]) -> Path | None:
    """Finds the checkpoint to go on from.

    Args:
        root: The `checkpoints` folder.
        which: `step-N`, or None for the newest complete one.
        say: Told about folders that are passed over.

    Returns:
        The folder, or None where no complete checkpoint exists.

    Raises:
        InputError: `which` is not there or not complete.
    """
    steps = complete_steps(root)
    for _, path in _folders(root):
        if not (path / MARK).is_file():
            say(f"warning: {path} has no completeness mark ({MARK}); it is passed over")
    if which is not None:
        folder = root / which
        if not (folder / MARK).is_file():
            names = ", ".join(f"step-{step}" for step in steps) or "none"
            raise InputError(
                "checkpoint_missing",
                f"there is no complete checkpoint {which!r}; complete ones: {names}",
                where=str(root),
                fix="name one of them, or give --resume alone for the newest",
            )
        return folder
    return root / f"step-{steps[-1]}" if steps else None


def read_state(folder: Path) -> tuple[LoopState, Identity]:
    """Checks every file against the mark and reads where the loop stood.

    Raises:
        InputError: A file is missing or changed (named), or the format is unknown.
    """
    files = json.loads((folder / MARK).read_text(encoding="utf-8"))["files"]
    for name, (size, digest) in files.items():
        path = folder / name
        problem = ""
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != size:
            problem = f"has {path.stat().st_size} bytes, {size} were written"
        elif sha256_file(path) != digest:
            problem = "has other content than was written"
        if problem:
            raise InputError(
                "checkpoint_damaged",
                f"{name} {problem}: the run cannot go on exactly from here",
                where=str(path),
                fix="resume from another checkpoint with --resume step-N, or start anew with "
                "--overwrite",
            )
    record = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        raise InputError(
            "checkpoint_format",
            f"the checkpoint has format {record.get('format')}, this version reads {FORMAT}",
            where=str(folder / STATE),
            fix="resume with the version that wrote it",
        )
    return LoopState(**record["loop"]), Identity(**record["identity"])


def check_identity(saved: Identity, now: Identity, folder: Path) -> list[str]:
    """Refuses to go on with another run's data, base, adapter or settings.

    Returns:
        Differences of the environment, which cost bit equality only.

    Raises:
        InputError: Names what differs.
    """
    where = str(folder / STATE)
    fix = "resume with what the run was started with, or start anew with --overwrite"
    changed = [
        f"{key}: {saved.config.get(key)!r} -> {now.config.get(key)!r}"
        for key in sorted({*saved.config, *now.config})
        if saved.config.get(key) != now.config.get(key)
    ]
    if changed:
        raise InputError(
            "resume_config", f"the config differs: {'; '.join(changed)}", where=where, fix=fix
        )
    for code, what, before, after in (
        ("resume_data", "the training data differ", saved.data, now.data),
        ("resume_base", "the base model differs", saved.base, now.base),
    ):
        if before != after:
            raise InputError(
                code, f"{what} (fingerprint {before[:12]} -> {after[:12]})", where=where, fix=fix
            )
    if list(saved.parameters.items()) != list(now.parameters.items()):  # the order counts too
        gone = [name for name in saved.parameters if name not in now.parameters]
        new = [name for name in now.parameters if name not in saved.parameters]
        other = [
            name
            for name in saved.parameters
            if name in now.parameters and saved.parameters[name] != now.parameters[name]
        ]
        raise InputError(
            "resume_adapter",
            f"the trained tensors differ: {len(gone)} missing {gone[:3]}, {len(new)} new "
            f"{new[:3]}, {len(other)} of another shape {other[:3]}"
            if gone or new or other
            else "the trained tensors come in another order",
            where=where,
            fix=fix,
        )
    return [
        f"{key}: {saved.environment.get(key)} -> {now.environment.get(key)}"
        for key in sorted({*saved.environment, *now.environment})
        if saved.environment.get(key) != now.environment.get(key)
    ]


def restore(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Loads adapter, optimiser and random state; all are read on the CPU first.

    Raises:
        RunError: The adapter's keys do not match the model's.
    """
    restore_state(model, load_tensors(folder / ADAPTER))
    saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(saved)
    restore_random_state(torch.load(folder / RANDOM, map_location="cpu", weights_only=True))


def share_state(
    world: World, state: LoopState, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> LoopState:
    """Gives every rank what rank 0 begins or goes on with.

    Args:
        world: The ranks; all of them call this.
        state: Rank 0's counts.
        parameters: Trained tensors; those of the other ranks are overwritten.
        optimizer: Over them.

    Returns:
        Rank 0's state, on every rank.
    """
    if world.size == 1:
        return state
    world.share_parameters(list(parameters.values()))
    content = None
    if world.writes:
        moments = None if state.step == 0 else _on_cpu(optimizer.state_dict())
        content = {"loop": asdict(state), "optimizer": moments, "random": random_state()}
    given = world.broadcast(content)
    if not world.writes:
        if given["optimizer"] is not None:
            optimizer.load_state_dict(given["optimizer"])
        restore_random_state(given["random"])
    return LoopState(**given["loop"])


def _on_cpu(value: Any) -> Any:
    """A state dict whose tensors another process can read."""
    return tree_map(lambda part: part.cpu() if isinstance(part, torch.Tensor) else part, value)


def forget_lost_best(root: Path, state: LoopState) -> str:
    """Forgets a best checkpoint that is no longer there, so that another one can be the best.

    Rotation keeps the best of the newest past: a run that goes back to an older checkpoint may
    find that the best of that time was deleted since.

    Returns:
        What was forgotten, in words; empty where nothing was.
    """
    if state.best_step is None or state.best_step in complete_steps(root):
        return ""
    gone = f"step-{state.best_step} (held-out loss {state.best_loss:.4f})"
    measured = state.last_eval == state.step
    state.best_step, state.best_loss = (state.step, state.last_loss) if measured else (None, None)
    state.stale = 0
    return f"the best checkpoint until here, {gone}, is no longer there; the best is sought anew"


def rotate(root: Path, limit: int | None, best: int | None) -> list[int]:
    """Deletes old checkpoints beyond `limit`, never the newest, never the best.

    Returns:
        The updates whose folders were deleted.
    """
    if limit is None:
        return []
    steps = complete_steps(root)
    doomed = [step for step in steps[:-limit] if step != best]
    for step in doomed:
        # Renamed first: a kill in the middle leaves no folder that looks complete.
        trash = root / f".step-{step}.{os.getpid()}.tmp"
        (root / f"step-{step}").rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
    return doomed


def set_aside_newer(root: Path, step: int, say: Callable[[str], None]) -> None:
    """Moves checkpoints past the one resumed from to `superseded/`: they belong to another past."""
    for newer, path in _folders(root):
        if newer > step:
            target = root / "superseded" / path.name
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
            say(f"{path} is newer than the checkpoint resumed from; moved to {target}")


def clean_aside(root: Path) -> None:
    """Removes what a kill left half-written."""
    for path in root.glob(".step-*.tmp") if root.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def publish_adapter(source: Path, target: Path) -> None:
    """Copies a checkpoint's adapter to `target`, aside first, and swaps it in.

    Raises:
        RunError: The disk is full, or the checkpoint has no adapter.
    """
    if not (source / ADAPTER).is_file():
        raise RunError("adapter_missing", "the checkpoint has no adapter", where=str(source))
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    internal = {STATE, OPTIMIZER, RANDOM, MARK}
    for left in target.parent.glob(f".{target.name}.*.tmp"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    try:
        with disk_full_named(target, _size(source)):
            shutil.copytree(source, aside, ignore=lambda _, names: internal & set(names))
            fsync_tree(aside)
            if target.exists():
                shutil.rmtree(target)
            aside.rename(target)
            fsync_path(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
