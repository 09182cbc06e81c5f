"""Automatic choices: a value and the reason it was taken.

Nothing is decided in silence. Whoever decides calls `Choices.record`; the run prints the
list and writes it to `run.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

WARNING = "warning: "
"""How the reason of a choice begins that every road must say, not only a training run."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision that the user did not make.

    Args:
        name: The config key or fact decided, for example `training.save_steps`.
        value: What was chosen (JSON-serialisable).
        reason: Why, in one sentence.
    """

    name: str
    value: Any
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object that `run.json` holds."""
        return {"name": self.name, "value": self.value, "reason": self.reason}


@dataclass(slots=True)
class Choices:
    """The ordered list of a run's automatic choices; a later one of a name replaces it."""

    _by_name: dict[str, Choice] = field(default_factory=dict)

    def record(self, name: str, value: Any, reason: str) -> Any:
        """Notes a choice and returns its value, so that it can stand in an expression."""
        self._by_name[name] = Choice(name, value, reason)
        return value

    def __iter__(self) -> Iterator[Choice]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Choice | None:
        """Returns the choice of that name, or None."""
        return self._by_name.get(name)

    def warnings(self) -> list[str]:
        """Returns the reasons that warn: they begin with `warning: `."""
        return [choice.reason for choice in self if choice.reason.startswith(WARNING)]

    def to_list(self) -> list[dict[str, Any]]:
        """Returns the JSON list that `run.json` holds."""
        return [choice.to_dict() for choice in self]
