"""Whose turn a shown token belongs to, against the texts of the row itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import TEMPLATES, chat_tokenizer
from preparing import BASE, CHATML, alpaca, prepare

from glasstune.core.mask import ShownDocument, ShownRow
from glasstune.data.mask import show_rows
from glasstune.data.prepare import PreparedData
from glasstune.data.read import read_lines
from glasstune.data.turns import examples_of, turns_of
from glasstune.data.write import write_rows

TALK = [
    {"role": "user", "content": "why is it?"},
    {"role": "assistant", "content": "so it is"},
    {"role": "user", "content": "really?"},
    {"role": "assistant", "content": "yes, the fox"},
]
NO_SYSTEM = {"forced"}


def shown(data: PreparedData, count: int = 1) -> list[tuple[ShownRow, ShownDocument]]:
    return [(row, document) for row in show_rows(data, count) for document in row.documents]


def turns(row: ShownRow, document: ShownDocument) -> list[tuple[str, str]]:
    """[role, text] of each turn; they follow each other and fill the document."""
    edges = [turn.start for turn in document.turns] + [document.end]
    assert [turn.end for turn in document.turns] == edges[1:]
    assert edges[0] == document.start
    return [
        (turn.role, "".join(token.text for token in row.tokens[turn.start : turn.end]))
        for turn in document.turns
    ]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_turn_holds_its_own_text_and_no_other(name: str, system: bool) -> None:
    talk = [{"role": "system", "content": "be brief"}, *TALK] if system else TALK
    tokenizer = chat_tokenizer(name)
    try:
        data = prepare([{"path": [{"messages": talk}]}], tokenizer, packing=False)
    except Exception:
        assert system, "every template has a place for questions and answers"
        return
    ((row, document),) = shown(data)
    found = [turn for turn in turns(row, document) if turn[0] in ("system", "user", "assistant")]
    if system and len(found) == len(TALK):  # a template that writes it into the first question
        talk = [{"role": "user", "content": f"{talk[0]['content']}"}, *TALK[1:]]
    assert [role for role, _ in found] == [turn["role"] for turn in talk]
    for number, (_, text) in enumerate(found):
        for other, turn in enumerate(talk):
            assert (turn["content"] in text) == (number == other), (number, text)


def test_the_border_lies_behind_the_end_token() -> None:
    data = prepare([{"path": [{"messages": TALK}]}], packing=False)
    assert turns(*shown(data)[0]) == [
        ("user", "<|im_start|>user\nwhy is it?<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nso it is<|im_end|>\n"),
        ("user", "<|im_start|>user\nreally?<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nyes, the fox<|im_end|>\n"),
    ]


def test_a_system_prompt_of_the_template_is_a_turn_of_its_own() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + str(tokenizer.chat_template)
    )
    data = prepare([{"path": [{"messages": TALK}]}], tokenizer, packing=False)
    first, second, *_ = turns(*shown(data)[0])
    assert first == ("system (the template's own)", "<|im_start|>system\nBe kind.<|im_end|>\n")
    assert second == ("user", "<|im_start|>user\nwhy is it?<|im_end|>\n")


def test_a_tool_call_and_its_result_are_turns() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "fox"}}}
    talk = [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "in the wood"},
        {"role": "assistant", "content": "there"},
    ]
    data = prepare([{"path": [{"messages": talk}]}], chat_tokenizer("qwen3"), packing=False)
    found = turns(*shown(data)[0])
    assert [role for role, _ in found] == ["user", "assistant", "tool", "assistant"]
    assert '"look"' in found[1][1]
    assert "in the wood" in found[2][1]
    assert "in the wood" not in found[1][1] + found[3][1]


def test_documents_of_a_pack_have_their_own_turns() -> None:
    data = prepare(alpaca(3), max_length=256)
    for row, document in shown(data):
        number = document.origin[5]
        assert [text.split("\n")[1] for _, text in turns(row, document)] == [
            f"why {number}?<|im_end|>",
            f"Because {number}.<|im_end|>",
        ]


def test_baichuan2_turns_start_at_their_markers() -> None:
    rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}] * 2}]
    markers = {"user": 195, "assistant": 196}
    data = prepare([{"path": rows, "format": "baichuan2"}], BASE, markers=markers, packing=False)
    ((row, document),) = shown(data)
    assert [turn.role for turn in document.turns] == ["user", "assistant"] * 2
    starts = [row.tokens[turn.start].id for turn in document.turns]
    assert starts == [195, 196] * 2


def test_prompt_and_completion_without_a_template() -> None:
    data = prepare([{"prompt": "the fox ", "completion": "jumps"}], BASE, packing=False)
    (first, second) = turns(*shown(data)[0])
    assert (first[0], second[0]) == ("prompt", "completion")
    assert "fox" in first[1]
    assert "jumps" in second[1]
    assert "jumps" not in first[1]


def test_a_text_has_no_turns() -> None:
    data = prepare([{"text": "the quick fox"}], BASE, packing=False)
    assert shown(data)[0][1].turns == ()


def test_a_row_that_is_cut_has_the_turns_that_are_left() -> None:
    talk = [*TALK[:3], {"role": "assistant", "content": "so " * 200}]
    data = prepare([{"path": [{"messages": talk}]}], packing=False, max_length=40, truncation="cut")
    row, document = shown(data)[0]
    found = turns(row, document)
    assert [role for role, _ in found][:2] == ["user", "assistant"]
    assert document.end <= 40


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_rows_are_read_again_from_any_file(tmp_path: Path, name: str) -> None:
    path = write_rows(alpaca(20), tmp_path / name)
    if name.endswith(".jsonl"):
        path.write_bytes(b"\xef\xbb\xbf\n" + path.read_bytes())
    data = prepare(path, packing=False)
    found = shown(data, 20)
    assert len(found) == 20
    for row, document in found:
        text = "".join(token.text for token in row.tokens)
        (_, question), (_, answer) = turns(row, document)
        assert question.strip() + "\n" + answer == text.removesuffix("</s>" * 8)[: len(
            question.strip() + "\n" + answer
        )]  # fmt: skip
        assert "why" in question
        assert "Because" in answer


def test_rows_of_the_hub_are_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, split: datasets.Dataset.from_list(alpaca(5))
    )
    data = prepare([{"path": "owner/set"}], packing=False)
    assert [role for role, _ in turns(*shown(data)[0])] == ["user", "assistant"]


def test_a_file_that_is_gone_leaves_the_turns_unknown(tmp_path: Path) -> None:
    path = write_rows(alpaca(3), tmp_path / "a.jsonl")
    data = prepare(path, CHATML, packing=False)
    path.unlink()
    row, document = shown(data)[0]
    assert [turn.role for turn in document.turns] == ["unknown"]
    assert len(turns(row, document)[0][1]) > 20


def test_only_lines_that_are_shown_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(alpaca(300), tmp_path / "a.jsonl")
    data = prepare(path, packing=False)
    parsed: list[Any] = []
    real = read_lines

    def counted(path: Path, lines: Any, *rest: Any) -> Any:
        parsed.extend(json.loads(line) for line in lines)
        return real(path, lines, *rest)

    monkeypatch.setattr("glasstune.data.turns.read_lines", counted)
    show_rows(data, 2)
    assert len(parsed) == 2


def test_a_tokenizer_that_changes_the_text() -> None:
    """Blanks may come and go; where words do, nothing is guessed."""
    data = prepare([{"path": [{"messages": TALK}]}], packing=False)
    ((row, shown_document),) = shown(data)
    document = data.train.documents[0]
    example = examples_of(data.opened, data.template, [document])[0, "rows[0]"]
    texts = [token.text for token in row.tokens[: len(document)]]
    places = [turn.start for turn in shown_document.turns]
    for change, expected in (
        (lambda text: text, places),
        (lambda text: f" {text}", places),
        (lambda text: text.upper(), [0]),
    ):
        found = turns_of(data.template, example, document, [change(t) for t in texts],
                         {t.id for t in row.tokens if t.special})  # fmt: skip
        assert [turn.start for turn in found] == expected
    assert [turn.role for turn in found] == ["unknown"]
