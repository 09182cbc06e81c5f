"""A cheap identity of a base model, so that a resumed run notices another one.

The fingerprint is the SHA-256 over the config's canonical JSON and, of a folder, each weight
file's name, size, safetensors header (names, shapes, dtypes and offsets of all tensors) and 64
blocks of 4 KiB spread over it. Of a hub model it is the config and the commit. Other weights of
equal shapes are told apart without reading the whole file; a few edited values may not be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLOCKS = 64
_BLOCK_BYTES = 4096
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
# What transformers or a person may rewrite without changing the model.
_VOLATILE = ("_name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype")


def model_fingerprint(config: Mapping[str, Any], folder: Path | None, commit: str | None) -> str:
    """Returns the hex SHA-256 that stands for a base model.

    Args:
        config: The content of its `config.json`.
        folder: The folder with its weights, or None for a hub model.
        commit: The hub's commit, where there is one.
    """
    digest = hashlib.sha256()
    plain = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    if folder is None:
        digest.update(f"commit:{commit}".encode())
        return digest.hexdigest()
    files = {path for pattern in _WEIGHTS for path in folder.glob(pattern)}
    for path in sorted(files, key=lambda file: file.name):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        if path.suffix == ".safetensors":
            digest.update(_header(path))
        digest.update(_samples(path))
    return digest.hexdigest()


def _samples(path: Path) -> bytes:
    """Returns blocks spread evenly from a file's first byte to its last."""
    last = max(0, path.stat().st_size - _BLOCK_BYTES)
    with path.open("rb") as file:
        blocks = []
        for index in range(_BLOCKS):
            file.seek(last * index // (_BLOCKS - 1))
            blocks.append(file.read(_BLOCK_BYTES))
    return b"".join(blocks)


def _header(path: Path) -> bytes:
    """Returns a safetensors file's JSON header: 8 bytes of length, little endian, then the text."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, 100_000_000))
