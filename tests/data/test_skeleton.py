"""The short way of finding the answer against the long one, which renders with marks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from chat_tokenizers import TEMPLATES, chat_tokenizer
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from glasstune.data.errors import RowError
from glasstune.data.skeleton import learn_skeleton, roles_of
from glasstune.data.spans import find_spans
from glasstune.data.template import resolve_template

TEMPLATE_NAMES = [*TEMPLATES, "named chatml", "named alpaca", "named plain"]
texts = st.text(alphabet="ab \n.\u4e8c\U00100000", min_size=1, max_size=10) | st.sampled_from(
    ["<|im_end|>", "</s>", "<think>\nhm\n</think>\n\nso", "  so", "so \n", "a", "assistant\n",
     "<think>", "\n<think>\n\n</think>\n\n", "[INST] x [/INST]", "x\n\n### Input:\ny"]
)  # fmt: skip


def template(name: str, **kwargs: Any) -> Any:
    if name.startswith("named "):
        return resolve_template(chat_tokenizer("chatml"), name.split()[1], kwargs)
    return resolve_template(chat_tokenizer(name), None, kwargs)


@pytest.mark.parametrize("thinking", [None, False])
@pytest.mark.parametrize("name", TEMPLATE_NAMES)
@settings(max_examples=examples(40), deadline=None)
@given(system=st.none() | texts, question=texts, answer=texts)
def test_both_ways_find_the_same(
    name: str, thinking: bool | None, system: str | None, question: str, answer: str
) -> None:
    used = template(name, **({} if thinking is None else {"enable_thinking": thinking}))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    long = outcome(lambda: find_spans(used.text, messages, None, used.traits))
    assert outcome(lambda: used.find_spans(messages, None)) == long


def outcome(find: Callable[[], Any]) -> Any:
    """What was found, or the code of the refusal."""
    try:
        return find()
    except RowError as error:
        return error.code


def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    used = template("chatml")
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    used.find_spans(turns, None)
    asked: list[bool] = []
    real = type(used).text

    def counted(self: Any, messages: Any, tools: Any, generation: bool) -> str:
        asked.append(generation)
        return real(self, messages, tools, generation)

    monkeypatch.setattr(type(used), "text", counted)
    used.find_spans([{"role": "user", "content": "and?"}, turns[1]], None)
    assert asked == [False, True]


def test_a_template_that_moves_its_texts_has_none() -> None:
    def twice(messages: Any, tools: Any, generation: bool) -> str:
        return "".join(f"<{m['content']}{m['content']}>" for m in messages)

    traits = template("chatml").traits
    assert learn_skeleton(twice, ("user", "assistant"), traits) is None
    assert learn_skeleton(template("chatml").text, ("user", "assistant"), traits) is not None


def test_only_one_answer_at_the_end_has_one() -> None:
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert roles_of([user, answer]) == ("user", "assistant")
    assert roles_of([user, answer, user, answer]) is None
    assert roles_of([user]) is None
    assert roles_of([user, {"role": "assistant", "content": " "}]) is None
    assert roles_of([user, {**answer, "reasoning_content": "hm"}]) is None


def test_a_prompt_that_looks_into_the_question_goes_the_long_way() -> None:
    def render(messages: Any, tools: Any, generation: bool) -> str:
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in messages)
        if generation:
            text += "<|im_start|>assistant\n" + ("hm " if "x" in messages[-1]["content"] else "")
        return text

    traits = template("chatml").traits
    skeleton = learn_skeleton(render, ("user", "assistant"), traits)
    assert skeleton is not None
    for question, usual in (("why?", True), ("x?", False)):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "so"}]
        found = skeleton.render(render, turns)
        expected = find_spans(render, turns, None, traits)
        assert (found == expected) is usual
        assert expected.drifted == (not usual)
        assert (found is None) is not usual
