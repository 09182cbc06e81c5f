"""Prompts that are taken from their conversation against the tokenizer itself."""

from __future__ import annotations

from typing import Any

import pytest
from chat_tokenizers import TEMPLATES, chat_tokenizer
from conversations import render_row
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from glasstune.data.errors import RowError
from glasstune.data.formats import Example
from glasstune.data.places import Places, quick_ids, tokenise_texts
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
    encoded = tokenise_texts(tokenizer, [row.text for row in rows])
    prompts = Prompts.of(template)
    expected = [tokenizer(row.prompt, add_special_tokens=False)["input_ids"] for row in rows]
    assert prompts.encode(rows, encoded) == expected


def test_most_prompts_are_not_tokenised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from glasstune.data import prompts as module

    template = resolve_template(chat_tokenizer("chatml"), None, {})
    row = render_row(template, [("why?", "so"), ("and then?", "this")])
    assert row is not None
    encoded = tokenise_texts(template.tokenizer, [row.text])
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


@pytest.mark.parametrize("style", [*TEMPLATES, None])
@settings(max_examples=examples(40), deadline=None)
@given(text=texts, ends=st.tuples(st.integers(0, 24), st.integers(0, 24)))
def test_places_are_those_of_the_list_of_offsets(
    style: str | None, text: str, ends: tuple[int, int]
) -> None:
    tokenizer = chat_tokenizer(style)
    (tokens,) = tokenise_texts(tokenizer, [text])
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    listed = Places(found["offset_mapping"])
    assert tokens.ids == found["input_ids"]
    assert tokens.places is not None
    start, end = sorted(min(end, len(text)) for end in ends)
    assert tokens.places.first(start) == listed.first(start)
    assert tokens.places.behind(end) == listed.behind(end)
    assert tokens.places.token_at(start, end) == listed.token_at(start, end)
    assert [tokens.places.start(k) for k in range(len(tokens.ids))] == [
        start for start, _ in found["offset_mapping"]
    ]


@pytest.mark.parametrize("style", list(TEMPLATES))
@settings(max_examples=examples(40), deadline=None)
@given(
    turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
    train_on=st.sampled_from(["assistant", "last_assistant", "all"]),
)
def test_rows_without_offsets_are_rows_with_them(
    style: str, turns: list[tuple[str, str]], train_on: Any
) -> None:
    from glasstune.data import encode

    template = resolve_template(chat_tokenizer(style), None, {})
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    example = Example("chat", messages=messages)
    quick = encode.encode_examples(template, [example], train_on)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "quick_ids", lambda *_: None)
        slow = encode.encode_examples(template, [example], train_on)[0]
    if isinstance(slow, RowError):
        assert isinstance(quick, RowError)
        assert quick.code == slow.code
    else:
        assert quick == slow


def test_the_usual_row_needs_no_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    from glasstune.data import encode

    asked: list[int] = []
    real = encode.tokenise_texts
    monkeypatch.setattr(
        encode, "tokenise_texts", lambda tok, items: asked.append(len(items)) or real(tok, items)
    )
    template = resolve_template(chat_tokenizer("chatml"), None, {})
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    encode.encode_examples(template, [Example("chat", messages=turns * 2)] * 3, "assistant")
    assert asked == [0]


def test_what_an_earlier_call_left_behind_changes_nothing() -> None:
    tokenizer = chat_tokenizer("chatml")
    plain = quick_ids(tokenizer, ["why so? <|im_end|>"])
    tokenizer(["a b c"], truncation=True, max_length=2)
    assert quick_ids(tokenizer, ["why so? <|im_end|>"]) == plain
    assert plain == [tokenizer("why so? <|im_end|>", add_special_tokens=False)["input_ids"]]


def test_tokens_that_are_added_later_are_seen() -> None:
    tokenizer = chat_tokenizer("chatml")
    template = resolve_template(tokenizer, None, {})
    assert "<later>" not in Prompts.of(template).tokens
    tokenizer.add_special_tokens({"additional_special_tokens": ["<later>"]})
    assert "<later>" in Prompts.of(template).tokens
