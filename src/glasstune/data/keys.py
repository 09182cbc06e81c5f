"""The name of a cache entry: a hash over all that a source's ids and labels follow from."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasstune.core.errors import InputError
from glasstune.core.files import dump_json, sha256_file
from glasstune.data import chunks
from glasstune.data.choose import OpenSource
from glasstune.data.read import delimiter_of
from glasstune.data.template import ChatTemplate
from glasstune.data.work import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE = 3
"""Raise it whenever this room would give other ids, labels or tallies for the same rows."""


@dataclass(frozen=True, slots=True)
class FileState:
    """A data file as it was when its bytes were hashed.

    Args:
        path: The file.
        size: Its bytes.
        changed: When it was changed last, in nanoseconds.
        sha256: Of its bytes.
    """

    path: Path
    size: int
    changed: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Reads a file.

        Raises:
            InputError: It cannot be read.
        """
        try:
            found = path.stat()
            return cls(path, found.st_size, found.st_mtime_ns, sha256_file(path))
        except OSError as error:
            raise InputError(
                "unreadable_file",
                f"cannot be read: {error.strerror or error}",
                where=str(path),
                fix="check the path and its permissions",
            ) from error

    def check(self) -> None:
        """Checks that the file is still the one that was hashed.

        Raises:
            InputError: It was changed meanwhile.
        """
        found = self.path.stat() if self.path.exists() else None
        if found is None or (found.st_size, found.st_mtime_ns) != (self.size, self.changed):
            raise InputError(
                "file_changed",
                "was changed while it was read",
                where=str(self.path),
                fix="run again when it is written completely",
            )


def source_key(task: Task, source: int, opened: OpenSource, files: Sequence[FileState]) -> str:
    """Returns the name of a source's cache entry."""
    shape = task.shapes[source]
    # Of a file's name only what says how it is read: a file that is moved is the same data.
    data: Any = [[delimiter_of(file.path), file.sha256] for file in files]
    if opened.table is not None:
        data = [opened.config.path, opened.config.split, str(opened.table._fingerprint)]
    parts = {
        "code": [CODE, chunks.ROWS, chunks.BYTES],
        "versions": [version(name) for name in ("transformers", "tokenizers", "jinja2")],
        "data": data,
        "shape": [shape.format, sorted(shape.columns.items())],
        "tokenizer": tokenizer_hash(task.template.tokenizer),
        "template": template_parts(task.template),
        "options": [task.train_on, task.max_length, task.truncation, task.keep_columns],
        "vocabulary_rows": task.facts.vocabulary_rows,
    }
    return hashlib.sha256(dump_json(parts).encode()).hexdigest()[:32]


def template_parts(template: ChatTemplate) -> dict[str, Any]:
    """Returns what a template's ids and labels follow from, beside its tokenizer."""
    kept = template.to_dict()
    return {
        **kept,
        # Alpaca's published prompt joins a row's input in its own way; a file's name is nothing.
        "name": kept["name"] == "alpaca",
        "kwargs": json.dumps(kept["kwargs"], sort_keys=True, default=repr),
        "source": template.source,
    }


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash over a tokenizer's whole state."""
    digest = hashlib.sha256(type(tokenizer).__qualname__.encode())
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    digest.update(json.dumps(special, sort_keys=True).encode())
    digest.update(json.dumps(tokenizer.get_added_vocab(), sort_keys=True).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Truncation and padding stand first: what the last call left behind. All else is sorted.
        digest.update(backend.to_str().partition('"added_tokens"')[2].encode())
        return digest.hexdigest()
    try:  # a slow tokenizer, maybe with Python code of its own
        digest.update(inspect.getsource(type(tokenizer)).encode())
    except (OSError, TypeError):
        digest.update(repr(type(tokenizer)).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
