"""Columns of a row by name, by dotted path, or through a template in braces."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glasstune.data.errors import refuse
from glasstune.data.read import kind_of

PLACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def find(row: Mapping[str, Any], path: str) -> Any:
    """Returns the value at a column name or dotted path such as `instances.0.output`.

    Raises:
        RowError: `missing_key`; names the key and the keys found.
    """
    if path in row:
        return known(row[path])
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and _index(part, value):
            value = value[int(part)]
        else:
            refuse(
                "missing_key",
                f"there is no {path!r}; the row has: {keys_of(row)}",
                "correct data.sources columns: a path inside a row is written with dots "
                "(messages.0.content); rows that lack it go with data.on_error: skip",
            )
    return known(value)


def known(value: Any) -> Any:
    """Returns the value; NaN is None, since tables write a missing text so."""
    return None if isinstance(value, float) and value != value else value


def _index(part: str, value: Sequence[Any]) -> bool:
    return part.isascii() and part.isdigit() and int(part) < len(value)


def keys_of(row: Mapping[str, Any]) -> str:
    """Returns the row's keys for a message, at most twenty."""
    keys = [str(key) for key in row]
    shown = ", ".join(keys[:20]) or "no key"
    return shown + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")


class Mapped:
    """A row seen through the `columns` mapping of its source.

    Args:
        row: The row as read.
        columns: Format key to path or template; keys not named here keep their own name.
    """

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self.row = row
        self.columns = columns

    def has(self, key: str) -> bool:
        """Tells whether the key is mapped or stands in the row."""
        return key in self.columns or key in self.row

    def value(self, key: str) -> Any:
        """Returns the key's value; null and NaN are None.

        Raises:
            RowError: `missing_key`; names key, column and the keys found.
        """
        rule = self.columns.get(key)
        if rule is None:
            if key not in self.row:
                refuse(
                    "missing_key",
                    f"there is no {key!r}; the row has: {keys_of(self.row)}",
                    "correct the row, or leave such rows out (data.on_error: skip); rows of "
                    "another shape belong to a source of their own",
                )
            return known(self.row[key])
        if "{" not in rule:
            return find(self.row, rule)
        return self._fill(rule)

    def text(self, key: str, *, answer: bool = False) -> str:
        """Returns a required text.

        Args:
            key: The format's key.
            answer: Whether this is what is trained, for the message.

        Raises:
            RowError: The key is missing, null, or holds no text.
        """
        value = self.value(key)
        if value is None:
            what = "the answer" if answer else "the text"
            refuse(
                "null_answer" if answer else "null_text",
                f"{key!r} is null or NaN: {what} is missing",
                'write "" if an empty text is meant',
            )
        return as_text(value, key)

    def optional(self, key: str) -> str | None:
        """Returns an optional text; a missing key or null is None.

        Raises:
            RowError: The key holds no text.
        """
        if not self.has(key):
            return None
        value = self.value(key)
        return None if value is None else as_text(value, key)

    def _fill(self, rule: str) -> str | None:
        """Fills a template; any null inside makes the whole null, never the word None."""
        null = False

        def put(match: re.Match[str]) -> str:
            nonlocal null
            if match.group(1) is None:
                return match.group()[0]
            value = find(self.row, match.group(1).strip())
            null = null or value is None
            return "" if value is None else as_text(value, match.group(1))

        text = PLACE.sub(put, rule)
        return None if null else text


def as_text(value: Any, key: str) -> str:
    """Returns a scalar as text: numbers as written in JSON, true and false in lower case.

    Raises:
        RowError: `not_text` for lists and objects; `bad_unicode` for half a surrogate pair, which
            no tokenizer takes.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            refuse("bad_unicode", f"{key!r} holds half of a surrogate pair, which is no character")
        return value
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, (list, dict)):
        refuse("not_text", f"{key!r} must be text, found {kind_of(value)}")
    return str(value)
