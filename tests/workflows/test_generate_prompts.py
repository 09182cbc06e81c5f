"""The forms of a prompt, and prompt files, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny_model

from glasstune.core.errors import InputError
from glasstune.workflows import generate as workflow

USER = {"role": "user", "content": "hi"}


def test_every_form_becomes_messages() -> None:
    tools = [{"name": "f"}]
    for prompt in ("hi", {"prompt": "hi"}, {"messages": [USER]}, [USER]):
        assert workflow._conversation(prompt, None, 0) == ([USER], None)
    assert workflow._conversation({"messages": [USER], "tools": tools}, None, 0)[1] == tools


def test_system_comes_first_and_only_once() -> None:
    messages, _ = workflow._conversation("hi", "be brief", 0)
    assert messages == [{"role": "system", "content": "be brief"}, USER]
    own = [{"role": "system", "content": "x"}, USER]
    with pytest.raises(InputError, match="system message of its own") as caught:
        workflow._conversation({"messages": own}, "be brief", 4)
    assert caught.value.where == "prompt 5"
    assert own == [{"role": "system", "content": "x"}, USER], "the caller's list is untouched"


@pytest.mark.parametrize("prompt", ["", "  ", {"messages": [{"role": "user"}]}, {"prompt": ""}])
def test_prompts_that_say_nothing_are_refused(prompt: Any) -> None:
    with pytest.raises(InputError) as caught:
        workflow._conversation(prompt, None, 1)
    assert caught.value.where == "prompt 2"


def test_d04_a_row_without_prompt_names_line_and_keys(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "id": 1}\n\n{"question": "b", "id": 2}\n')
    with pytest.raises(InputError, match="question, id") as caught:
        workflow.read_prompts(path)
    assert caught.value.where.endswith("prompts.jsonl:3")


def test_a_file_is_answered_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "a", "id": 1}\n{"messages": [{"role": "user", "content": "é"}]}\n'
    )
    monkeypatch.setattr(workflow, "generate", lambda model, rows, **_: ["x\ny", "ž"][: len(rows)])
    assert workflow.generate_file("m", source, target) == {"rows": 2, "output": str(target)}
    assert target.read_text(encoding="utf-8") == (
        '{"prompt": "a", "id": 1, "answer": "x\\ny"}\n'
        '{"messages": [{"role": "user", "content": "é"}], "answer": "ž"}\n'
    )


def test_output_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match="one file"):
        workflow.generate_file("no/model", source, source)
    with pytest.raises(InputError, match="folder does not exist"):
        workflow.generate_file("no/model", source, tmp_path / "none" / "out.jsonl")


def test_a_conversation_that_is_answered_already_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to answer"):
        workflow._conversation([USER, {"role": "assistant", "content": "a"}], None, 0)


def test_answers_go_to_json_lines_only(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(InputError, match="JSON lines") as caught:
        workflow.generate_file("nowhere", tmp_path / "in.jsonl", tmp_path / "out.csv")
    assert "out.jsonl" in caught.value.fix


@pytest.mark.parametrize("text", [b"\xff".decode("utf-8", "surrogateescape"), "half \ud800"])
def test_text_that_is_no_utf8_is_refused(text: str, tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "model"))
    with pytest.raises(InputError, match="not UTF-8") as caught:
        workflow.generate(model, ["good", text], max_new_tokens=1)
    assert (caught.value.code, caught.value.where) == ("bad_unicode", "prompt 2")
    with pytest.raises(InputError, match="not UTF-8"):
        workflow.generate(model, ["good"], system=text, max_new_tokens=1)
