"""Checks the built mapping against the models and says what is wrong in one clear message."""

from __future__ import annotations

import math
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from glasstune.core.config import Config
from glasstune.core.config_build import Built
from glasstune.core.config_fields import Key, find_key, nearest
from glasstune.core.errors import InputError
from glasstune.core.yaml_text import PathKey


def validated(built: Built) -> Config:
    """Returns the checked configuration.

    Raises:
        InputError: `missing_key`, `unknown_key`, `wrong_type` or `wrong_value`, with the place.
    """
    value = _prepared(built.value, (), built)
    try:
        return Config.model_validate(value)
    except ValidationError as error:
        raise _message(error, value, built) from None


def _prepared(value: Any, path: PathKey, built: Built) -> Any:
    """Refuses what pydantic would convert silently; numbers where text is meant stay text."""
    if isinstance(value, dict):
        return {name: _prepared(item, (*path, name), built) for name, item in value.items()}
    if isinstance(value, list):
        key = find_key(path)
        if key is not None and key.annotation is str:
            if not built.from_python:
                raise _wrong(path, key, value, built)
            return value  # rows given from Python
        return [_prepared(item, (*path, index), built) for index, item in enumerate(value)]
    key = find_key(path)
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(path, key, value, built)
    if key is None:
        return value
    kinds = _kinds(key.annotation)
    if isinstance(value, bool) and bool not in kinds and kinds & {int, float, str}:
        raise _wrong(path, key, value, built)
    if isinstance(value, str) and bool in kinds and str not in kinds and not _bool_word(value):
        raise _wrong(path, key, value, built)
    if isinstance(value, str) and kinds & {int, float} and str not in kinds:
        return _number(value)
    if isinstance(value, (int, float)) and kinds <= {str, type(None)}:
        return built.raw.get(path, value)
    return value


def _bool_word(text: str) -> bool:
    return text.lower() in ("true", "false", "yes", "no", "on", "off")


def _number(text: str) -> Any:
    """A quoted number is the number that it shows."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _kinds(annotation: Any) -> set[Any]:
    """Returns the plain types that an annotation accepts (those of its literals included)."""
    if isinstance(annotation, type):
        return {annotation}
    if get_origin(annotation) in (list, dict):
        return {get_origin(annotation)}
    found: set[Any] = set()
    for part in get_args(annotation):
        if isinstance(part, (str, int)) or part is None:  # a value of a Literal
            found.add("literal")
        else:
            found |= _kinds(part)
    if "literal" in found:
        found.discard("literal")
        values = _literals(annotation)
        found |= {type(item) for item in values if isinstance(item, bool)}
        if any(isinstance(item, str) for item in values):
            found.add(str)
        if any(type(item) is int for item in values):
            found.add(int)
    return found


def _literals(annotation: Any) -> list[Any]:
    values: list[Any] = []
    for part in get_args(annotation):
        values += [part] if isinstance(part, (str, int)) else _literals(part)
    return values


def _wrong(path: PathKey, key: Key | None, value: Any, built: Built) -> InputError:
    name = ".".join(map(str, path))
    expected = key.expected if key is not None else "a finite number"
    return InputError(
        "wrong_type",
        f"{name}: expected {expected}, found {_found(value)}",
        where=built.where(path),
        fix=key.meaning if key is not None else "",
    )


def _found(value: Any) -> str:
    kinds = {bool: "a switch", int: "a number", float: "a number", str: "text", list: "a list"}
    shown = str(value).lower() if isinstance(value, bool) else f"{value!r:.60}"
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict):
        return f"a map {shown}"
    return f"{shown} ({kinds.get(type(value), type(value).__name__)})"


def _message(error: ValidationError, value: Any, built: Built) -> InputError:
    problems = error.errors(include_url=False, include_context=True)
    # A union reports once for each of its members: the key is what counts.
    by_key: dict[PathKey, dict[str, Any]] = {}
    for problem in problems:
        by_key.setdefault(_key_path(problem["loc"], value), dict(problem))
    for outer in [p for p in by_key if isinstance(_value_at(value, p), dict)]:
        if any(other != outer and other[: len(outer)] == outer for other in by_key):
            del by_key[outer]  # a key inside says more than "not a number" about its section
    path = next(iter(by_key))
    first = _one(path, by_key[path], value, built)
    others = [".".join(map(str, other)) for other in by_key if other != path]
    if others:
        first.message += f" (also wrong: {', '.join(others[:5])})"
        first.args = (first.message,)
    return first


def _one(path: PathKey, problem: dict[str, Any], value: Any, built: Built) -> InputError:
    name, kind = ".".join(map(str, path)), problem["type"]
    key, where = find_key(path), built.where(path)
    if kind == "missing":
        what = key.meaning if key is not None else ""
        return InputError("missing_key", f"{name} is required: {what}", where=where, fix=_add(name))
    if kind == "extra_forbidden":
        parent = ".".join("N" if isinstance(part, int) else part for part in path[:-1])
        like = nearest(str(path[-1]), parent)
        fix = f"did you mean {like}?" if like else "`glasstune config --defaults` lists all keys"
        return InputError("unknown_key", f"unknown key {name!r}", where=where, fix=fix)
    if kind == "value_error":  # a sentence of our own, from a cross-field check
        return InputError("contradiction", f"{name}: {problem['ctx']['error']}", where=where)
    if kind == "too_short":
        return InputError("missing_key", f"{name} is empty", where=where, fix=_add(name))
    expected = key.expected if key is not None else _item_expected(path)
    found = _found(_value_at(value, path))
    code = (
        "wrong_value" if kind.endswith(("_than", "_than_equal", "literal_error")) else "wrong_type"
    )
    return InputError(
        code,
        f"{name}: expected {expected}, found {found}",
        where=where,
        fix=_fix(name, key),
    )


def _item_expected(path: PathKey) -> str:
    """What an item of a list or of an open map must be."""
    parent = find_key(path[:-1])
    if parent is not None and (parent.open or not parent.section):
        return parent.expected
    example = "name: next_token" if path[:1] == ("losses",) else "path: DATA"
    return f"a section such as {{{example}}}"


def _fix(name: str, key: Key | None) -> str:
    if name in ("data.sources", "data.validation") or (
        key is not None and key.path == "data.sources"
    ):
        return f"write {name}: [{{path: DATA}}]"
    if key is not None and key.section and "." not in name:
        return f"write the keys below `{name}:`, indented by two spaces"
    return key.meaning if key is not None else ""


def _add(name: str) -> str:
    examples = {
        "model": "add `model: {path: MODEL}` (hub id, folder or GGUF file), or give --model",
        "model.path": "add `model: {path: MODEL}` (hub id, folder or GGUF file), or give --model",
        "data": "add `data: {sources: [{path: DATA}]}`, or give --data",
        "data.sources": "add `data: {sources: [{path: DATA}]}`, or give --data",
    }
    return examples.get(name, f"add {name}")


def _key_path(loc: tuple[int | str, ...], value: Any) -> PathKey:
    """Cuts pydantic's union labels (`('training', 'save_steps', 'int')`) off a location."""
    path: PathKey = ()
    place = value
    for part in loc:
        if isinstance(place, dict):
            if part not in place and find_key((*path, part)) is None:
                # The label of a union member stands between a key and a key below it.
                if any(part == label for label in _labels(path)):
                    continue
                break
            path, place = (*path, part), place.get(part)
        elif isinstance(place, list) and isinstance(part, int):
            path, place = (*path, part), place[part] if part < len(place) else None
        else:
            break
    return path


def _labels(path: PathKey) -> list[str]:
    key = find_key(path)
    parts = get_args(key.annotation) if key is not None else ()
    return [p.__name__ for p in parts if isinstance(p, type) and issubclass(p, BaseModel)]


def _value_at(value: Any, path: PathKey) -> Any:
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value
