"""From YAML, a mapping and overrides to a checked `Config`, with messages that name the place.

Relative paths inside a configuration stay as they are: they are relative to the folder in which
the command runs, like every path on a command line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from glasstune.core.config import Config
from glasstune.core.config_build import Source, build, read_override
from glasstune.core.config_check import validated
from glasstune.core.config_fields import nearest
from glasstune.core.errors import InputError
from glasstune.core.yaml_text import YamlDocument, parse_yaml

_EXAMPLE = "write at least `model: {path: MODEL}` and `data: {sources: [{path: DATA}]}`"


@dataclass(slots=True)
class LoadedConfig:
    """A configuration and how it came about.

    Args:
        config: The checked configuration.
        notes: Translations of foreign names and derived values, each said once.
        given: Dotted keys that the user gave (`training.seed`, `data.sources`).
    """

    config: Config
    notes: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)


def load_config(
    path: Path | str | None,
    overrides: Sequence[str] = (),
    model: str | None = None,
    data: str | None = None,
) -> LoadedConfig:
    """Reads a configuration file and applies what the command line adds.

    Args:
        path: The YAML file, or None where `model` and `data` say enough.
        overrides: `key=value` with dots, values in YAML (`data.sources.0.path=x.json`).
        model: Value of `model.path`.
        data: Path of the only data source.

    Raises:
        InputError: Anything wrong with them, with file, line, key, what was found and expected.
    """
    if path is None and model is None and data is None and not overrides:
        raise InputError(
            "no_config", "no configuration given", fix="name a file, or give --model M --data F"
        )
    document = read_document(Path(path)) if path is not None else YamlDocument({}, "command line")
    return _load(document, overrides, model, data)


def config_from_mapping(
    value: Mapping[str, Any],
    overrides: Sequence[str] = (),
    name: str = "config",
    model: str | None = None,
    data: str | None = None,
) -> LoadedConfig:
    """Checks a mapping from Python as `load_config` checks a file."""
    return _load(YamlDocument(_plain(value), name), overrides, model, data, from_python=True)


def load_text(text: str, name: str = "config", overrides: Sequence[str] = ()) -> LoadedConfig:
    """Checks YAML text as `load_config` checks a file."""
    return _load(_document(text, name), overrides, None, None)


def dump_config(config: Config) -> str:
    """Returns the configuration as YAML that loads to the same `Config`."""
    plain = config.model_dump(mode="json", by_alias=True)
    if config.data.validation:
        # The two exclude each other where both are given; the unused share is not written.
        plain["data"].pop("validation_split")
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def read_document(path: Path) -> YamlDocument:
    """Reads and parses a YAML file.

    Raises:
        InputError: It is missing, no text, empty, no mapping, or no valid YAML.
    """
    name = str(path)
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(
            "not_utf8",
            f"byte {error.start} is no UTF-8: a configuration is a text file",
            where=f"{name}:{line}",
            fix="save the file as UTF-8",
        ) from None
    return _document(text, name)


def _document(text: str, name: str) -> YamlDocument:
    document = parse_yaml(text, name)
    if document.value is None:
        raise InputError("empty_config", "the configuration is empty", where=name, fix=_EXAMPLE)
    if not isinstance(document.value, dict):
        kind = "a list" if isinstance(document.value, list) else f"{document.value!r:.60}"
        raise InputError(
            "not_a_mapping",
            f"expected keys and values at the top level, found {kind}",
            where=name,
            fix=_EXAMPLE,
        )
    return document


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, IsADirectoryError):
        inside = path / "config.yaml"
        fix = f"give {inside}" if inside.is_file() else "give a YAML file"
        return InputError("config_is_folder", "this is a folder", where=str(path), fix=fix)
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return InputError(
            "config_not_found",
            "there is no such file",
            where=str(path),
            fix=_alike(path) or "`glasstune init --model M --data F -o config.yaml` writes one",
        )
    reason = getattr(error, "strerror", None) or str(error)
    return InputError("config_unreadable", f"cannot be read: {reason}", where=str(path))


def _alike(path: Path) -> str:
    import difflib

    try:
        names = [item.name for item in path.parent.iterdir() if item.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / found[0]}?" if found else ""


def _load(
    document: YamlDocument,
    overrides: Sequence[str],
    model: str | None,
    data: str | None,
    from_python: bool = False,
) -> LoadedConfig:
    base = Source(document.value, document)
    upper = [read_override(text) for text in overrides]
    for key, value, flag in (("model.path", model, "--model"), ("data.sources", data, "--data")):
        if value is not None:
            plain: Any = value if key == "model.path" else [{"path": value}]
            upper.insert(0, Source.of_key(key, plain, f"{flag} {value}"))
    built = build(base, upper, from_python)
    config = validated(built)
    notes = list(dict.fromkeys([*built.notes, *_derive_batch(config, built.given)]))
    return LoadedConfig(config, notes, built.given)


def _plain(value: Any) -> Any:
    """Copies mappings and sequences from Python to dicts and lists; paths become text."""
    if isinstance(value, Mapping):
        return {
            str(key): item if key == "path" and isinstance(item, list) else _plain(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def _derive_batch(config: Config, given: set[str]) -> list[str]:
    """Makes the three batch sizes agree, or says why they cannot.

    Several devices are started by torchrun, which tells their number in `WORLD_SIZE`.
    """
    training = config.training
    world = max(1, int(os.environ.get("WORLD_SIZE", "1") or 1))
    total, rows = training.train_batch_size, training.per_device_train_batch_size
    forwards = training.gradient_accumulation_steps
    total_given = "training.train_batch_size" in given
    devices = f" x {world} devices" if world > 1 else ""
    if rows != "auto" and forwards != "auto":
        product = rows * forwards * world
        arithmetic = f"{rows} rows x {forwards} forwards{devices} = {product}"
        if total_given and product != total:
            raise _batch_error(f"{arithmetic}, but training.train_batch_size is {total}")
        training.train_batch_size = product
        return [] if total_given else [f"training.train_batch_size is {product}: {arithmetic}"]
    if forwards != "auto" and total % (forwards * world):
        which = "" if total_given else " (the default)"
        raise _batch_error(
            f"training.train_batch_size {total}{which} cannot be split into {forwards} "
            f"equal forwards{devices}: {total / (forwards * world):.4g} rows each"
        )
    if rows != "auto" and rows > math.ceil(total / world):  # the largest share of a device
        if total_given:
            raise _batch_error(
                f"{rows} rows a forward{devices} = {rows * world} are more than "
                f"training.train_batch_size {total}, the rows of a whole update"
            )
        training.train_batch_size = rows * world
        return [f"training.train_batch_size is {rows * world}: {rows} rows{devices} a forward"]
    return []


def _batch_error(message: str) -> InputError:
    return InputError(
        "batch_arithmetic",
        message,
        where="training.train_batch_size",
        fix="train_batch_size = per_device_train_batch_size x gradient_accumulation_steps x "
        "devices: give two of them, the third follows",
    )


__all__ = [
    "LoadedConfig",
    "config_from_mapping",
    "dump_config",
    "load_config",
    "load_text",
    "nearest",
    "read_document",
]
