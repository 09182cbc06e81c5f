import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import LLAMA3, TEMPLATES, chat_tokenizer, trained_text
from conversations import CALL, HARD, ONE, SYSTEM, TOOLS, TWO, USER, reference_ids, template

from glasstune.core.errors import InputError
from glasstune.data.encode import encode_examples, encode_prompt
from glasstune.data.errors import RowError
from glasstune.data.formats import Example
from glasstune.data.template import load_template, resolve_template


def answer(style: str, messages: Any, turn: int, **kwargs: Any) -> str:
    """What must be trained of a turn, written down for each style by hand."""
    text = messages[turn]["content"]
    last = turn == len(messages) - 1
    calls = "".join(
        '<tool_call>\n{"name": "' + call["function"]["name"] + '", "arguments": '
        + json.dumps(call["function"]["arguments"]) + "}\n</tool_call>"
        for call in messages[turn].get("tool_calls", ())
    )  # fmt: skip
    if style == "qwen3":
        think = ""
        if "</think>" in text:
            think, text = text.split("</think>")
            think, text = think.replace("<think>", "").strip("\n"), text.lstrip("\n")
        if last and kwargs.get("enable_thinking") is not False:
            text = f"<think>\n{think}\n</think>\n\n" + text.lstrip("\n")
        elif last:
            text = text.lstrip("\n")
        return text + calls + "<|im_end|>"
    if style == "llama3":
        return str(text.strip()) + "<|eot_id|>"
    if style == "llama2":
        return " " + str(text.strip()) + " </s>"
    if style == "bare":
        return " " + text + ("\n</s>" if last else "")
    if style == "glm":
        return str(text) + ("</s>" if last else "<|user|>")
    if style == "harmony":
        return "<|message|>" + text + ("<|return|>" if last else "<|end|>")
    if style == "forced":
        return str(text) + "<|end|><|return|>"
    return str(text) + "<|im_end|>"


@pytest.mark.parametrize("style", [s for s in TEMPLATES if s not in ("llama3",)])
@pytest.mark.parametrize("messages", [ONE, TWO, SYSTEM, HARD], ids=["one", "two", "system", "hard"])
def test_t04_e04_trained_text_and_ids_are_exact(style: str, messages: Any) -> None:
    used = template(style)
    ids, labels = used.encode(messages)
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    assert trained_text(used.tokenizer, labels) == "".join(
        answer(style, messages, turn) for turn in turns
    )
    rendered = reference_ids(used, messages)
    assert ids[: len(rendered)] == rendered
    assert ids[len(rendered) :] == (
        [used.tokenizer.eos_token_id] if style in ("bare", "glm") else []
    )
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    last, only = used.encode(messages, train_on="last_assistant")
    assert last == ids
    assert trained_text(used.tokenizer, only) == answer(style, messages, turns[-1])
    assert used.encode(messages, train_on="all") == (ids, ids)


@pytest.mark.parametrize("style", [s for s in TEMPLATES if s != "forced"])
@pytest.mark.parametrize("messages", [ONE, TWO, SYSTEM], ids=["one", "two", "system"])
def test_t03_prompt_ids_of_training_are_those_of_generation(style: str, messages: Any) -> None:
    used = template(style)
    ids, labels = used.encode(messages, train_on="last_assistant")
    first = next(k for k, label in enumerate(labels) if label != -100)
    assert ids[:first] == encode_prompt(used.tokenizer, used, messages[:-1])
    if style != "llama3":  # its own template would read today's date
        assert ids[:first] == reference_ids(used, messages[:-1], add_generation_prompt=True)


@pytest.mark.parametrize("style", ["llama2", "llama3"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_t03_exactly_one_bos(style: str, add_bos: bool) -> None:
    tokenizer = chat_tokenizer(style, add_bos=add_bos)
    used = resolve_template(tokenizer, None, {})
    ids, _ = used.encode(ONE)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", ["chatml", "alpaca", "plain"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_t03_named_templates_open_as_the_tokenizer_does(name: str, add_bos: bool) -> None:
    tokenizer = chat_tokenizer(None, add_bos=add_bos)
    used = resolve_template(tokenizer, name, {})
    for messages in (ONE, TWO, SYSTEM):
        ids, labels = used.encode(messages)
        assert ids.count(tokenizer.bos_token_id) == int(add_bos)
        end = "<|im_end|>" if name == "chatml" else "</s>"
        answers = [m["content"] + end for m in messages if m["role"] == "assistant"]
        assert trained_text(tokenizer, labels) == "".join(answers)
        prompt = used.render_prompt(messages[:-1])
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] != -100


def test_alpaca_template_is_the_published_prompt() -> None:
    used = resolve_template(chat_tokenizer(None), "alpaca", {})
    plain = used.text([{"role": "user", "content": "Do it."}], None, True)
    assert plain == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nDo it.\n\n### Response:\n"
    )
    both = used.text([{"role": "user", "content": "Do it.\n\n### Input:\nthis"}], None, True)
    assert both == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo it.\n\n### Input:\nthis\n\n### Response:\n"
    )


def test_e04_qwen3_thinking_switched_off_makes_the_empty_block_context() -> None:
    on, off = template("qwen3"), template("qwen3", enable_thinking=False)
    assert trained_text(on.tokenizer, on.encode(ONE)[1]) == "<think>\n\n</think>\n\nyes<|im_end|>"
    assert trained_text(off.tokenizer, off.encode(ONE)[1]) == "yes<|im_end|>"
    ids, labels = off.encode(ONE)
    prompt = reference_ids(off, ONE[:1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt
    assert labels[len(prompt)] == ids[len(prompt)]
    # A turn in the middle has no block; its prompt would have one, which is said.
    row = encode_examples(off, [Example("chat", messages=TWO)], "assistant")[0]
    assert not isinstance(row, RowError)
    assert row.drifted
    assert trained_text(off.tokenizer, row.labels) == "yes<|im_end|>no, so<|im_end|>"


def test_e04_qwen3_own_thoughts_are_trained_in_the_last_turn_only() -> None:
    used = template("qwen3")
    thought = {"role": "assistant", "content": "<think>\nfirst\n</think>\n\nyes"}
    messages = [USER, thought, USER, {**thought, "content": "<think>\nso\n</think>\n\nno"}]
    ids, labels = used.encode(messages)
    assert ids == reference_ids(used, messages)
    assert trained_text(used.tokenizer, labels) == (
        "yes<|im_end|><think>\nso\n</think>\n\nno<|im_end|>"
    )


def test_tool_calls_are_trained_with_their_end_and_results_are_not() -> None:
    used = template("qwen3")
    ids, labels = used.encode(CALL, TOOLS)
    assert ids == reference_ids(used, CALL, tools=TOOLS)
    assert trained_text(used.tokenizer, labels) == answer("qwen3", CALL, 1) + answer(
        "qwen3", CALL, 3
    )
    assert used.traits.renders_tools


@pytest.mark.parametrize("style", ["chatml", "llama3"])
def test_template_without_tool_calls_is_a_row_error(style: str) -> None:
    with pytest.raises(RowError, match="does not render the tool call of turn 1"):
        template(style).encode(CALL)


def test_template_that_refuses_says_its_own_words() -> None:
    used = template("llama2")
    used.encode(TWO)
    with pytest.raises(RowError, match="roles must alternate"):
        used.render_prompt([USER, USER])


def test_template_that_leaves_a_turn_out_is_a_row_error() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages if m.role != 'tool' %}" + (
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    used = resolve_template(tokenizer, None, {})
    rows = [USER, {"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}, ONE[1]]
    with pytest.raises(
        RowError, match=r"turn 2 \(tool\) 0 times: it has no place for tool results"
    ):
        used.encode(rows)


def test_template_that_changes_texts_is_a_row_error_not_a_guess() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = TEMPLATES["chatml"].replace(
        "message['content']", "(message['content'] | length | string + message['content'])"
    )
    with pytest.raises(RowError, match="cannot be found exactly"):
        resolve_template(tokenizer, None, {}).encode(ONE)


def test_template_that_looks_at_the_ends_of_a_text_is_still_exact() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = TEMPLATES["chatml"].replace(
        "message['content'] +", "(message['content'] if message['content'].startswith('{') and "
        "message['content'].endswith('}') else message['content'] + '!') +",
    )  # fmt: skip
    used = resolve_template(tokenizer, None, {})
    messages = [{"role": "user", "content": "{json}"}, ONE[1]]
    ids, labels = used.encode(messages)
    assert trained_text(tokenizer, labels) == "yes!<|im_end|>"
    assert ids == reference_ids(used, messages)


@pytest.mark.parametrize("plane", [0xF0000, 0x100000])
def test_private_use_characters_in_a_text_do_no_harm(plane: int) -> None:
    used = template("chatml")
    messages = [{"role": "user", "content": chr(plane + 1) * 3}, ONE[1]]
    _, labels = used.encode(messages)
    assert trained_text(used.tokenizer, labels) == "yes<|im_end|>"


def test_d10_empty_answer_trains_exactly_the_end() -> None:
    for style, end in (
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("marked", "<|im_end|>"),
    ):
        used = template(style)
        _, labels = used.encode([USER, {"role": "assistant", "content": ""}])
        assert trained_text(used.tokenizer, labels) == end, style


def test_e04_the_clock_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    used = template("llama3")
    assert used.pinned_date == "2024-07-26"
    assert "26 Jul 2024" in used.text(ONE, None, False)
    other = template("llama3", pinned_date="2025-01-02")
    assert "02 Jan 2025" in other.text(ONE, None, False)
    assert "pinned_date" not in other.kwargs
    assert "07 Mar 2023" in template("llama3", date_string="07 Mar 2023").text(ONE, None, False)
    own = chat_tokenizer("llama3").apply_chat_template(ONE, tokenize=False)
    today = datetime.date.today().strftime("%d %b %Y")
    assert re.sub("26 Jul 2024", today, used.text(ONE, None, False)) == own


def test_e04_a_clock_that_cannot_be_pinned_is_an_error() -> None:
    tokenizer = chat_tokenizer("llama3")
    tokenizer.chat_template = LLAMA3.replace('"%d %b %Y"', "'%d ' + '%b'")
    with pytest.raises(InputError, match="cannot be pinned"):
        resolve_template(tokenizer, None, {})


@pytest.mark.parametrize("style", list(TEMPLATES))
def test_saved_template_gives_the_same_ids(style: str, tmp_path: Path) -> None:
    from glasstune.data.tokenizer import load_tokenizer

    used = template(style, enable_thinking=False)
    used.save(tmp_path)
    assert used.tokenizer.chat_template == TEMPLATES[style]  # left as it was
    again = load_tokenizer(str(tmp_path))
    loaded = load_template(tmp_path, again)
    assert loaded.kwargs == {"enable_thinking": False}
    assert loaded.pinned_date == used.pinned_date
    assert loaded.encode(TWO) == used.encode(TWO)
    assert loaded.stop_ids == used.stop_ids
    # Another program that knows only the tokenizer's files renders the same.
    found = again.apply_chat_template(TWO, tokenize=False, enable_thinking=False)
    assert found == used.text(TWO, None, False)


@pytest.mark.parametrize("name", ["chatml", "alpaca", "plain", "baichuan2", "none"])
def test_saved_named_templates(name: str, tmp_path: Path) -> None:
    from glasstune.data.tokenizer import load_tokenizer

    used = resolve_template(chat_tokenizer(None), name, {}, markers={"user": 10, "assistant": 11})
    used.save(tmp_path)
    loaded = load_template(tmp_path, load_tokenizer(str(tmp_path)))
    assert (loaded.name, loaded.kind) == (used.name, used.kind)
    prompt = encode_prompt(used.tokenizer, used, "why?")
    assert encode_prompt(loaded.tokenizer, loaded, "why?") == prompt


def test_template_from_file_and_unknown_names(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(TEMPLATES["chatml"])
    used = resolve_template(chat_tokenizer(None), "mine.jinja", {}, base_folder=tmp_path)
    assert used.encode(ONE) == template("chatml").encode(ONE)
    with pytest.raises(InputError, match="neither a template's name nor a file") as error:
        resolve_template(chat_tokenizer(None), "chatlm", {}, base_folder=tmp_path)
    assert "chatml, alpaca, plain, baichuan2" in error.value.fix
    (tmp_path / "bad.jinja").write_text("{{ messages[0].nothing.at_all }}")
    with pytest.raises(InputError, match="cannot render a question"):
        resolve_template(chat_tokenizer(None), "bad.jinja", {}, base_folder=tmp_path)


def test_stop_ids_hold_the_turn_end_and_the_end_token() -> None:
    tokenizer = chat_tokenizer("chatml", eos_token="</s>")
    ids = resolve_template(tokenizer, None, {}).stop_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["</s>", "<|im_end|>"]


def test_slow_tokenizer_without_offsets_is_exact_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = template("qwen3")
    expected = used.encode(SYSTEM)
    monkeypatch.setattr(type(used.tokenizer), "is_fast", property(lambda self: False))
    assert used.encode(SYSTEM) == expected


@pytest.mark.parametrize("style", list(TEMPLATES))
@pytest.mark.parametrize("messages", [ONE, TWO, SYSTEM, HARD, CALL])
def test_the_short_way_of_rendering_is_transformers_own(style: str, messages: Any) -> None:
    used = template(style)
    for generation in (False, True):
        try:
            expected = used.tokenizer.apply_chat_template(
                messages,
                chat_template=used.source[0],
                tokenize=False,
                add_generation_prompt=generation,
            )
        except Exception:
            with pytest.raises(RowError, match="refuses"):
                used.text(messages, None, generation)
        else:
            assert used.text(messages, None, generation) == expected
