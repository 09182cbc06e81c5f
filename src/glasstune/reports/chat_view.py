"""A chat on a terminal: one answer as it streams, or two beside each other."""

from __future__ import annotations

import sys
from typing import IO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_CONTROL = dict.fromkeys((*range(9), *range(11, 32), 127, *range(128, 160)))
"""A model's text may hold a terminal's control codes; all but tab and line break are left out."""

ROWS_PER_SECOND = 8


class ChatView:
    """Draws answers on one stream and the program's own words on another.

    Args:
        out: Answers.
        log: Words of the program; the same stream as `out` where a person watches.
    """

    def __init__(self, out: IO[str] | None = None, log: IO[str] | None = None) -> None:
        self.out = out or sys.stdout
        self.log = log or sys.stderr
        self.console = Console(file=self.out, highlight=False)
        self.sides: list[str] = []
        self.texts: dict[str, str] = {}
        self._live: Live | None = None
        self._open = ""

    def say(self, text: str) -> None:
        """Shows a word of the program."""
        self.log.write(f"{text}\n")
        self.log.flush()

    def begin(self, sides: list[str]) -> None:
        """Opens the answers of one turn."""
        self.sides, self.texts, self._open = sides, dict.fromkeys(sides, ""), ""
        if len(sides) > 1 and self.console.is_terminal:
            # What is taller than the screen shows its end: the last lines are the new ones.
            self._live = Live(
                self._columns(), console=self.console, transient=True,
                refresh_per_second=ROWS_PER_SECOND, vertical_overflow="crop",
            )  # fmt: skip
            self._live.start()

    def piece(self, side: str, text: str) -> None:
        """Adds text to a side's answer."""
        text = text.translate(_CONTROL)
        self.texts[side] += text
        if self._live is not None:
            self._live.update(self._columns(self.console.height - 3))
        elif not self.console.is_terminal or len(self.sides) == 1:
            if len(self.sides) > 1 and self._open != side:
                self.out.write(f"{chr(10) if self._open else ''}[{side}] ")
            self._open = side
            self.out.write(text)
            self.out.flush()

    def end(self) -> None:
        """Closes the answers; two stay on the screen in whole, side by side."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self.console.print(self._columns())
            return
        self.out.write("\n")
        self.out.flush()

    def _columns(self, lines: int | None = None) -> Table:
        table = Table(expand=True, show_edge=False, pad_edge=False)
        for side in self.sides:
            table.add_column(side, ratio=1, overflow="fold")
        width = max(10, self.console.width // max(1, len(self.sides)) - 3)
        table.add_row(*(self._text(self.texts[side], width, lines) for side in self.sides))
        return table

    def _text(self, text: str, width: int, lines: int | None) -> Text:
        """A side's text; only its last lines where that many do not fit."""
        if lines is None:
            return Text(text)
        wrapped = Text(text).wrap(self.console, width)
        return Text("\n").join(wrapped[-max(1, lines) :])
