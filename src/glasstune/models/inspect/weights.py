"""Where a model's 16-bit weights lie, and how a few rows of one are read without the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.core.tensors import StoredTensor, read_rows, stored_tensors
from glasstune.core.units import format_bytes
from glasstune.models.gguf import expand_gguf, expanded_folder
from glasstune.models.inspect.source import ModelSource

Rows = Callable[[int, int], Tensor]
"""Rows start..stop of a weight as it is stored, [stop - start, in]."""

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_NO_WEIGHTS_FIX = (
    "give a folder that holds the weights (`hf download ID --local-dir FOLDER`), "
    "or leave out --error"
)


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor of a checkpoint.

    Args:
        file: Where it is stored.
        name: Its key.
        shape: Its shape there.
        dtype: torch's name of its type, such as `bfloat16`.
        size: Bytes.
        held: Bytes that reading any part of it keeps in memory.
        offset: Its place among the tensors of the file.
        open: Gives its rows.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    held: int
    offset: int
    open: Callable[[], Rows]


@dataclass(slots=True)
class Checkpoint:
    """All tensors of a folder, none of them read.

    Args:
        folder: Where they are.
        places: Key to place.
        findings: What was unusual about the files.
    """

    folder: Path
    places: dict[str, Place]
    findings: list[Finding] = field(default_factory=list)


def weights_folder(source: ModelSource, bf16_bytes: int, memory_bytes: int) -> tuple[Path, Finding]:
    """Returns the local folder with a source's weights, and a note on where it came from.

    Args:
        source: What `open_source` found.
        bf16_bytes: Of all weights asked about, for a GGUF file that must be expanded.
        memory_bytes: The budget.

    Raises:
        InputError: `no_weights`; `memory_budget`: expanding the GGUF file needs more than that.
    """
    if source.kind == "gguf":
        file = Path(source.name).expanduser()
        if not expanded_folder(file).is_dir() and bf16_bytes > memory_bytes:
            raise InputError(
                "memory_budget",
                f"expanding this GGUF file needs over {format_bytes(bf16_bytes)} of memory, the "
                f"budget is {format_bytes(memory_bytes)}",
                where=str(file),
                fix="give the original checkpoint (hub id or folder), or raise the budget",
            )
        expanded = expand_gguf(file)
        says = (
            "a GGUF file's weights are quantised already; errors are against its bfloat16 "
            f"expansion, cached in {expanded}"
        )
        return expanded, Finding("gguf_expanded", "info", str(file), says)
    folder = source.weights or _bin_folder(source)
    if folder is not None:
        return folder, _read_from(folder)
    if source.kind == "hub":
        for name in (*_WHOLE, *_INDEXES):
            cached = _cached(source.name, name)
            if cached is not None:
                return cached.parent, _read_from(cached.parent)
        says = f"the weights of {source.name} are not in the local cache"
        fix = f"download them first (`hf download {source.name}`), or leave out --error"
        raise InputError("no_weights", says, where=source.name, fix=fix)
    says = "there are no weights here, only a config: nothing to measure"
    raise InputError("no_weights", says, where=source.name, fix=_NO_WEIGHTS_FIX)


def open_checkpoint(folder: Path, memory_bytes: int) -> Checkpoint:
    """Finds a folder's weight files by transformers' order and lists their tensors.

    `model.safetensors`, else its index, else `pytorch_model.bin`, else its index; and where a
    folder has shards without an index, all of them.

    Raises:
        InputError: `no_weights`, `bad_weights`, `bad_index`, `already_quantized`,
            `memory_budget` (a `.bin` file is read whole).
    """
    files, findings = _weight_files(folder)
    places: dict[str, Place] = {}
    held = _OneFile()
    for file in files:
        found = (
            _bin_places(file, held, memory_bytes)
            if file.suffix == ".bin"
            else {name: _stored_place(tensor) for name, tensor in stored_tensors(file).items()}
        )
        twice = sorted(places.keys() & found.keys())
        if twice:
            raise InputError(
                "bad_index",
                f"{len(twice)} tensors are in two files, for example {twice[0]} in {file.name}",
                where=str(folder),
                fix="leave one set of weight files in the folder",
            )
        places.update(found)
    if any(file.suffix == ".bin" for file in files):
        largest = max(file.stat().st_size for file in files)
        says = (
            "weights in .bin files cannot be read tensor by tensor: each file is read whole "
            f"(up to {format_bytes(largest)})"
        )
        fix = "save the model again as safetensors"
        findings.append(Finding("whole_files_read", "info", str(folder), says, fix))
    return Checkpoint(folder, places, findings)


def _bin_folder(source: ModelSource) -> Path | None:
    """A source's own folder where it has `.bin` weights only, which `open_source` leaves out."""
    path = Path(source.name).expanduser()
    if source.kind == "config" and path.name == "config.json":
        path = path.parent
    elif source.kind != "folder":
        return None
    return path if any(path.glob("*.bin")) else None


def _read_from(folder: Path) -> Finding:
    return Finding("weights_read", "info", str(folder), "weights were read from this folder")


def _cached(model_id: str, name: str) -> Path | None:
    try:
        found = try_to_load_from_cache(model_id, name)
    except hub_errors.HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _weight_files(folder: Path) -> tuple[list[Path], list[Finding]]:
    for whole, index in zip(_WHOLE, _INDEXES, strict=True):
        if (folder / whole).is_file():
            return [folder / whole], []
        if (folder / index).is_file():
            return _indexed(folder / index), []
    for pattern in ("*.safetensors", "*.bin"):
        files = sorted(path for path in folder.glob(pattern) if _is_shard(path.name))
        if files:
            says = f"no index of the shards: {len(files)} files were read, by name"
            fix = "transformers itself needs one; save the model again"
            return files, [Finding("no_index", "warning", str(folder), says, fix)]
    raise InputError(
        "no_weights",
        "the folder has no safetensors or .bin weights",
        where=str(folder),
        fix=_NO_WEIGHTS_FIX,
    )


def _is_shard(name: str) -> bool:
    """Not an adapter, an optimiser's state, or the original format beside transformers' own."""
    return name.startswith(("model", "pytorch_model"))


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / str(name) for name in names]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            "bad_index",
            f"the index of the shards cannot be read: {type(error).__name__}: {error}",
            where=str(index),
            fix="download it again",
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            "no_weights",
            f"{len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:3])}",
            where=str(index.parent),
            fix="download them",
        )
    return files


def _stored_place(tensor: StoredTensor) -> Place:
    return Place(
        file=tensor.file,
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.torch_dtype,
        size=tensor.size,
        held=0,
        offset=tensor.offset,
        open=lambda: partial(read_rows, tensor),
    )


def _bin_places(file: Path, files: _OneFile, memory_bytes: int) -> dict[str, Place]:
    size = file.stat().st_size
    if size > memory_bytes:
        raise InputError(
            "memory_budget",
            f"a .bin file is read whole: {format_bytes(size)}, the budget is "
            f"{format_bytes(memory_bytes)}",
            where=str(file),
            fix="save the model again as safetensors, or raise the budget",
        )

    def opened(name: str) -> Rows:
        return lambda start, stop: files.load(file)[name][start:stop]

    return {
        name: Place(
            file=file,
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            size=tensor.nbytes,
            held=size,
            offset=position,
            open=partial(opened, name),
        )
        for position, (name, tensor) in enumerate(files.load(file).items())
    }


class _OneFile:
    """The `.bin` file that was read last, held so that it is not read again for each tensor."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.tensors: dict[str, Tensor] = {}

    def load(self, file: Path) -> dict[str, Tensor]:
        if file != self.file:
            self.file, self.tensors = None, {}
            self.tensors = _load_bin(file)
            self.file = file
        return self.tensors


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        says = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            "bad_weights",
            f"the file cannot be read without running code from it, or is damaged: {says}",
            where=str(file),
            fix="download it again, or save the model as safetensors where it is trusted",
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            "bad_weights",
            f"the file holds a {type(content).__name__}, not named tensors",
            where=str(file),
            fix="save the model as safetensors",
        )
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
