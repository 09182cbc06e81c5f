"""Row shapes: alpaca, conversations, messages, prompt/completion, text.

Every shape becomes an `Example`: a conversation, a prompt with its completion, or a text.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from glasstune.core.errors import InputError
from glasstune.data.columns import PLACE, Mapped, keys_of
from glasstune.data.errors import refuse
from glasstune.data.read import kind_of
from glasstune.data.roles import Message, conversation, messages_of, tools_of

Format = Literal["alpaca", "conversations", "messages", "prompt_completion", "text", "baichuan2"]
InputJoin = Literal["blank_line", "alpaca"]

REQUIRED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "baichuan2": ("conversations",),
}
"""Keys that a row of the format must have; `auto` tries them in this order."""

OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": ("tools", "system"),
    "conversations": ("tools", "system"),
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("system",),
    "text": (),
    "baichuan2": ("system",),
}

INPUT_HEADER = "\n\n### Input:\n"
"""What stands between an instruction and its input in the published alpaca prompt."""


@dataclass(slots=True)
class Example:
    """One row in the one shape that the encoders know.

    Args:
        kind: Which of the fields below is set.
        origin: `file:line` or `file[row]`.
        messages: A conversation that ends with the assistant (kind `chat`).
        tools: JSON schemas of the functions that the conversation may call.
        prompt: Context (kind `pair`).
        completion: What is trained after it (kind `pair`).
        text: Text trained whole (kind `text`).
        columns: Values that a loss function may read.
    """

    kind: Literal["chat", "pair", "text"]
    origin: str = ""
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    prompt: str = ""
    completion: str = ""
    text: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)

    def texts(self) -> list[str]:
        """Returns all texts of the row in order: what makes two rows the same."""
        if self.kind == "text":
            return [self.text]
        if self.kind == "pair":
            return [self.prompt, self.completion]
        parts: list[str] = []
        for message in self.messages:
            parts += [message["content"], message.get("reasoning_content", "")]
            parts += [str(call) for call in message.get("tool_calls", ())]
        return parts


def detect_format(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], where: str
) -> Format:
    """Finds the format of a source from its first rows and its `columns`.

    Args:
        rows: Its first rows; the first that fits a format decides.
        columns: The mapping, whose keys belong to one format.
        where: The source, for the message.

    Raises:
        InputError: No format fits; lists the keys found and the formats. Preference data
            (chosen/rejected) is refused by name.
    """
    every = {key for name in REQUIRED for key in REQUIRED[name] + OPTIONAL[name]}
    _check_keys(columns, sorted(every), "any format; they have", where)
    for row in rows:
        refuse_preference(row, columns, where)
        view = Mapped(row, columns)
        for name, keys in REQUIRED.items():
            known = keys + OPTIONAL[name]
            if all(view.has(key) for key in keys) and all(key in known for key in columns):
                check_columns(columns, name, where)
                return name
    shapes = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in REQUIRED.items())
    found = keys_of(rows[0]) if rows else "no row"
    raise InputError(
        "unknown_format",
        f"the rows fit no known format; the first has: {found}"
        + (f"; columns maps: {', '.join(columns)}" if columns else ""),
        where=where,
        fix=_hint(rows) + f" (formats: {shapes})",
    )


_PROMPTS = (
    "prompt", "instruction", "question", "query", "input", "problem", "user", "human", "q"
)  # fmt: skip
_ANSWERS = (
    "completion", "output", "answer", "response", "solution", "assistant", "gpt", "target", "label",
    "a",
)  # fmt: skip


def _hint(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns what to do with rows of an unknown shape, with their own names where they are told.

    Args:
        rows: The first rows of the source.
    """
    row = rows[0] if rows else {}
    for key, value in row.items():
        if len(rows) == 1 and isinstance(value, list) and value and isinstance(value[0], Mapping):
            return f"if {key!r} holds the rows, write that list alone to a file (jq .{key} FILE)"
    texts: dict[str, str] = {}  # last name, plainly written, to the path
    for key, value in row.items():
        listed = isinstance(value, list) and value and isinstance(value[0], Mapping)
        within = value[0] if listed else value
        base = f"{key}.0." if listed else f"{key}."
        inner = within.items() if isinstance(within, Mapping) else ((None, within),)
        for name, text in inner:
            path = str(key) if name is None else f"{base}{name}"
            if isinstance(text, (str, int, float)):
                texts.setdefault(path.rpartition(".")[2].strip().lower(), path)
    prompt = next((texts[word] for word in _PROMPTS if word in texts), "question")
    answer = next((texts[word] for word in _ANSWERS if word in texts), "answer")
    return (
        "map its columns with data.sources columns, for example "
        f"{{prompt: {_quoted(prompt)}, completion: {_quoted(answer)}}}"
    )


def _quoted(path: str) -> str:
    """Returns a path as YAML reads it back."""
    return path if re.fullmatch(r"[A-Za-z][\w.-]*", path) else json.dumps(path, ensure_ascii=False)


def read_keys(name: Format, columns: Mapping[str, str]) -> frozenset[str]:
    """Returns the columns of a row that are read.

    Args:
        name: The format.
        columns: The source's mapping.
    """
    keys = {*REQUIRED[name], *OPTIONAL[name]} - columns.keys()
    for rule in columns.values():
        paths = PLACE.findall(rule) if "{" in rule else [rule]
        for path in paths:
            keys |= {path.strip(), path.strip().partition(".")[0]}
    return frozenset(keys)


def refuse_preference(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> None:
    """Refuses rows of preference data.

    Raises:
        InputError: The row holds `chosen` and `rejected` and no mapping says how to read it.
    """
    if "chosen" in row and "rejected" in row and not columns:
        raise InputError(
            "preference_data",
            "these are preference pairs: each row holds a chosen and a rejected answer to one "
            "prompt, for a preference loss such as DPO, which Glasstune does not have yet",
            where=where,
            fix="to train on the chosen answers alone, map them, for example "
            f"{{prompt: {_prompt_key(row)}, completion: {_answer_path(row)}}}",
        )


def _prompt_key(row: Mapping[str, Any]) -> str:
    """Returns a path to a preference row's prompt, for the hint."""
    turns = row.get("conversations")
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], Mapping):
        return "conversations.0." + ("value" if "value" in turns[0] else "content")
    return next((key for key in ("prompt", "question", "instruction") if key in row), "question")


def _answer_path(row: Mapping[str, Any]) -> str:
    chosen = row["chosen"]
    if isinstance(chosen, Mapping):
        return "chosen.value" if "value" in chosen else "chosen.content"
    return "chosen"


def check_columns(columns: Mapping[str, str], name: Format, where: str) -> None:
    """Checks the mapping's keys against the format.

    Raises:
        InputError: A key is none of the format's; names the nearest.
    """
    _check_keys(columns, REQUIRED[name] + OPTIONAL[name], f"the format {name}, which has", where)


def _check_keys(columns: Mapping[str, str], known: Sequence[str], whose: str, where: str) -> None:
    for key in columns:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise InputError(
                "unknown_column_key",
                f"columns: {key!r} is no key of {whose} {', '.join(known)}",
                where=where,
                fix=f"did you mean {near[0]}?" if near else "use one of these keys",
            )


def to_example(
    row: Mapping[str, Any],
    origin: str,
    name: Format,
    columns: Mapping[str, str],
    *,
    join: InputJoin = "blank_line",
    keep_columns: bool = False,
) -> Example:
    """Reads one row.

    Args:
        row: The row.
        origin: Where it came from.
        name: Its format.
        columns: The source's mapping.
        join: How alpaca's input is put after its instruction: a blank line, or the published
            `### Input:` header.
        keep_columns: Whether the columns that the format does not read are kept beside the
            tokens, under their own names (for a loss function).

    Raises:
        RowError: The row does not hold what its format asks for.
    """
    view = Mapped(row, columns)
    example = _READERS[name](view, join)
    example.origin = origin
    if keep_columns:
        read = {*REQUIRED[name], *OPTIONAL[name], *columns.values()} - columns.keys()
        example.columns = {key: value for key, value in row.items() if key not in read}
    return example


def _alpaca(view: Mapped, join: InputJoin) -> Example:
    answer = view.text("output", answer=True)
    question = join_input(view.text("instruction"), view.optional("input") or "", join)
    messages = _system(view)
    history = view.value("history") if view.has("history") else None
    if history is not None and not isinstance(history, list):
        refuse(
            "not_text", f"'history' must be a list of [question, answer], found {kind_of(history)}"
        )
    for number, pair in enumerate(history or ()):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        ):
            refuse("not_text", f"'history' entry {number} must be [question, answer]")
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Example("chat", messages=messages)


def join_input(instruction: str, text: str, join: InputJoin) -> str:
    """Puts an alpaca row's input after its instruction; an empty one adds nothing."""
    if not text:
        return instruction
    return instruction + (INPUT_HEADER if join == "alpaca" else "\n\n") + text


def _system(view: Mapped) -> list[Message]:
    system = view.optional("system")
    return [] if system is None else [{"role": "system", "content": system}]


def _chat(view: Mapped, key: str) -> Example:
    messages = messages_of(view.value(key), key)
    system = _system(view)
    if system and messages and messages[0]["role"] == "system":
        if messages[0]["content"] != system[0]["content"]:
            refuse("two_system_texts", f"a 'system' column and a system turn in {key!r} differ")
        system = []
    tools = tools_of(view.value("tools")) if view.has("tools") else None
    return Example("chat", messages=conversation(system + messages), tools=tools)


def _pair(view: Mapped, join: InputJoin) -> Example:
    prompt, completion = view.value("prompt"), view.value("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        refuse(
            "not_text",
            "prompt and completion must be text, found lists of messages",
            "put both into one list in a column `messages`",
        )
    text = view.text("prompt")
    answer = view.text("completion", answer=True)
    system = _system(view)
    messages: list[Message] = [
        *system,
        {"role": "user", "content": text},
        {"role": "assistant", "content": answer},
    ]
    return Example("pair", messages=messages, prompt=text, completion=answer)


def _text(view: Mapped, join: InputJoin) -> Example:
    return Example("text", text=view.text("text", answer=True))


_READERS = {
    "alpaca": _alpaca,
    "conversations": lambda view, join: _chat(view, "conversations"),
    "baichuan2": lambda view, join: _chat(view, "conversations"),
    "messages": lambda view, join: _chat(view, "messages"),
    "prompt_completion": _pair,
    "text": _text,
}
