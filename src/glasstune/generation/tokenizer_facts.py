"""What an export must know of a tokenizer: its rules as they run, its ids, how it renders a chat.

The facts come from the tokenizer as transformers loads it, since that is the one that training
and generation use: some classes replace the rules of `tokenizer.json` by their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glasstune.core.errors import InputError
from glasstune.data.errors import RowError
from glasstune.data.template import load_template
from glasstune.data.tokenizer import load_tokenizer
from glasstune.generation.generate import stop_ids

Render = Callable[[Sequence[Mapping[str, str]]], str]


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before anything else.

    Args:
        text: Its text.
        special: Whether it is a control token.
        strips: Whether it swallows white space beside it.
    """

    text: str
    special: bool
    strips: bool = False


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer as plain data.

    Args:
        where: Folder it came from.
        rules: The object of `tokenizer.json`: normalizer, pre_tokenizer, model, post_processor.
        vocabulary: Token to id, added tokens included.
        added: Id to added token.
        ids: `bos`, `eos`, `unk`, `pad` to id, those that it has.
        begin: Ids that it puts before a text by itself.
        end: Ids that it puts behind a text by itself.
        stops: Ids that end an answer.
        turn_end: The id that closes an assistant's turn, where it is not the end token.
        chat_template: Jinja text, or named texts, or None.
        template_kwargs: Variables that the run's template gets beside the messages.
        render: Renders messages up to where the answer starts; None without a template.
    """

    where: str
    rules: Mapping[str, Any]
    vocabulary: Mapping[str, int]
    added: Mapping[int, AddedToken]
    ids: Mapping[str, int]
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()
    turn_end: int | None = None
    chat_template: str | Mapping[str, str] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    render: Render | None = None


def tokenizer_facts(folder: Path) -> TokenizerFacts:
    """Loads a folder's tokenizer and template and writes down what they are.

    Args:
        folder: A folder that `save_pretrained` wrote.

    Raises:
        InputError: It has no tokenizer, or one without the rules of `tokenizer.json`.
    """
    tokenizer: Any = load_tokenizer(str(folder))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise InputError(
            "slow_tokenizer",
            f"{type(tokenizer).__name__} is Python code without the rules of tokenizer.json",
            where=str(folder),
            fix="save a fast tokenizer into this folder",
        )
    begin, end = _around(tokenizer)
    template = load_template(folder, tokenizer)

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return template.text([dict(message) for message in messages], None, True)
        except RowError as error:
            raise InputError(error.code, error.message, where=str(folder), fix=error.fix) from error

    stops = {*stop_ids(tokenizer), *template.stop_ids}
    return TokenizerFacts(
        where=str(folder),
        rules=json.loads(backend.to_str()),
        vocabulary=dict(tokenizer.get_vocab()),
        added={
            int(index): AddedToken(
                token.content, bool(token.special), bool(token.lstrip or token.rstrip)
            )
            for index, token in tokenizer.added_tokens_decoder.items()
        },
        ids={
            name: index
            for name in ("bos", "eos", "unk", "pad")
            if isinstance(index := getattr(tokenizer, f"{name}_token_id"), int)
        },
        begin=begin,
        end=end,
        stops=tuple(sorted(stops)),
        turn_end=next((i for i in template.stop_ids if i != tokenizer.eos_token_id), None),
        chat_template=tokenizer.chat_template or None,
        template_kwargs=dict(template.kwargs),
        render=render if template.kind == "jinja" else None,
    )


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids that the tokenizer puts before and behind a text by itself."""
    whole = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return tuple(whole[:at]), tuple(whole[at + len(plain) :])
    return (), ()
