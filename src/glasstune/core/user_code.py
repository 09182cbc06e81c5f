"""Functions that a user names as `FILE.py:function`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glasstune.core.errors import InputError


def import_function(
    spec: str, *, where: str, example: str, base_folder: Path = Path(".")
) -> Callable[..., Any]:
    """Imports `FILE.py:function`.

    Args:
        spec: The file, relative to `base_folder`, and the name.
        where: Key or option that named it, for the message.
        example: How it is written, for the message.
        base_folder: Folder that a relative path starts from.

    Raises:
        InputError: `function_file_missing`, `function_file_fails` (importing it raised) or
            `function_missing`.
    """
    text, _, name = spec.rpartition(":")
    path = base_folder / Path(text).expanduser()
    if not text or not path.is_file():
        raise InputError(
            "function_file_missing",
            f"{spec!r} names no Python file" + (f" ({path} not found)" if text else ""),
            where=where,
            fix=f"write it as {example}",
        )
    module_name = f"glasstune_user_{path.stem}"
    found = importlib.util.spec_from_file_location(module_name, path)
    if found is None or found.loader is None:
        raise InputError(
            "function_file_missing", f"{path} is no Python file", where=where,
            fix=f"write it as {example}",
        )  # fmt: skip
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module  # dataclasses and pickle look the module up by name
    try:
        found.loader.exec_module(module)
    except Exception as error:  # a user's file can raise anything
        raise InputError(
            "function_file_fails",
            f"importing {path} raised {type(error).__name__}: {error}",
            where=where,
            fix="make the file importable on its own",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(
            "function_missing",
            f"{path} has no function {name!r}",
            where=where,
            fix="check the name after the colon",
        )
    loaded: Callable[..., Any] = function
    return loaded
