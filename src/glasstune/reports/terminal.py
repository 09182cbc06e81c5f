"""Progress on a terminal: bars where someone watches, plain lines where a file does.

Everything goes to stderr; stdout belongs to data. `NO_COLOR` is honoured by rich.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from glasstune.core.units import format_seconds

Fields = Mapping[str, float | str]

PLAIN_SECONDS = 5.0
"""Seconds between two plain lines of one task."""

SHORT_SECONDS = 1.0
"""A task that ends sooner leaves no line: a run evaluates often."""


def show_fields(fields: Fields) -> str:
    """Writes the values beside a bar: `loss 2.3104 · 1,840 tokens/s`."""
    parts = []
    for name, value in fields.items():
        if name == "tokens_per_second" and isinstance(value, (int, float)):
            parts.append(f"{value:,.0f} tokens/s")
        elif isinstance(value, float):
            parts.append(f"{name} {value:.4f}" if abs(value) < 1000 else f"{name} {value:.4g}")
        else:
            parts.append(f"{name} {value}")
    return " · ".join(parts)


class _FieldsColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Returns the values of a task."""
        return Text(show_fields(task.fields.get("shown", {})))


@dataclass(slots=True)
class _Plain:
    """What plain output remembers of a task."""

    total: int | None
    unit: str
    started: float
    done: int = 0
    first: int | None = None
    told: float = 0.0
    fields: dict[str, float | str] = field(default_factory=dict)


class RichProgress:
    """Draws progress on stderr; implements `core.protocols.Progress`.

    Args:
        file: Where to write; stderr by default.
        live: Whether to draw moving bars; None asks the file whether it is a terminal.
        every: Seconds between plain lines of a task.
    """

    def __init__(
        self, file: IO[str] | None = None, live: bool | None = None, every: float = PLAIN_SECONDS
    ) -> None:
        self.console = Console(file=file or sys.stderr, highlight=False, soft_wrap=True)
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = terminal if live is None else live
        self.every = every
        self._bars: Progress | None = None
        self._ids: dict[str, TaskID] = {}
        self._plain: dict[str, _Plain] = {}

    def start(self, task: str, total: int | None, unit: str) -> None:
        """Opens a bar named `task`; `total` None means unknown."""
        if not self.live:
            now = time.monotonic()
            self._plain[task] = _Plain(total, unit, started=now, told=now)
            return
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                _FieldsColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=4,
            )
            self._bars.start()
        if task in self._ids:
            self._bars.remove_task(self._ids.pop(task))
        self._ids[task] = self._bars.add_task(task, total=total, unit=unit, shown={})

    def advance(self, task: str, amount: int = 1, **fields: float | str) -> None:
        """Moves the bar and updates the values beside it."""
        if self._bars is not None and task in self._ids:
            shown = {**self._bars.tasks[self._index(task)].fields["shown"], **fields}
            self._bars.update(self._ids[task], advance=amount, shown=shown)
            return
        plain = self._plain.get(task)
        if plain is None:
            return
        now = time.monotonic()
        plain.done += amount
        if plain.first is None:
            # What a resumed run has behind it takes no part in the estimate of what is left.
            plain.first = plain.done if amount > 1 and not fields else 0
        plain.fields.update(fields)
        if now - plain.told >= self.every:
            plain.told = now
            self.say(self._line(task, plain, now))

    def finish(self, task: str) -> None:
        """Closes the bar; the last values stay."""
        plain = self._plain.pop(task, None)
        if plain is not None:
            self._ended(
                task, plain.done, plain.unit, time.monotonic() - plain.started, plain.fields
            )
        if self._bars is None or task not in self._ids:
            return
        shown = self._bars.tasks[self._index(task)]
        self._bars.remove_task(self._ids.pop(task))
        unit, values = shown.fields["unit"], shown.fields["shown"]
        self._ended(task, int(shown.completed), unit, shown.elapsed or 0.0, values)
        if not self._ids:
            self._bars.stop()
            self._bars = None

    def say(self, text: str) -> None:
        """Prints one line to the log without breaking a bar."""
        self.console.print(text, markup=False, highlight=False, emoji=False)

    def close(self) -> None:
        """Stops drawing, for example before an error is printed."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._ids.clear()
        self._plain.clear()

    def _ended(self, task: str, done: int, unit: str, elapsed: float, fields: Fields) -> None:
        if elapsed >= SHORT_SECONDS or self.every < SHORT_SECONDS:
            tail = f" · {show_fields(fields)}" if fields else ""
            self.say(f"{task}: {done:,} {unit} in {format_seconds(elapsed)}{tail}")

    def _index(self, task: str) -> int:
        assert self._bars is not None
        return [item.id for item in self._bars.tasks].index(self._ids[task])

    def _line(self, task: str, plain: _Plain, now: float) -> str:
        of = "" if plain.total is None else f"/{plain.total:,}"
        line = f"{task}: {plain.done:,}{of} {plain.unit}".rstrip()
        if plain.fields:
            line += f" · {show_fields(plain.fields)}"
        fresh = plain.done - (plain.first or 0)
        if plain.total is not None and fresh > 0:
            left = (now - plain.started) / fresh * max(0, plain.total - plain.done)
            line += f" · {format_seconds(left)} left"
        return line


def console_for(stream: IO[str]) -> Console:
    """Returns a console that writes to a stream; wide where no terminal tells a width."""
    width = None if stream.isatty() or os.environ.get("COLUMNS") else 120
    return Console(file=stream, highlight=False, width=width)


def say_notes(notes: Iterable[str], progress: RichProgress) -> None:
    """Prints translations of foreign names, once each."""
    for note in notes:
        progress.say(f"note: {note}")
