"""What the configuration's keys are: names, expected values, schema and commented defaults.

Everything here is read from the models in `config.py`, so it cannot disagree with them.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from glasstune.core.config import Config

REQUIRED = object()
"""Default of a key that has none."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the configuration.

    Args:
        path: Dotted path; `N` stands for a list index (`data.sources.N.path`).
        annotation: Its type.
        default: Its default, or `REQUIRED`.
        meaning: One sentence.
        expected: The values it takes, in words: `a whole number of at least 1, or auto`.
        section: Whether it holds keys of its own (a section, or a list of them).
        open: Whether any key may follow below it.
    """

    path: str
    annotation: Any
    default: Any
    meaning: str
    expected: str
    section: bool
    open: bool


@cache
def known_keys() -> dict[str, Key]:
    """Returns every key by its dotted path, in the order of the documentation."""
    return {key.path: key for key in _walk(Config, "")}


def find_key(path: tuple[str | int, ...]) -> Key | None:
    """Returns the key at a path of names and list indices, or None."""
    dotted = ".".join("N" if isinstance(part, int) else part for part in path)
    return known_keys().get(dotted)


def nearest(name: str, near: str = "", more: tuple[str, ...] = ()) -> str | None:
    """Finds the known key whose last part is most like a name.

    Args:
        name: The unknown last part.
        near: Dotted parent; a key of the same section wins over a like one elsewhere.
        more: Further names to compare (foreign ones).

    Returns:
        A dotted path, or a name of `more`, or None where nothing is alike.
    """
    leaves: dict[str, list[str]] = {}
    for path in known_keys():
        leaves.setdefault(path.rsplit(".", 1)[-1], []).append(path)
    here = [leaf for leaf, paths in leaves.items() if any(_parent(p) == near for p in paths)]
    for pool, cutoff in ((here, 0.75), ([*leaves], 0.6), ([*more], 0.75)):
        found = difflib.get_close_matches(name, pool, n=1, cutoff=cutoff)
        if found:
            paths = leaves.get(found[0], [])
            own = [path for path in paths if _parent(path) == near]
            return (own or paths or found)[0]
    found = difflib.get_close_matches(name, here, n=1, cutoff=0.5)
    return f"{near}.{found[0]}".lstrip(".") if found else None


def _parent(path: str) -> str:
    return path.rsplit(".", 1)[0] if "." in path else ""


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for attribute, info in model.model_fields.items():
        if info.exclude:
            continue  # given from Python only
        name = info.alias or attribute
        path = f"{prefix}{name}"
        inner, is_list = _section_of(info.annotation)
        yield Key(
            path=path,
            annotation=info.annotation,
            default=REQUIRED if info.is_required() else info.get_default(call_default_factory=True),
            meaning=" ".join((info.description or "").split()),
            expected=_expected(info),
            section=inner is not None,
            open=_is_open(info.annotation, inner),
        )
        if inner is not None:
            yield from _walk(inner, f"{path}.N." if is_list else f"{path}.")


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Returns the section model inside an annotation and whether it is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for part in get_args(annotation):
        inner, _ = _section_of(part)
        if inner is not None:
            return inner, get_origin(annotation) is list
    return None, False


def _is_open(annotation: Any, inner: type[BaseModel] | None) -> bool:
    if inner is not None:
        return inner.model_config.get("extra") == "allow"
    return get_origin(annotation) is dict


def _expected(info: FieldInfo) -> str:
    return _in_words(info.annotation, _limits(info.metadata))


def _limits(metadata: list[Any]) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for item in metadata:
        for part in getattr(item, "metadata", [item]):
            for sign in ("ge", "gt", "le", "lt"):
                if getattr(part, sign, None) is not None:
                    limits[sign] = getattr(part, sign)
    return limits


def _in_words(annotation: Any, limits: dict[str, Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(arguments[0], limits | _limits(list(arguments[1:])))
    if origin in (Union, types.UnionType):
        return _or([_in_words(part, limits) for part in arguments])
    if origin is Literal:
        return _or([_yaml_scalar(value) for value in arguments])
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is dict:
        return "a map of names to whole numbers" if arguments[1] is int else "a map"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
    }
    return words.get(annotation, "a value") + _limits_in_words(annotation, limits)


def _limits_in_words(annotation: Any, limits: dict[str, Any]) -> str:
    if annotation not in (int, float):
        return ""
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [f"{signs[sign]} {value}" for sign, value in limits.items() if sign in signs]
    if not parts:
        return ""
    return f" of {' and '.join(parts)}" if parts[0].startswith("at") else f" {' and '.join(parts)}"


def _plural(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " / ".join(map(str, get_args(annotation)))
    return "names" if annotation is str else "maps"


def _or(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _yaml_scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of a configuration file."""
    return Config.model_json_schema(by_alias=True)


def show_default(value: Any) -> str:
    """Writes a default as one line of YAML."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    if isinstance(plain, list):
        plain = [item.model_dump() if isinstance(item, BaseModel) else item for item in plain]
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, allow_unicode=True)
    text = " ".join(text.removesuffix("\n").removesuffix("\n...").split())
    return "1.0e-08" if plain == 1e-8 else text


def defaults_yaml() -> str:
    """Returns a complete configuration with every default and its meaning as a comment.

    It loads as it stands; `MODEL` and `DATA` are the two values to fill in.
    """
    lines = [
        "# Every key of a Glasstune configuration with its default. Required: model.path and",
        "# data.sources. Paths are relative to the folder in which the command runs.",
    ]
    for key in known_keys().values():
        depth = key.path.count(".")
        name = "  " * depth + key.path.rsplit(".", 1)[-1]
        if ".N." in f"{key.path}.":
            continue
        if key.path == "data.sources":
            lines += [f"{name}:" + _comment(name + ":", f"{key.meaning} (required)")]
            lines += _source_lines("  " * (depth + 1))
        elif key.section and (key.default is REQUIRED or isinstance(key.default, BaseModel)):
            lines += [f"{name}:" + _comment(name + ":", key.meaning)]
        else:
            required = key.default is REQUIRED
            value = "MODEL" if required else show_default(key.default)
            meaning = f"{key.meaning} (required)" if required else key.meaning
            lines += [f"{name}: {value}" + _comment(f"{name}: {value}", meaning)]
    return "\n".join(lines) + "\n"


def _source_lines(indent: str) -> list[str]:
    lines: list[str] = []
    for key in known_keys().values():
        if not key.path.startswith("data.sources.N."):
            continue
        value = "DATA" if key.default is REQUIRED else show_default(key.default)
        start = "- " if not lines else "  "
        text = f"{indent}{start}{key.path.rsplit('.', 1)[-1]}: {value}"
        lines.append(text + _comment(text, key.meaning))
    return lines


def _comment(before: str, meaning: str) -> str:
    return " " * max(2, 40 - len(before)) + f"# {meaning}" if meaning else ""
