"""Closers and openings in the style of families that differ from ChatML."""

import pytest
from chat_tokenizers import FORCED, GLM, MARKED, chat_tokenizer, trained_text
from conversations import CALL, ONE, TWO, USER, reference_ids, template

from glasstune.data.encode import encode_examples
from glasstune.data.errors import RowError
from glasstune.data.formats import Example
from glasstune.data.template import resolve_template


def test_tool_calls_without_an_end_token_stop_at_the_next_turn() -> None:
    used = template("glm")
    _, labels = used.encode(CALL)
    call = '<tool_call>get\n{"city": "</s> Paris"}</tool_call><|tool|>'
    assert trained_text(used.tokenizer, labels) == call + "It rains</s>"


def test_tool_calls_with_an_end_token_of_their_own() -> None:
    used = template("harmony")
    _, labels = used.encode(CALL)
    assert trained_text(used.tokenizer, labels) == (
        ' to=get<|message|>get{"city": "</s> Paris"}<|call|><|message|>It rains<|return|>'
    )
    assert used.tokenizer.convert_ids_to_tokens(used.stop_ids) == ["<|return|>", "<|end|>"]


def test_prompt_that_forces_thoughts_is_drift_unless_switched_off() -> None:
    used = template("forced")
    row = encode_examples(used, [Example("chat", messages=ONE)], "assistant")[0]
    assert not isinstance(row, RowError)
    assert row.drifted
    assert trained_text(used.tokenizer, row.labels) == "yes<|end|><|return|>"
    off = template("forced", enable_thinking=False)
    for content in ("yes", ""):
        chat = [USER, {"role": "assistant", "content": content}]
        row = encode_examples(off, [Example("chat", messages=chat)], "assistant")[0]
        assert not isinstance(row, RowError)
        assert not row.drifted
        assert trained_text(off.tokenizer, row.labels) == content + "<|end|><|return|>"
    # Where the template moves or drops the text's start, what the prompt shares is context.
    for content, left in (("", ""), ("<think>hm</think>yes", "yes")):
        chat = [USER, {"role": "assistant", "content": content}]
        labels = used.encode(chat)[1]
        assert trained_text(used.tokenizer, labels) == f"</think>{left}<|end|><|return|>"


def test_t04_generation_markers_are_used_and_the_end_is_added() -> None:
    used = template("marked")
    assert used.has_generation_markers
    ids, labels = used.encode(TWO)
    assert ids == reference_ids(used, TWO)
    assert trained_text(used.tokenizer, labels) == "yes<|im_end|>no, so<|im_end|>"


def test_t04_generation_markers_that_miss_a_turn_are_a_row_error() -> None:
    tokenizer = chat_tokenizer("marked")
    tokenizer.chat_template = MARKED.replace("message.role == 'assistant' %}{{", "loop.first %}{{")
    tokenizer.chat_template = MARKED.replace(
        "{% generation %}{{ message.content }}{% endgeneration %}",
        "{% if loop.last %}{% generation %}{{ message.content }}{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}",
    )
    used = resolve_template(tokenizer, None, {})
    used.encode(ONE)
    with pytest.raises(RowError, match="show 1 assistant turns of 2"):
        used.encode(TWO)


def test_t04_generation_markers_around_a_line_break_double_no_end() -> None:
    tokenizer = chat_tokenizer("marked")
    tokenizer.chat_template = MARKED.replace(
        "{{ message.content }}{% endgeneration %}{{ '<|im_end|>\n' }}",
        "{{ message.content + '<|im_end|>\n' }}{% endgeneration %}",
    )
    ids, labels = resolve_template(tokenizer, None, {}).encode(TWO)
    assert trained_text(tokenizer, labels) == "yes<|im_end|>\nno, so<|im_end|>\n"
    assert ids == template("marked").encode(TWO)[0]


def test_context_never_ends_inside_a_token() -> None:
    tokenizer = chat_tokenizer("forced")
    tokenizer.chat_template = FORCED.replace("'<think></think>' +", "'</think>' +")
    used = resolve_template(tokenizer, None, {})
    _, labels = used.encode([USER, {"role": "assistant", "content": ""}])
    assert trained_text(tokenizer, labels) == "</think><|end|><|return|>"


def test_begin_token_of_the_next_turn_closes_no_answer() -> None:
    tokenizer = chat_tokenizer("glm")
    tokenizer.chat_template = GLM.replace("'<|' + m.role", "bos_token + '<|' + m.role").replace(
        "'<|assistant|>", "bos_token + '<|assistant|>"
    )
    _, labels = resolve_template(tokenizer, None, {}).encode(TWO)
    assert trained_text(tokenizer, labels) == "yesno, so</s>"
