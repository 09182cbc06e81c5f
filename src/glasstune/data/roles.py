"""Turns of a conversation: role names, tool calls, and the order that roles may stand in.

The policy for a conversation in a wrong order is to refuse the row (it is never repaired by
merging or dropping turns): with `on_error: stop` the run ends with row and turn named, with
`skip` the row is counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from glasstune.data.columns import as_text, keys_of
from glasstune.data.errors import refuse
from glasstune.data.read import kind_of

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}
_KEPT = ("name", "tool_call_id", "reasoning_content")
_CALL_ID = "call{:05d}"  # nine characters: Mistral's templates refuse any other length


def messages_of(value: Any, key: str) -> list[Message]:
    """Turns a list of `{from, value}` or `{role, content}` objects into messages.

    Raises:
        RowError: Names the turn (0-based) and what is wrong with it.
    """
    if value is None:
        refuse("null_answer", f"{key!r} is null: there is no conversation")
    if not isinstance(value, list):
        refuse("bad_turn", f"{key!r} must be a list of turns, found {kind_of(value)}")
    messages: list[Message] = []
    calls = 0
    for number, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            refuse("bad_turn", f"turn {number} must be an object, found {kind_of(turn)}")
        message = _message(turn, number)
        if message is None:
            continue
        for call in message.get("tool_calls", ()):
            call.setdefault("id", _CALL_ID.format(calls))
            calls += 1
        if message["role"] == "tool" and calls:
            message.setdefault("tool_call_id", _CALL_ID.format(calls - 1))
        messages.append(message)
    return messages


def _message(turn: Mapping[str, Any], number: int) -> Message | None:
    """Reads one turn; None for a system turn whose text is null."""
    role_key = "from" if "from" in turn else "role"
    text_key = "value" if "value" in turn or role_key == "from" else "content"
    if role_key not in turn:
        refuse("bad_turn", f"turn {number} has no 'role' or 'from'; it has: {keys_of(turn)}")
    role = ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
    if role is None:
        known = ", ".join(ROLES)
        refuse("unknown_role", f"turn {number} has the role {turn[role_key]!r}; known: {known}")
    calls = turn.get("tool_calls") or []
    if text_key not in turn and not calls:
        refuse(
            "missing_key",
            f"turn {number} ({turn[role_key]}) has no {text_key!r}; it has: {keys_of(turn)}",
        )
    content = turn.get(text_key)
    where = f"turn {number} ({turn[role_key]})"
    if content is None and not calls:
        if role == "system":
            return None
        code = "null_answer" if role in ("assistant", "function_call") else "null_text"
        refuse(code, f"{where} is null: its text is missing")
    text = _parts(content, where)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _parse_calls(text, where)}
    message: Message = {"role": role, "content": text}
    if calls:
        if role != "assistant":
            refuse("bad_turn", f"{where} has tool_calls, which only the assistant can make")
        message["tool_calls"] = [_call(call, where) for call in _list(calls, where)]
    for key in _KEPT:
        if isinstance(turn.get(key), str):
            message[key] = as_text(turn[key], key)
    return message


def _parts(content: Any, where: str) -> str:
    """Returns a turn's text; a list of text parts is joined."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return as_text(content, where)
    texts: list[str] = []
    for part in content:
        given = isinstance(part, Mapping)
        kind = part.get("type", "text") if given else f"{kind_of(part)} and no object"
        if not given or kind != "text" or not isinstance(part.get("text"), str):
            refuse("not_text", f"{where} holds a part of type {kind!r}; only text can be trained")
        texts.append(as_text(part["text"], where))
    return "".join(texts)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        refuse("bad_tool_call", f"{where}: tool_calls must be a list, found {kind_of(value)}")
    return value


def _parse_calls(text: str, where: str) -> list[Message]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        refuse("bad_tool_call", f"{where} must hold JSON with name and arguments: {text[:60]!r}")
    return [_call(call, where) for call in (value if isinstance(value, list) else [value])]


def _call(value: Any, where: str) -> Message:
    """Brings a call into the shape that chat templates read."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        refuse("bad_tool_call", f"{where}: a call needs a name, found {kind_of(value)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            refuse("bad_tool_call", f"{where}: the arguments are no JSON: {arguments[:60]!r}")
        arguments = parsed
    name = as_text(function["name"], where)
    call: Message = {"type": "function", "function": {"name": name, "arguments": arguments or {}}}
    if isinstance(value.get("id"), str):
        call["id"] = value["id"]
    return call


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """Reads a row's `tools`: a list of JSON schemas, or the same as a JSON string.

    Raises:
        RowError: It is neither.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            refuse("bad_tools", f"'tools' is no JSON: {value[:60]!r}")
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        refuse("bad_tools", f"'tools' must be a list of JSON schemas, found {kind_of(value)}")
    tools = [
        dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
        for tool in value
    ]
    return tools or None


def conversation(messages: list[Message]) -> list[Message]:
    """Returns the messages after checking the order of their roles.

    An optional system turn, then user and assistant in turn, where a tool's results and the
    assistant's next text may stand between; the assistant comes last.

    Raises:
        RowError: `role_order`, naming the turn; `no_answer` where nobody answers.
    """
    before = "start"
    allowed = {
        "start": ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user",),
        "call": ("tool", "user"),
        "tool": ("tool", "assistant"),
    }
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in allowed[before]:
            if before == "start":
                problem = f"turn {number} is {role}: a conversation opens with the user"
            elif before == role:
                problem = f"turns {number - 1} and {number} are both {role}"
            else:
                before = "a tool call" if before == "call" else before
                problem = f"turn {number} is {role}, which cannot follow {before}"
            refuse(
                "role_order",
                problem,
                "correct the row, or set data.on_error: skip to leave such rows out",
            )
        before = "call" if message.get("tool_calls") else role
    if not messages:
        refuse("no_answer", "the conversation has no turn")
    if messages[-1]["role"] != "assistant":
        refuse(
            "no_answer",
            f"the last turn ({len(messages) - 1}) is {messages[-1]['role']}: nobody answers it",
            "correct the row, or set data.on_error: skip to leave such rows out",
        )
    return messages
