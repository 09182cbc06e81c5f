"""The mask of rows on a terminal: every token coloured, and marked by a word and a sign."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from glasstune.core.mask import MARKS, ShownDocument, ShownRow, ShownToken, State

_STYLES: dict[State, str] = {
    "trained": "bold green",
    "context": "default",
    "special": "yellow",
    "padding": "dim",
}
_BORDER = "\u2502"
"""A box drawing line: the plain bar stands in many control tokens."""
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"}


def print_rows(rows: Iterable[ShownRow], console: Console) -> None:
    """Prints rows turn by turn, one line for each run of tokens in the same state.

    Tokens are parted by bars, and line breaks are written as a backslash and n. A token that is
    trained as another one (Baichuan2's rule) is followed by `=>` and that token.
    """
    for row in rows:
        padding = [token for token in row.tokens if token.state == "padding"]
        trained = sum(document.trained for document in row.documents)
        count = len(row.tokens) - len(padding)
        noun = "document" if len(row.documents) == 1 else "documents"
        _say(
            console,
            Text(
                f"row {row.row}: {len(row.documents)} {noun}, {count:,} tokens, {trained:,} trained"
            ),
        )
        for document in row.documents:
            _document(console, row.tokens, document)
        if padding:
            line = Text(f"    {'padding':>7} {MARKS['padding']} {len(padding)} positions")
            line.stylize(_STYLES["padding"])
            _say(console, line)
        _say(console, Text(""))


def _document(console: Console, tokens: Sequence[ShownToken], document: ShownDocument) -> None:
    place = f"{document.origin} ({document.source})"
    size = f"positions {document.start:,} to {document.end - 1:,}, {document.trained:,} trained"
    _say(console, Text(f"  {place}: {size}"))
    if not document.turns:
        _tokens(console, tokens[document.start : document.end])
    for number, turn in enumerate(document.turns):
        _say(console, Text(f"   turn {number} {turn.role}"))
        _tokens(console, tokens[turn.start : turn.end])


def _tokens(console: Console, tokens: Sequence[ShownToken]) -> None:
    for state, run in groupby(tokens, key=lambda token: token.state):
        line = Text(f"    {state:>7} {MARKS[state]} ")
        for number, token in enumerate(run):
            if number:
                line.append(_BORDER, "dim")
            line.append(_shown(token), _STYLES[state])
        _say(console, line)


def _shown(token: ShownToken) -> str:
    text = _escaped(token.text)
    return text if token.instead is None else f"{text} => {_escaped(token.instead)}"


def _escaped(text: str) -> str:
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


def _say(console: Console, line: Text) -> None:
    console.print(line, soft_wrap=True)
