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
- It ends with the template's end token after the text (of a tool call: with the token that the
  call's own rendering closes with). The line break after the end token is not trained. Where a
  template writes none (GLM), the token that opens the next turn is what the answer stops at.
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
        end_tokens: What closes an assistant's turn, one token or several in a row (Cohere); empty
            where it writes nothing.
        has_generation_prompt: Whether it opens the assistant's turn when asked to.
        renders_tools: Whether the list of tools shows in its text.
        token: Pattern of all added and special tokens.
    """

    end_tokens: tuple[str, ...]
    has_generation_prompt: bool
    renders_tools: bool
    token: re.Pattern[str]


NO_TRAITS = TemplateTraits((), True, False, re.compile("(?!)"))
"""For runs without a Jinja template."""


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
        tokens: All added and special tokens of the tokenizer but its begin token.

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
    token = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
    ends = _end_tokens(token, one[one.index(first) :], two[two.index(first) :])
    asked, plain = render(short[:1], None, True), render(short[:1], None, False)
    # Some old templates open the assistant's turn together with closing the user's.
    opened = asked != plain or one.startswith(f"{plain}answer") or one.startswith(f"{plain} answer")
    tool = {"type": "function", "function": {"name": f"probe{first}", "description": "",
            "parameters": {"type": "object", "properties": {}}}}  # fmt: skip
    try:
        shows_tools = f"probe{first}" in render(short[:1], [tool], True)
    except RowError:
        shows_tools = False
    return TemplateTraits(ends, opened, shows_tools, token)


def _end_tokens(token: re.Pattern[str], at_end: str, before_turn: str) -> tuple[str, ...]:
    """Returns what closes a last answer, and an answer that a turn follows.

    Args:
        token: Pattern of all tokens.
        at_end: The rendering behind a last answer.
        before_turn: The rendering behind an answer in the middle.
    """
    row = re.compile(f"(?:{token.pattern})+")
    last, middle = row.search(at_end), row.search(before_turn)
    if last is None:
        return ()
    ends = [last.group()]
    if middle is not None and not middle.group().startswith(last.group()):
        # gpt-oss closes turns in the middle by another token. The next turn's opening may follow
        # it without a break, so only one token is taken.
        one = token.match(middle.group())
        ends += [one.group()] if one else []
    return tuple(ends)


def find_spans(
    render: Render, messages: Sequence[Message], tools: Tools, traits: TemplateTraits
) -> Rendered:
    """Renders a conversation and finds its assistant turns.

    Args:
        render: The template.
        messages: A conversation in a right order of roles; the last is the assistant's.
        tools: The functions it may call.
        traits: From `learn_template`.

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
            spans, open_end, drifted = _Locator(render, marked, whole, tools, traits).turns()
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

    def lead(self, turn: int) -> str:
        """Returns the white space that a turn's text opens with."""
        content: str = self.messages[turn]["content"]
        return content[: len(content) - len(content.lstrip())]

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


def text_places(
    render: Render, messages: Sequence[Message], tools: Tools
) -> tuple[str, list[tuple[int, int] | None]]:
    """Renders a conversation and finds the texts of all its turns, to show them.

    Args:
        render: The template.
        messages: A conversation.
        tools: The functions it may call.

    Returns:
        The rendering, and per turn the characters of its text, [start, end): of a call those of
        the function's name; None where the template leaves the turn out or its text is changed.

    Raises:
        RowError: The template refuses it.
    """
    text = render(messages, tools, False)
    plane = next((p for p, pattern in _PLANES if not pattern.search(text)), None)
    if plane is None:
        return text, [None] * len(messages)
    marked = _Marked(messages, plane, False)
    whole = render(marked.messages, tools, False)
    if marked.clean(whole) != text:
        return text, [None] * len(messages)
    marks = [match.start() for match in marked.pattern.finditer(whole)]

    def place(turn: int, kind: int) -> int | None:
        mark = marked.mark(turn, kind)
        at = whole.index(mark) if whole.count(mark) == 1 else None
        return None if at is None else at - bisect_left(marks, at)

    found: list[tuple[int, int] | None] = []
    for turn in range(len(messages)):
        start, end, call = (place(turn, kind) for kind in (_OPEN, _CLOSE, _CALL))
        if start is not None and end is not None:
            found.append((start, end))
        else:
            found.append(None if call is None else (call, call))
    return text, found


class _Locator:
    """Finds the assistant turns in `whole`, a marked rendering."""

    def __init__(
        self, render: Render, marked: _Marked, whole: str, tools: Tools, traits: TemplateTraits
    ) -> None:
        self.render = render
        self.marked = marked
        self.whole = whole
        self.tools = tools
        self.traits = traits
        self.drifted = 0

    def turns(self) -> tuple[tuple[tuple[int, int], ...], bool, int]:
        """Finds all turns.

        Returns:
            Spans in the rendering without marks, whether the last has no end token, and how many
            turns the generation prompt would open otherwise.
        """
        marks = [match.start() for match in self.marked.pattern.finditer(self.whole)]
        spans: list[tuple[int, int]] = []
        open_end = False
        for turn, message in enumerate(self.marked.messages):
            if message["role"] != "assistant":
                continue
            start = self._start(turn)
            end, closed = self._call_end(turn, start) if message.get("tool_calls") else self._end(
                turn, start
            )  # fmt: skip
            if turn == len(self.marked.messages) - 1 and not closed:
                end, open_end = len(self.whole), True
            spans.append((start - bisect_left(marks, start), end - bisect_left(marks, end)))
        return tuple(spans), open_end, self.drifted

    def _start(self, turn: int) -> int:
        if turn == 0:
            refuse("role_order", "turn 0 is assistant: a conversation opens with the user")
        prompt = self.render(self.marked.messages[:turn], self.tools, True)
        opening = prompt[self.marked.end_of_text(prompt, turn - 1) :]
        before = self.marked.end_of_text(self.whole, turn - 1)
        if self.whole.startswith(opening, before):
            return before + len(opening)
        self.drifted += 1
        # What the turn has in common with its generation prompt is context, up to a whole token.
        shared = 0
        while (
            opening[shared : shared + 1] == self.whole[before + shared : before + shared + 1] != ""
        ):
            shared += 1
        for match in self.traits.token.finditer(opening):
            if match.start() < shared < match.end():
                shared = match.start()
        text = self.whole.find(self.marked.mark(turn, _OPEN))
        if text >= 0:  # the rest of the header is context, too; blanks before the text are not
            lead = self.marked.lead(turn)
            blanks = len(lead) if self.whole.endswith(lead, before + shared, text) else 0
            return text - blanks if blanks else text + 1
        # The text's start is not there: an empty text, or thoughts that the template moves.
        if shared == 0:
            refuse("template_span", f"the start of turn {turn} (assistant) cannot be found")
        return before + shared

    def _limit(self, turn: int) -> int:
        """Returns a place behind the turn and not behind the next turn's text."""
        if turn == len(self.marked.messages) - 1:
            return len(self.whole)
        following = self.whole.find(self.marked.mark(turn + 1, _OPEN))
        return following if following >= 0 else self.marked.end_of_text(self.whole, turn + 1)

    def _end(self, turn: int, start: int) -> tuple[int, bool]:
        """Returns where a turn's trained text ends, and whether an end token closes it."""
        empty = self.marked.after[turn] is None
        end = start if empty else self.marked.end_of_text(self.whole, turn)
        return self._close(turn, end)

    def _close(self, turn: int, end: int) -> tuple[int, bool]:
        """Takes the end token behind a text into its turn."""
        limit = self._limit(turn)
        ends = self.traits.end_tokens
        places = [
            (at, -len(text), text)
            for text in ends
            if (at := self.whole.find(text, end, limit)) >= 0
        ]
        if places:
            at, _, text = min(places)
            return at + len(text), True
        if not ends and (opening := self.traits.token.match(self.whole, end)):
            return opening.end(), True
        return end, False

    def _call_end(self, turn: int, start: int) -> tuple[int, bool]:
        """Returns the same for a tool call, whose text is not the message's own."""
        message, mark = self.marked.messages[turn], self.marked.mark(turn, _CALL)
        calls = len(message["tool_calls"])
        if self.whole.count(mark, start, self._limit(turn)) < calls:
            refuse(
                "template_hides_tool_call",
                f"the chat template does not render the tool call of turn {turn}",
                "use a template with tool calls (data.chat_template: FILE)",
            )
        alone = self.render(self.marked.messages[: turn + 1], self.tools, False)
        name = (
            start  # behind the call's last mention of the name; a tool's turn may mention it, too
        )
        for _ in range(alone.count(mark)):
            name = self.whole.index(mark, name) + 1
        rest = alone[alone.rfind(mark) + 1 :].rstrip()
        if self.whole.startswith(rest, name):
            end = name + len(rest)
            last = max((m.end() for m in self.traits.token.finditer(rest)), default=0)
            # The call's rendering closes with a token, unless that token is part of the call.
            closed = last == len(rest) > 0 and not self._is_call_token(rest)
            return (end, True) if closed else self._close(turn, end)
        places = [
            (at + len(text), True)
            for text in self.traits.end_tokens
            if (at := self.whole.rfind(text, name, self._limit(turn))) >= 0
        ]
        if not places:
            refuse("template_span", f"the end of the tool call of turn {turn} cannot be found")
        return max(places)

    def _is_call_token(self, rest: str) -> bool:
        """Tells whether the last token closes the call and not the turn, as `</tool_call>` does.

        Then a template that has end tokens writes one of them, or the next turn's opening,
        behind it.
        """
        tokens = [match.group() for match in self.traits.token.finditer(rest)]
        return tokens[-1].startswith("</") and not rest.endswith(self.traits.end_tokens or ("\0",))
