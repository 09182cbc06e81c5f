import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from glasstune.core.errors import InputError
from glasstune.data.errors import RowError
from glasstune.data.formats import Example, Format, detect_format, to_example
from glasstune.data.read import RawRow, read_rows

CHAT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def example(row: dict[str, Any], columns: dict[str, str] | None = None, **options: Any) -> Example:
    name = detect_format([row], columns or {}, "here")
    return to_example(row, "here", name, columns or {}, **options)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"id": 1, "conversations": CHAT}, "conversations"),
        ({"messages": [], "prompt": "x"}, "messages"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"text": "t", "url": "u"}, "text"),
    ],
)
def test_auto_format(row: dict[str, Any], name: Format) -> None:
    assert detect_format([row], {}, "here") == name


def test_auto_format_needs_only_one_good_row() -> None:
    assert (
        detect_format([{"instruction": "q"}, {"instruction": "q", "output": "a"}], {}, "")
        == "alpaca"
    )


def test_unknown_shape_lists_keys_and_formats() -> None:
    with pytest.raises(InputError) as error:
        detect_format([{"question": "q", "answer": "a"}], {}, "x.json:1")
    assert "question, answer" in error.value.message
    assert "prompt_completion: prompt, completion" in error.value.fix
    assert error.value.where == "x.json:1"


def test_preference_rows_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="preference pairs") as error:
        detect_format([{"conversations": CHAT[:1], "chosen": {}, "rejected": {}}], {}, "x.json:1")
    assert error.value.code == "preference_data"


def test_preference_rows_can_be_mapped() -> None:
    row = {"question": "q", "chosen": "a", "rejected": "b"}
    assert example(row, {"prompt": "question", "completion": "chosen"}).completion == "a"


def test_alpaca_with_input_system_and_history() -> None:
    row = {
        "system": "s",
        "history": [["q0", "a0"]],
        "instruction": "q",
        "input": "i",
        "output": "a",
    }
    texts = [(m["role"], m["content"]) for m in example(row).messages]
    assert texts == [
        ("system", "s"),
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q\n\ni"),
        ("assistant", "a"),
    ]


def test_d04_missing_key_names_it_and_the_keys_found() -> None:
    with pytest.raises(RowError) as error:
        to_example({"instruction": "q"}, "x", "alpaca", {})
    assert error.value.code == "missing_key"
    assert error.value.message == "there is no 'output'; the row has: instruction"


def test_d04_message_without_content() -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "text": "a"}]}
    with pytest.raises(RowError, match=r"turn 1 \(assistant\) has no 'content'.*role, text"):
        example(row)


def test_d05_null_input_is_empty() -> None:
    with_null = example({"instruction": "q", "input": None, "output": "a"})
    assert with_null.messages == example({"instruction": "q", "output": "a"}).messages


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"instruction": "q", "output": None}, {}),
        ({"prompt": "q", "completion": None}, {}),
        ({"text": None}, {}),
        ({"q": "q", "a": None}, {"prompt": "q", "completion": "a"}),
        ({"q": "q", "a": None}, {"prompt": "q", "completion": "Answer: {a}"}),
        ({"conversations": [CHAT[0], {"from": "gpt", "value": None}]}, {}),
    ],
)
def test_d05_null_answer_is_refused_by_name(row: dict[str, Any], columns: dict[str, str]) -> None:
    with pytest.raises(RowError, match="null") as error:
        example(row, columns)
    assert error.value.code == "null_answer"


def test_d05_null_prompt_is_refused_and_empty_is_not() -> None:
    with pytest.raises(RowError, match="'instruction' is null"):
        example({"instruction": None, "output": "a"})
    assert example({"instruction": "", "output": ""}).messages[1]["content"] == ""


def test_d05_null_system_turn_is_left_out() -> None:
    row = {"messages": [{"role": "system", "content": None}, *_turns("user", "assistant")]}
    assert [m["role"] for m in example(row).messages] == ["user", "assistant"]


def _turns(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": role} for role in roles]


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ("assistant user assistant", "turn 0 is assistant"),
        ("user assistant user user", "turns 2 and 3 are both user"),
        ("user user assistant", "turns 0 and 1 are both user"),
        ("user assistant assistant", "turns 1 and 2 are both assistant"),
        ("user assistant user", r"the last turn \(2\) is user"),
        ("user system assistant", "turn 1 is system"),
        ("user tool assistant", "turn 1 is tool"),
        ("user assistant tool assistant", "turn 2 is tool"),
        ("user wizard", "turn 1 has the role 'wizard'"),
        ("", "no turn"),
    ],
)
def test_d11_wrong_order_names_the_turn(roles: str, said: str) -> None:
    with pytest.raises(RowError, match=said):
        example({"messages": _turns(*roles.split())})


@pytest.mark.parametrize("roles", ["user assistant", "system user assistant user assistant"])
def test_right_orders_pass(roles: str) -> None:
    assert len(example({"messages": _turns(*roles.split())}).messages) == len(roles.split())


def test_tool_calls_from_both_shapes() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    sharegpt = {
        "conversations": [
            CHAT[0],
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            CHAT[1],
        ],
        "tools": json.dumps([{"name": "add", "description": "adds", "parameters": {}}]),
    }
    openai = {
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
                ],
            },
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {"name": "add", "description": "adds", "parameters": {}},
            }
        ],
    }
    one, two = example(sharegpt), example(openai)
    assert one.messages == two.messages
    assert one.tools == two.tools == openai["tools"]
    assert one.messages[1]["tool_calls"][0]["function"] == call
    assert one.messages[2]["tool_call_id"] == one.messages[1]["tool_calls"][0]["id"]


@pytest.mark.parametrize(
    ("value", "said"),
    [("not json", "must hold JSON"), ("{}", "a call needs a name"), ("3", "a call needs a name")],
)
def test_bad_tool_call_names_turn(value: str, said: str) -> None:
    row = {"conversations": [CHAT[0], {"from": "function_call", "value": value}]}
    with pytest.raises(RowError, match=rf"turn 1 \(function_call\).*{said}"):
        example(row)


def test_text_parts_are_joined_and_images_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "user", "content": parts}, *_turns("assistant")]}
    assert example(row).messages[0]["content"] == "ab"
    parts.append({"type": "image", "url": "x"})
    with pytest.raises(RowError, match="type 'image'"):
        example(row)


def test_columns_paths_and_templates() -> None:
    row = {"q": "why?", "label": 1, "ok": True, "more": [{"x.y": "deep"}], "a.b": "dotted"}
    columns = {"prompt": "Q: {q} {{kept}} {more.0.x.y}", "completion": "{label}"}
    with pytest.raises(RowError, match=r"no 'more\.0\.x\.y'"):
        example(row, columns)
    columns["prompt"] = "Q: {q} {{kept}} {a.b} {ok}"
    found = example(row, columns)
    assert found.prompt == "Q: why? {kept} dotted true"
    assert found.completion == "1"


def test_unknown_column_key_names_the_nearest() -> None:
    from glasstune.data.formats import check_columns

    with pytest.raises(InputError) as error:
        detect_format([{"q": "x"}], {"text": "q", "completion": "q"}, "here")  # of two formats
    assert error.value.code == "unknown_format"
    with pytest.raises(InputError, match="'promt'") as error:
        check_columns({"promt": "q"}, "prompt_completion", "here")
    assert "did you mean prompt?" in error.value.fix


def test_list_where_text_belongs() -> None:
    with pytest.raises(RowError, match="'output' must be text, found a list"):
        example({"instruction": "q", "output": ["a"]})


def test_half_a_surrogate_pair_is_a_row_error() -> None:
    with pytest.raises(RowError, match="surrogate"):
        example(json.loads('{"text": "\\ud800"}'))


def test_columns_that_no_format_reads_are_kept_for_a_loss() -> None:
    row = {"text": "t", "score": 0.5, "id": 7}
    assert example(row, keep_columns=True).columns == {"score": 0.5, "id": 7}
    assert example(row).columns == {}


def test_seed_tasks_through_columns(real_data: Path) -> None:
    columns = {"input": "instances.0.input", "output": "instances.0.output"}
    rows = [r for r in read_rows(real_data / "seed_tasks.jsonl") if isinstance(r, RawRow)]
    lines = (real_data / "seed_tasks.jsonl").read_text(encoding="utf-8").split("\n")
    truth = [json.loads(line) for line in lines if line]
    assert len(rows) == len(truth) == 175
    for row, raw in zip(rows, truth, strict=True):
        found = example(row.value, columns).messages
        instance = raw["instances"][0]
        joined = raw["instruction"] + ("\n\n" + instance["input"] if instance["input"] else "")
        assert [m["content"] for m in found] == [joined, instance["output"]]


def test_d05_nan_is_a_missing_text_and_never_the_word() -> None:
    nan = float("nan")
    with pytest.raises(RowError, match="null or NaN") as error:
        example({"prompt": "q", "completion": nan})
    assert error.value.code == "null_answer"
    with pytest.raises(RowError):
        example({"question": "q", "answer": nan}, {"prompt": "question", "completion": "{answer}!"})
    row = {"instruction": "q", "input": nan, "output": "a"}
    assert example(row).messages == example({"instruction": "q", "output": "a"}).messages


def test_a_path_in_brackets_is_told_how_paths_are_written() -> None:
    row = {"q": "x", "instances": [{"output": "a"}]}
    with pytest.raises(RowError) as error:
        example(row, {"prompt": "q", "completion": "{instances[0][output]}"})
    assert "messages.0.content" in error.value.fix
    assert example(row, {"prompt": "q", "completion": "instances.0.output"}).completion == "a"


@pytest.mark.parametrize(("row", "hint"), [
    ({"question": "q", "response": "a"}, "{prompt: question, completion: response}"),
    ({"Instruction": "q", "Output": "a"}, "{prompt: Instruction, completion: Output}"),
    ({"instruction ": "q", " output": "a"}, '{prompt: "instruction ", completion: " output"}'),
    ({"data": {"q": "q", "a": "a"}}, "{prompt: data.q, completion: data.a}"),
    ({"instruction": "q", "instances": [{"output": "a"}]},
     "{prompt: instruction, completion: instances.0.output}"),
    ({"x": "q", "y": "a"}, "{prompt: question, completion: answer}"),
    ({"data": [{"instruction": "q", "output": "a"}]}, "jq .data FILE"),
])  # fmt: skip
def test_unknown_rows_get_a_hint_in_their_own_names(row: dict[str, Any], hint: str) -> None:
    with pytest.raises(InputError) as error:
        detect_format([row, row] if "instances" in row else [row], {}, "x.jsonl:1")
    assert error.value.code == "unknown_format"
    assert hint in error.value.fix
    if (hint.startswith("{") and "question" not in hint) or "question" in row:
        columns = yaml.safe_load(hint)
        assert detect_format([row], columns, "x.jsonl:1") == "prompt_completion"


def test_a_column_key_that_no_format_has_is_named() -> None:
    row = {"instruction": "q", "output": "a"}
    with pytest.raises(InputError) as error:
        detect_format([row], {"promt": "instruction", "completion": "output"}, "x.jsonl:1")
    assert error.value.code == "unknown_column_key"
    assert "'promt'" in error.value.message
    assert error.value.fix == "did you mean prompt?"
