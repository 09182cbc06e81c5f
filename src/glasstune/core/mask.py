"""What is trained of a row, token by token: for the terminal and the page, from data alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["trained", "context", "special", "padding"]

MARKS: dict[State, str] = {"trained": "+", "context": ".", "special": "*", "padding": "_"}
"""A sign for each state, so that none hangs on a colour."""


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One position of a row.

    Args:
        text: Its text; a token that ends inside a character has none, and the token that
            completes it has the character.
        id: Its id.
        state: `trained` if the loss judges how it is predicted; `special` if it is a control
            token that is not trained; `context` else; `padding` behind the last document.
        special: Whether it is a control token, trained or not.
        instead: Text of the token that is trained here in its place (Baichuan2's rule), or None.
    """

    text: str
    id: int
    state: State
    special: bool = False
    instead: str | None = None


@dataclass(frozen=True, slots=True)
class ShownTurn:
    """One turn of a conversation, with what the template writes around its text.

    Args:
        role: Who speaks: `system` (with a remark where the template adds it), `user`, `assistant`
            or `tool`; of a prompt and its completion these words; `unknown` where the turns cannot
            be told apart.
        start: Its first position in the row.
        end: Behind its last position.
    """

    role: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ShownDocument:
    """One document of a row.

    Args:
        origin: Where it came from.
        source: Name of its source.
        start: Its first position.
        end: Behind its last position.
        trained: Positions in state `trained`.
        turns: Its turns, one behind the other; none where it is one text.
    """

    origin: str
    source: str
    start: int
    end: int
    trained: int
    turns: tuple[ShownTurn, ...] = ()


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row as a training step gets it.

    Args:
        row: Its number in the packed set.
        tokens: All positions, padding included.
        documents: In order; their bounds are where attention and positions start anew.
    """

    row: int
    tokens: tuple[ShownToken, ...]
    documents: tuple[ShownDocument, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return asdict(self)
