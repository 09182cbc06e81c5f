"""Prompts that are taken from their conversation against the tokenizer itself."""

from __future__ import annotations

from typing import Any

import pytest
from chat_tokenizers import TEMPLATES, chat_tokenizer
from conversations import render_row
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from glasstune.data.prompts import Prompts
from glasstune.data.template import resolve_template

texts = st.text(alphabet="ab 1.\n<|im_end|>\u00e9\u4e8c", max_size=24)


@pytest.mark.parametrize("style", list(TEMPLATES))
@settings(max_examples=examples(25), deadline=None)
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_prompts_have_the_ids_of_the_tokenizer(style: str, turns: list[tuple[str, str]]) -> None:
    tokenizer = chat_tokenizer(style)
    template = resolve_template(tokenizer, None, {})
    rows = [row for row in [render_row(template, turns)] if row is not None]
    encoded: list[Any] = []
    for row in rows:
        found = tokenizer(row.text, add_special_tokens=False, return_offsets_mapping=True)
        encoded.append((found["input_ids"], found["offset_mapping"]))
    prompts = Prompts.of(template)
    expected = [tokenizer(row.prompt, add_special_tokens=False)["input_ids"] for row in rows]
    assert prompts.encode(rows, encoded) == expected


def test_most_prompts_are_not_tokenised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from glasstune.data import prompts as module

    template = resolve_template(chat_tokenizer("chatml"), None, {})
    row = render_row(template, [("why?", "so"), ("and then?", "this")])
    assert row is not None
    found = template.tokenizer(row.text, add_special_tokens=False, return_offsets_mapping=True)
    encoded = [(found["input_ids"], found["offset_mapping"])]
    prompts = Prompts.of(template)
    prompts.encode([row], encoded)
    asked: list[str] = []
    monkeypatch.setattr(module, "encode_plain", lambda _, items: asked.extend(items) or [])
    prompts.encode([row], encoded)
    assert asked == []


def test_a_token_that_takes_blanks_is_no_cut() -> None:
    from tokenizers import AddedToken

    tokenizer = chat_tokenizer("chatml")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<wide>", lstrip=True, special=True)]}
    )
    template = resolve_template(tokenizer, None, {})
    assert "<wide>" not in Prompts.of(template).tokens
    assert "<|im_start|>" in Prompts.of(template).tokens
