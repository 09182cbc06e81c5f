"""YAML text with positions: numbers as people write them, duplicate keys refused, lines kept.

PyYAML follows YAML 1.1, where `1e-5` is a string, `no` is false, `010` is eight and `1:30` is
ninety. Here scalars follow YAML 1.2's core schema, and `1e-5` is a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from glasstune.core.errors import InputError

PathKey = tuple[str | int, ...]
"""Keys and list indices that lead to a value: `("data", "sources", 0, "path")`."""

_MAX_NODES = 20_000  # aliases can multiply a small file into a huge one

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
    r"|\.(?:nan|NaN|NAN)"
)
_TAG = "tag:yaml.org,2002:"


@dataclass(slots=True)
class YamlDocument:
    """A parsed text.

    Args:
        value: Plain Python values; None for an empty text.
        name: The file's name, for messages.
        lines: 1-based line of each key or list item.
        raw: The text of each plain scalar, so that `run_name: 2024` can stay text.
    """

    value: Any
    name: str
    lines: dict[PathKey, int] = field(default_factory=dict)
    raw: dict[PathKey, str] = field(default_factory=dict)

    def where(self, path: PathKey) -> str:
        """Returns `file:line` of the nearest known parent of `path`."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.name}:{self.lines[path]}" if path else self.name


class _Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's resolvers; scalars are read by `_scalar`."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute
    DEFAULT_SCALAR_TAG = "!untagged"  # type: ignore[misc]


def parse_yaml(text: str, name: str) -> YamlDocument:
    """Parses one YAML document.

    Args:
        text: The text, decoded.
        name: The file's name, for messages.

    Raises:
        InputError: `yaml_syntax`, `duplicate_key`, `yaml_key`, `yaml_tag` or `yaml_too_deep`,
            with file and line.
    """
    document = YamlDocument(None, name)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        if node is not None:
            document.value = _Builder(document).build(node, ())
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, name) from None
    except yaml.YAMLError as error:
        raise InputError(
            "yaml_syntax",
            f"not readable as YAML: {' '.join(str(error).split())[:200]}",
            where=name,
            fix="save the file as UTF-8 text without control characters",
        ) from None
    except RecursionError:
        raise InputError(
            "yaml_too_deep",
            "the values are nested too deeply",
            where=name,
            fix="a configuration needs at most a handful of levels",
        ) from None
    return document


def _syntax_error(error: yaml.MarkedYAMLError, text: str, name: str) -> InputError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.split("\n")
    shown = lines[line - 1].strip("\r") if line <= len(lines) else ""
    if "\t" in shown[: len(shown) - len(shown.lstrip())]:
        message, fix = "the line is indented with a tab", "YAML indents with spaces only"
    else:
        message = f"not valid YAML: {error.problem or error.context or 'cannot be read'}"
        fix = f"look at this line: {shown.strip()[:80]!r}" if shown.strip() else "check the end"
    return InputError("yaml_syntax", message, where=f"{name}:{line}", fix=fix)


class _Builder:
    """Builds Python values from nodes and notes where each came from."""

    def __init__(self, document: YamlDocument) -> None:
        self.document = document
        self.open: set[int] = set()
        self.count = 0

    def build(self, node: yaml.Node, path: PathKey) -> Any:
        """Returns the value of a node that stands at `path`."""
        line = node.start_mark.line + 1
        self.document.lines.setdefault(path, line)
        self.count += 1
        if id(node) in self.open or self.count > _MAX_NODES:
            raise self._error("yaml_too_deep", "an alias repeats itself without end", line)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self._mapping(node, path)
        finally:
            self.open.discard(id(node))
        raise self._error("yaml_tag", f"the tag {node.tag!r} is not supported", line)

    def _mapping(self, node: yaml.MappingNode, path: PathKey) -> dict[str, Any]:
        built: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error("yaml_key", "a key must be plain text, not a list or map", line)
            key = str(key_node.value)
            if key in first_line:
                raise self._error(
                    "duplicate_key",
                    f"the key {'.'.join(map(str, (*path, key)))!r} is given twice "
                    f"(first in line {first_line[key]})",
                    line,
                    "keep one of them",
                )
            first_line[key] = line
            if key == "<<" and key_node.style is None:
                parts = self.build(value_node, (*path, key))
                for part in parts if isinstance(parts, list) else [parts]:
                    if not isinstance(part, dict):
                        raise self._error("yaml_key", "'<<' takes a map to merge", line)
                    merged = {**part, **merged}
                continue
            self.document.lines[(*path, key)] = line
            built[key] = self.build(value_node, (*path, key))
        return {**merged, **built}

    def _scalar(self, node: yaml.ScalarNode, path: PathKey) -> Any:
        text = str(node.value)
        if node.tag == _TAG + "str" or (node.style is not None and node.tag == "!untagged"):
            return text
        self.document.raw[path] = text
        if node.tag == "!untagged":
            return plain_value(text)
        kind = node.tag.removeprefix(_TAG)
        value = plain_value(text)
        if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind == type(value).__name__ or (kind == "null" and value is None):
            return value
        line = node.start_mark.line + 1
        raise self._error("yaml_tag", f"the tag {node.tag!r} does not fit {text[:40]!r}", line)

    def _error(self, code: str, message: str, line: int, fix: str = "") -> InputError:
        return InputError(code, message, where=f"{self.document.name}:{line}", fix=fix)


def plain_value(text: str) -> Any:
    """Reads a plain scalar by YAML 1.2's core schema: null, bool, int, float, else text."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    try:
        if _INT.fullmatch(text):
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if _FLOAT.fullmatch(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (ValueError, OverflowError):
        # `1__0`, or more digits than Python converts: no number, so text.
        return text
    return text
