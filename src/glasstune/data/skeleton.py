"""The usual row, rendered twice instead of four times.

`spans.find_spans` renders a conversation again with marks inside its texts. For a question and its
answer the marks show the same every time, so they are set once for each order of roles: what
stands between the texts is the template's skeleton. A row whose own renderings are, character for
character, the skeleton with its texts put in has its turns where the skeleton has them. Any other
row (a template that strips, or looks into a text) goes the long way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glasstune.data.errors import RowError
from glasstune.data.roles import Message
from glasstune.data.spans import Render, Rendered, TemplateTraits, find_spans

_PLANE = 0x100000
"""First private-use character of the texts that a skeleton is learnt from."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What a template writes around the texts of one order of roles.

    Args:
        pieces: Around the texts of the whole conversation; one more than there are texts.
        prompt: Around those of its prompt.
        before: Characters before the answer's text from which on it is trained.
        behind: Characters behind it up to which it is trained.
        open_end: As in `Rendered`.
    """

    pieces: tuple[str, ...]
    prompt: tuple[str, ...]
    before: int
    behind: int
    open_end: bool

    def render(self, render: Render, messages: Sequence[Message]) -> Rendered | None:
        """Renders a conversation of these roles; None where it does not follow the skeleton."""
        texts = [message["content"] for message in messages]
        text = render(messages, None, False)
        if text != _joined(self.pieces, texts):
            return None
        prompt = render(messages[:-1], None, True)
        if prompt != _joined(self.prompt, texts[:-1]):
            return None
        end = len(text) - len(self.pieces[-1])
        span = (end - len(texts[-1]) - self.before, end + self.behind)
        return Rendered(text, (span,), self.open_end, prompt, 0)


def _joined(pieces: Sequence[str], texts: Sequence[str]) -> str:
    parts = [pieces[0]]
    for text, piece in zip(texts, pieces[1:], strict=True):
        parts += (text, piece)
    return "".join(parts)


def roles_of(messages: Sequence[Message]) -> tuple[str, ...] | None:
    """Returns the roles of a conversation that may have a skeleton.

    Its one answer comes last, it is text alone, and no text is blank.
    """
    roles = tuple(message["role"] for message in messages)
    if roles.count("assistant") != 1 or roles[-1] != "assistant":
        return None
    plain = all(len(message) == 2 and message["content"].strip() for message in messages)
    return roles if plain else None


def learn_skeleton(render: Render, roles: Sequence[str], traits: TemplateTraits) -> Skeleton | None:
    """Learns what a template writes around the texts of an order of roles.

    Returns:
        The skeleton, or None where the template has none for it.
    """
    texts = [f"a{chr(_PLANE + number)}b" for number in range(len(roles))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    try:
        row = find_spans(render, messages, None, traits)
    except RowError:
        return None
    # Where the answer does not start as its prompt ends (drift), there is none either.
    pieces, prompt = _parted(row.text, texts), _parted(row.prompt, texts[:-1])
    if pieces is None or prompt is None or not pieces[-2].startswith(prompt[-1]):
        return None
    ((start, end),) = row.spans
    at = len(row.text) - len(pieces[-1]) - len(texts[-1])
    before, behind = at - start, end - at - len(texts[-1])
    # The answer is trained from where the prompt ends; then its start hangs on no text.
    if before != len(pieces[-2]) - len(prompt[-1]) or behind < 0:
        return None
    return Skeleton(pieces, prompt, before, behind, row.open_end)


def _parted(text: str, texts: Sequence[str]) -> tuple[str, ...] | None:
    """Takes a rendering apart at its texts; None unless each stands there once, in order."""
    pieces: list[str] = []
    for part in texts:
        before, found, text = text.partition(part)
        if not found or part in text:
            return None
        pieces.append(before)
    if any(ord(letter) >= _PLANE for piece in (*pieces, text) for letter in piece):
        return None
    return (*pieces, text)
