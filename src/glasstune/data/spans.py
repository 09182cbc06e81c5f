"""Where the assistant's turns lie in what a chat template rendered, exactly.

Rendering a prefix of the conversation is no way to find a turn: Qwen3 writes `<think></think>`
only into the last assistant turn. Here the conversation is rendered twice, as it is and with one
private-use character ("mark") put inside the text of each turn. If taking the marks out of the
second rendering gives the first one, character for character, the marks did not change what the
template does, and the places of the marks are the places of the texts. If not, the row is refused.

- A turn's trained text starts where the generation prompt ends: what
  `add_generation_prompt=True` renders after the text of the turn before is context, everything
  after it is trained (with the same template variables, so Qwen3's empty think block is context
  with `enable_thinking: false` and trained without it).
- It ends with the first end token after the text (of a tool call: the last one before the next
  turn). The line break after the end token is not trained.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from glasstune.data.errors import RowError, refuse
from glasstune.data.roles import Message

Tools = list[dict[str, Any]] | None
_PLANES = ((0xF0000, re.compile("[\U000f0000-\U000ffffd]")),
           (0x100000, re.compile("[\U00100000-\U0010fffd]")))  # fmt: skip
_PER_TURN = 4
_OPEN, _CLOSE, _CALL = range(3)


class Render(Protocol):
    """Renders a conversation to text."""

    def __call__(self, messages: Sequence[Message], tools: Tools, generation: bool) -> str:
        """`generation` asks for the generation prompt at the end."""


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What a template does, learnt from two probe conversations.

    Args:
        end_tokens: Tokens that close an assistant's turn; empty where it writes none.
        has_generation_prompt: Whether it opens the assistant's turn when asked to.
        renders_tools: Whether the list of tools shows in its text.
        sample: The two-turn probe as rendered, for messages.
    """

    end_tokens: tuple[str, ...]
    has_generation_prompt: bool
    renders_tools: bool
    sample: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation.

    Args:
        text: What the template gives.
        spans: Per assistant turn the characters that are trained, [start, end).
        open_end: Whether the last turn has no end token, so that one must be added.
        prompt: What generation renders in place of the last turn.
        drifted: Number of turns that the generation prompt would open in another way.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    open_end: bool
    prompt: str
    drifted: int


def learn_template(render: Render, tokens: Sequence[str]) -> TemplateTraits:
    """Finds a template's end tokens and abilities.

    Args:
        render: The template.
        tokens: All added and special tokens of the tokenizer.

    Raises:
        RowError: It cannot render a user's and an assistant's turn.
    """
    user, first = chr(_PLANES[0][0]), chr(_PLANES[0][0] + 1)
    short: list[Message] = [
        {"role": "user", "content": f"question{user}"},
        {"role": "assistant", "content": f"answer{first}"},
    ]
    again: list[Message] = [
        {"role": "user", "content": "second question"},
        {"role": "assistant", "content": "second answer"},
    ]
    one, two = render(short, None, False), render(short + again, None, False)
    if one.count(first) != 1 or two.count(first) != 1:
        refuse("template_span", "the chat template does not render an assistant's text once")
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
    last = pattern.search(one, one.index(first))
    middle = pattern.search(two, two.index(first)) if last else None
    ends = dict.fromkeys(match.group() for match in (last, middle) if match)
    asked, plain = render(short[:1], None, True), render(short[:1], None, False)
    # Some old templates open the assistant's turn together with closing the user's.
    opened = asked != plain or one.startswith(f"{plain}answer") or one.startswith(f"{plain} answer")
    tool = {"type": "function", "function": {"name": f"probe{first}", "description": "",
            "parameters": {"type": "object", "properties": {}}}}  # fmt: skip
    try:
        shows_tools = f"probe{first}" in render(short[:1], [tool], True)
    except RowError:
        shows_tools = False
    sample = one.replace(user, "").replace(first, "")
    return TemplateTraits(tuple(ends), opened, shows_tools, sample)


def find_spans(
    render: Render, messages: Sequence[Message], tools: Tools, end_tokens: Sequence[str]
) -> Rendered:
    """Renders a conversation and finds its assistant turns.

    Args:
        render: The template.
        messages: A conversation in a right order of roles; the last is the assistant's.
        tools: The functions it may call.
        end_tokens: From `learn_template`.

    Raises:
        RowError: The template refuses the row, leaves a turn out, or does not let its turns be
            found exactly.
    """
    text = render(messages, tools, False)
    plane = next((p for p, pattern in _PLANES if not pattern.search(text)), None)
    if plane is None:
        refuse("template_span", "the text uses private-use characters of both planes")
    for middle in (False, True):
        marked = _Marked(messages, plane, middle)
        whole = render(marked.messages, tools, False)
        if marked.clean(whole) == text:
            spans, open_end, drifted = _locate(render, marked, whole, tools, end_tokens)
            prompt = render(messages[:-1], tools, True)
            return Rendered(text, spans, open_end, prompt, drifted)
    refuse(
        "template_span",
        "the chat template changes the texts of this conversation, so its assistant turns cannot "
        "be found exactly",
        "use a template with {% generation %} markers (data.chat_template: FILE)",
    )


class _Marked:
    """A conversation with marks in its texts.

    With `middle` the closing mark stands in the middle of a text, for templates that look at how
    a text starts or ends.
    """

    def __init__(self, messages: Sequence[Message], plane: int, middle: bool) -> None:
        self.pattern = dict(_PLANES)[plane]
        self.plane = plane
        self.after: list[str | None] = []
        self.messages = [self._mark(m, k, middle) for k, m in enumerate(messages)]

    def mark(self, turn: int, kind: int) -> str:
        return chr(self.plane + _PER_TURN * turn + kind)

    def clean(self, text: str) -> str:
        return self.pattern.sub("", text)

    def _mark(self, message: Message, turn: int, middle: bool) -> Message:
        content = message["content"]
        core = content.strip()
        assistant = message["role"] == "assistant"
        message = dict(message)
        if core or not assistant:
            lead = content[: len(content) - len(content.lstrip())] if core else ""
            tail = content[len(lead) + len(core) :]
            at = (len(core) + 1) // 2 if middle else len(core)
            opening = "" if middle else self.mark(turn, _OPEN)
            closing = self.mark(turn, _CLOSE)
            message["content"] = lead + opening + core[:at] + closing + core[at:] + tail
            self.after.append(core[at:])
        else:
            self.after.append(None)
        if message.get("tool_calls"):
            message["tool_calls"] = calls = copy.deepcopy(message["tool_calls"])
            for call in calls:
                call["function"]["name"] += self.mark(turn, _CALL)
        return message

    def end_of_text(self, rendered: str, turn: int) -> int:
        """Returns where the turn's text ends in a marked rendering."""
        mark, after = self.mark(turn, _CLOSE), self.after[turn]
        found = rendered.count(mark)
        role = self.messages[turn]["role"]
        if found != 1 or after is None:
            refuse(
                "template_hides_turn",
                f"the chat template renders the text of turn {turn} ({role}) {found} times"
                + (": it has no place for tool results" if role == "tool" and not found else ""),
            )
        at = rendered.index(mark) + 1
        if not rendered.startswith(after, at):
            refuse("template_span", f"the chat template changes the text of turn {turn} ({role})")
        return at + len(after)


def _locate(
    render: Render,
    marked: _Marked,
    whole: str,
    tools: Tools,
    end_tokens: Sequence[str],
) -> tuple[tuple[tuple[int, int], ...], bool, int]:
    """Finds each assistant turn in `whole`, the marked rendering.

    Returns:
        Spans in the rendering without marks, whether the last has no end token, and how many
        turns the generation prompt would open otherwise.
    """
    marks = [match.start() for match in marked.pattern.finditer(whole)]
    messages = marked.messages
    spans: list[tuple[int, int]] = []
    drifted = 0
    open_end = False
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            refuse("role_order", "turn 0 is assistant: a conversation opens with the user")
        prompt = render(messages[:turn], tools, True)
        opening = prompt[marked.end_of_text(prompt, turn - 1) :]
        before = marked.end_of_text(whole, turn - 1)
        if whole.startswith(opening, before):
            start = before + len(opening)
        else:
            start = whole.find(marked.mark(turn, _OPEN)) + 1
            drifted += 1
            if start == 0:
                refuse("template_span", f"the start of turn {turn} (assistant) cannot be found")
        last = turn == len(messages) - 1
        following = -1 if last else whole.find(marked.mark(turn + 1, _OPEN))
        if not last and following < 0:  # marks in the middle of texts: any place before the next
            following = marked.end_of_text(whole, turn + 1)
        limit = len(whole) if last else following
        end, closed = _end(marked, whole, turn, start, limit, end_tokens)
        if last and not closed:
            end, open_end = len(whole), True
        spans.append((start - bisect_left(marks, start), end - bisect_left(marks, end)))
    return tuple(spans), open_end, drifted


def _end(
    marked: _Marked, whole: str, turn: int, start: int, limit: int, end_tokens: Sequence[str]
) -> tuple[int, bool]:
    """Returns where the turn's trained text ends, and whether an end token closes it."""
    message = marked.messages[turn]
    text_end = start if marked.after[turn] is None else marked.end_of_text(whole, turn)
    if message.get("tool_calls"):
        if whole.count(marked.mark(turn, _CALL), start, limit) < len(message["tool_calls"]):
            refuse(
                "template_hides_tool_call",
                f"the chat template does not render the tool call of turn {turn}",
                "use a template with tool calls (data.chat_template: FILE)",
            )
        found = max((whole.rfind(token, text_end, limit), token) for token in end_tokens or ("",))
        closed = bool(end_tokens) and found[0] >= 0
        if not closed and turn < len(marked.messages) - 1:
            refuse("template_span", f"the end of the tool call of turn {turn} cannot be found")
        return (found[0] + len(found[1]) if closed else text_end), closed
    places = [(at, t) for t in end_tokens if (at := whole.find(t, text_end, limit)) >= 0]
    if not places:
        return text_end, False
    at, token = min(places)
    return at + len(token), True
