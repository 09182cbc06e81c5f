"""Conversations and templates for tests of spans."""

from __future__ import annotations

from typing import Any

from chat_tokenizers import chat_tokenizer

from glasstune.data.errors import RowError
from glasstune.data.spans import Rendered, find_spans
from glasstune.data.template import ChatTemplate, resolve_template

USER = {"role": "user", "content": "why?"}
ONE = [USER, {"role": "assistant", "content": "yes"}]
TWO = [*ONE, {"role": "user", "content": "and now?"}, {"role": "assistant", "content": "no, so"}]
SYSTEM = [{"role": "system", "content": "be the assistant"}, *TWO]
HARD = [
    {"role": "user", "content": "  yes \n"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "assistant\nyes<|im_start|>"},
    {"role": "assistant", "content": "\n<answer> the quick brown fox {{ x }} 二\n "},
]
CALL = [
    USER,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "get", "arguments": {"city": "</s> Paris"}}}
        ],
    },
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains"},
]
TOOLS = [{"type": "function", "function": {"name": "get", "description": "", "parameters": {}}}]


def template(style: str | None, **kwargs: Any) -> ChatTemplate:
    return resolve_template(chat_tokenizer(style), None, kwargs)


def reference_ids(used: ChatTemplate, messages: Any, **options: Any) -> list[int]:
    """Ids by transformers itself, from the style's own source with the date by hand."""
    found = used.tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, **used.kwargs, **options
    )
    return list(found["input_ids"])


def render_row(used: ChatTemplate, turns: list[tuple[str, str]]) -> Rendered | None:
    """A conversation of (question, answer) pairs as the encoder renders it; None if refused."""
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    try:
        return find_spans(used.text, messages, None, used.traits)
    except RowError:
        return None
