"""Puts file, flags and overrides together: foreign names translated, contradictions refused."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from glasstune.core.config_fields import Key, find_key, known_keys, nearest
from glasstune.core.config_names import FOREIGN, known_value, translate
from glasstune.core.errors import InputError
from glasstune.core.yaml_text import PathKey, YamlDocument, parse_yaml


@dataclass(slots=True)
class Source:
    """One giver of values: the file, a flag, or an override."""

    value: dict[str, Any]
    document: YamlDocument

    @staticmethod
    def of_key(key: str, value: Any, name: str) -> Source:
        """Returns a source that gives one dotted key."""
        parts = split_key(key)
        nested = value
        for part in reversed(parts):
            nested = {part: nested}
        return Source(nested, YamlDocument(nested, name))


@dataclass(slots=True)
class Built:
    """A nested mapping of our own keys, and where each value came from."""

    value: dict[str, Any] = field(default_factory=dict)
    origins: dict[PathKey, str] = field(default_factory=dict)
    raw: dict[PathKey, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)
    from_python: bool = False

    def where(self, path: PathKey) -> str:
        """Returns the place of the nearest known parent of a path."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, self.origins.get((), ""))


@dataclass(slots=True)
class _Given:
    """A value that a source gives: by which name, and where."""

    value: Any
    name: str
    where: str


def split_key(key: str) -> list[str | int]:
    """Splits `data.sources.0.path` into names and indices."""
    return [int(part) if part.isascii() and part.isdigit() else part for part in key.split(".")]


def read_override(text: str) -> Source:
    """Reads `key=value`; the value is YAML, or plain text where it is no YAML.

    Raises:
        InputError: There is no `=`, or no key.
    """
    key, sign, raw = text.partition("=")
    key = key.strip()
    if not sign or not all(key.split(".")):
        raise InputError(
            "bad_override",
            f"{text!r} is not key=value",
            where="command line",
            fix="write for example training.learning_rate=1e-4",
        )
    name = f"override {text}"
    try:
        document = parse_yaml(raw, name)
    except InputError:
        if raw.lstrip()[:1] in ("[", "{", '"', "'"):
            raise
        document = YamlDocument(raw, name)  # globs such as *.json are no YAML
    source = Source.of_key(key, document.value, name)
    path = tuple(split_key(key))
    source.document.raw = {(*path, *below): value for below, value in document.raw.items()}
    return source


def build(base: Source, upper: list[Source], from_python: bool = False) -> Built:
    """Merges the sources, later ones over the file.

    Raises:
        InputError: An unknown key, a contradiction, or a place that does not exist.
    """
    built = Built(origins={(): base.document.name}, from_python=from_python)
    _apply(built, _own_keys(base, built), base)
    seen: dict[PathKey, _Given] = {}
    for source in upper:
        values = _own_keys(source, built)
        for path, given in values.items():
            if path in seen and seen[path].value != given.value:
                raise _contradiction(path, seen[path], given)
            seen[path] = given
        _apply(built, values, source)
    return built


def _own_keys(source: Source, built: Built) -> dict[PathKey, _Given]:
    """Flattens a source to our own keys, with foreign names translated."""
    values: dict[PathKey, _Given] = {}
    forbidden: list[tuple[PathKey, _Given]] = []

    def put(path: PathKey, given: _Given) -> None:
        new, note = known_value(_dotted(path), given.value)
        if note:
            built.notes.append(note)
        given = _Given(new, given.name, given.where)
        if path in values and values[path].value != new:
            raise _contradiction(path, values[path], given)
        values[path] = given

    def foreign(section: PathKey, name: str, value: Any) -> bool:
        where = source.document.where((*section, name))
        try:
            meaning = translate(_dotted(section), name, value, _own_flat())
        except InputError as error:
            raise InputError(error.code, error.message, where=where, fix=error.fix) from None
        if meaning is None:
            return False
        built.notes += meaning.notes
        for key, new in meaning.values.items():
            put(tuple(split_key(key)), _Given(new, name, where))
        for key, new in meaning.forbids.items():
            forbidden.append((tuple(split_key(key)), _Given(new, f"{name}: false", where)))
        return True

    def walk(section: PathKey, mapping: dict[Any, Any]) -> None:
        for name, value in mapping.items():
            path = (*section, name)
            key = find_key(path)
            parent = find_key(section)
            if section == () and name == "adapter" and isinstance(value, str):
                foreign(section, name, value)
            elif isinstance(name, int):  # an item of a list, named by an override
                if isinstance(value, dict) and value:
                    walk(path, value)
                else:
                    put(path, _Given(value, _dotted(path), source.document.where(path)))
            elif key is None and parent is not None and parent.open:
                if parent.path not in ("adapter", "model.quantization") or not foreign(
                    section, name, value
                ):
                    put(path, _Given(value, _dotted(path), source.document.where(path)))
            elif key is None:
                if not foreign(section, name, value):
                    raise _unknown(path, source.document.where(path))
            elif isinstance(value, dict) and _walkable(key, value):
                walk(path, value)
            elif value is None and key.section and not is_list(key):
                continue  # `adapter:` with nothing below it
            else:
                put(path, _Given(value, _dotted(path), source.document.where(path)))

    walk((), source.value)
    for path, ban in forbidden:
        if path in values and values[path].value == ban.value:
            raise _contradiction(path, values[path], ban)
    return values


def is_list(key: Key) -> bool:
    """Whether a key holds a list of sections."""
    return any(path.startswith(f"{key.path}.N.") for path in known_keys())


def _walkable(key: Key, value: dict[Any, Any]) -> bool:
    if not value or not (key.section or key.open):
        return False
    return not is_list(key) or all(isinstance(name, int) for name in value)


def _own_flat() -> dict[str, str]:
    prefix = "training."
    return {
        key.path.removeprefix(prefix): key.path
        for key in known_keys().values()
        if key.path.startswith(prefix) and key.path.count(".") == 1
    }


def _apply(built: Built, values: dict[PathKey, _Given], source: Source) -> None:
    for path, given in values.items():
        built.origins[_set(built, path, given)] = given.where
        built.given.add(_given_name(path))
        for below, raw in source.document.raw.items():
            if below[: len(path)] == path:
                built.raw[below] = raw
        for below in source.document.lines:
            if below[: len(path)] == path:
                built.origins[below] = source.document.where(below)


def _given_name(path: PathKey) -> str:
    names: list[str] = []
    for part in path:
        if isinstance(part, int):
            break
        names.append(part)
    return ".".join(names)


def _set(built: Built, path: PathKey, given: _Given) -> PathKey:
    """Puts a value at a path, making sections and list items on the way; returns the path."""
    place: Any = built.value
    real: PathKey = ()
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(place, list):
            if not isinstance(part, int) or part > len(place):
                raise _no_item(path[: depth + 1], len(place), given.where)
            if part == len(place):
                place.append({})
        elif isinstance(part, int):
            part = str(part)  # a map's key that looks like a number
        real = (*real, part)
        if last:
            place[part] = deepcopy(given.value)
            break
        if isinstance(place, dict) and not isinstance(place.get(part), (dict, list)):
            if place.get(part) is not None and depth + 1 < len(path):
                raise _no_section(path[: depth + 1], place[part], given.where)
            place[part] = _empty(path[: depth + 1])
        place = place[part]
        if not isinstance(place, (dict, list)):
            raise _no_section(path[: depth + 1], place, given.where)
    return real


def _empty(path: PathKey) -> Any:
    """What stands at a path before anything is set in it: a section, or the default list."""
    key = known_keys().get(_dotted(path))
    if key is not None and isinstance(key.default, dict):
        return dict(key.default)
    if key is None or not isinstance(key.default, list):
        is_list = key is not None and key.path == "data.sources"
        return [] if is_list else {}
    return [item.model_dump() if hasattr(item, "model_dump") else item for item in key.default]


def _dotted(path: PathKey) -> str:
    return ".".join(map(str, path))


def _contradiction(path: PathKey, first: _Given, second: _Given) -> InputError:
    key = _dotted(path)

    def told(given: _Given) -> str:
        if given.name == key:
            return f"{key} is {given.value!r}"
        if given.name.endswith(": false"):
            return f"{given.name} forbids {key}: {given.value!r}"
        return f"{given.name} means {key}: {given.value!r}"

    place = f" (at {first.where})" if first.where != second.where else ""
    return InputError(
        "contradiction",
        f"{told(second)}, but {told(first)}{place}",
        where=second.where,
        fix=f"keep one of them; {key} is the name used here",
    )


def _unknown(path: PathKey, where: str) -> InputError:
    name = str(path[-1])
    generic = ".".join("N" if isinstance(part, int) else part for part in path[:-1])
    found = nearest(name, generic, tuple(FOREIGN))
    fix = f"did you mean {found}?" if found else "`glasstune config --defaults` lists every key"
    return InputError("unknown_key", f"unknown key {_dotted(path)!r}", where=where, fix=fix)


def _no_item(path: PathKey, length: int, where: str) -> InputError:
    return InputError(
        "bad_override",
        f"{_dotted(path)}: {_dotted(path[:-1])} is a list of {length}; "
        f"its items are named 0 to {length} (the last one is new)",
        where=where,
    )


def _no_section(path: PathKey, found: Any, where: str) -> InputError:
    key = find_key(path)
    expected = f"; it takes {key.expected}" if key is not None else ""
    return InputError(
        "bad_override",
        f"{_dotted(path)} is {found!r:.60} and holds no keys of its own{expected}",
        where=where,
    )
