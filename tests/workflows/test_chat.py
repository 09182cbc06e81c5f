"""The chat's loop: commands, sides, interruption, errors; with a tiny trained run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from runs import QuietProgress, tiny_run

from glasstune.core.errors import InputError
from glasstune.workflows.chat import chat
from glasstune.workflows.generate import generate
from glasstune.workflows.train import train

ONE, TWO = "What is 3 plus 3?", "What is 40 plus 5?"


class Screen:
    """Remembers what was shown; may act after a number of pieces."""

    def __init__(self, act_after: int = 0) -> None:
        self.said: list[str] = []
        self.turns: list[dict[str, str]] = []
        self.act_after, self.pieces = act_after, 0

    def say(self, text: str) -> None:
        self.said.append(text)

    def begin(self, sides: list[str]) -> None:
        self.turns.append(dict.fromkeys(sides, ""))

    def piece(self, side: str, text: str) -> None:
        self.turns[-1][side] += text
        self.pieces += 1
        if self.pieces == self.act_after:
            os.kill(os.getpid(), signal.SIGINT)

    def end(self) -> None: ...


@pytest.fixture(scope="module")
def run(tiny_llama: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "run"
    train(tiny_run(tiny_llama, qa_file, folder), progress=QuietProgress())
    return folder


def talk(target: Path, *entries: str, screen: Screen | None = None, **options: Any) -> Any:
    """Returns (screen, record) of a chat in which these entries are typed."""
    screen = screen or Screen()
    waiting = iter(entries)
    options = {"max_new_tokens": 10, **options}
    record = chat(str(target), lambda: next(waiting, None), screen, **options)
    return screen, record


def answer(target: Path, *messages: str, **options: Any) -> str:
    """What `generate` says to a conversation, roles taking turns."""
    turns = [
        {"role": "assistant" if at % 2 else "user", "content": text}
        for at, text in enumerate(messages)
    ]
    system = options.pop("system", None)
    if system:
        turns.insert(0, {"role": "system", "content": system})
    return generate(str(target), [{"messages": turns}], max_new_tokens=10, **options)[0]


def test_answers_are_those_of_generate_with_the_history(run: Path) -> None:
    screen, record = talk(run, ONE, "  ", TWO)
    first = answer(run, ONE)
    second = answer(run, ONE, first, TWO)
    assert screen.turns == [{"tuned": first}, {"tuned": second}]
    assert second != answer(run, TWO), "the history changes the answer"
    assert record["turns"] == 2
    assert [m["content"] for m in record["conversations"]["tuned"]] == [ONE, first, TWO, second]


def test_adapter_off_is_the_base(run: Path) -> None:
    screen, _ = talk(run, "/adapter off", ONE, "/reset", "/adapter", "/adapter on", ONE)
    base, tuned = answer(run, ONE, no_adapter=True), answer(run, ONE)
    assert base != tuned
    assert [turn["tuned"] for turn in screen.turns] == [base, tuned]
    assert any("the adapter is off" in line for line in screen.said)


def test_compare_keeps_two_conversations(run: Path) -> None:
    screen, record = talk(run, ONE, TWO, "/adapter off", compare=True)
    tuned, base = answer(run, ONE), answer(run, ONE, no_adapter=True)
    assert screen.turns[0] == {"tuned": tuned, "base": base}
    assert screen.turns[1] == {
        "tuned": answer(run, ONE, tuned, TWO),
        "base": answer(run, ONE, base, TWO, no_adapter=True),
    }
    assert list(record["conversations"]) == ["tuned", "base"]
    assert "both answer" in screen.said[-1]


def test_system_prompt_and_reset(run: Path) -> None:
    """On the base, whose random weights let every word count."""
    off: dict[str, Any] = {"no_adapter": True}
    entries = (ONE, "/system Be brief", TWO, "/reset", ONE, "/system", "/reset", ONE)
    screen, _ = talk(run, *entries, **off)
    brief = {"system": "Be brief", **off}
    first = answer(run, ONE, **off)
    second = answer(run, ONE, first, TWO, **brief)
    third = answer(run, ONE, **brief)
    assert [turn["base"] for turn in screen.turns] == [first, second, third, first]
    given, _ = talk(run, ONE, system="Be brief", **off)
    assert given.turns[0]["base"] == third != first


def test_save_writes_rows_that_train_again(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    screen, _ = talk(run, f"/save {file}", "/system Be brief", ONE, f"/save {file}",
                     f"/save {file}", "/save", f"/save {tmp_path}/none/x")  # fmt: skip
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][2]["content"] == screen.turns[0]["tuned"]
    says = " ".join(screen.said)
    for part in ("nothing has been said", "exists already", "needs a file", "does not exist"):
        assert part in says


def test_a_mistake_is_said_and_the_chat_goes_on(run: Path) -> None:
    screen, record = talk(run, "/nothing", "/adapter sideways", "x " * 3000, " /etc is a folder?")
    assert "no command /nothing" in screen.said[0]
    assert "/adapter on or /adapter off" in screen.said[1]
    assert "the model can place 512" in screen.said[2]
    assert record["turns"] == 1, "a path is no command"
    with pytest.raises(InputError, match="no command"):
        talk(run, "/nothing", interactive=False)
    assert talk(run, "/quit", ONE)[1]["turns"] == 0
    assert "/reset" in talk(run, "/help")[0].said[0]


def test_ctrl_c_stops_the_answer_and_not_the_chat(run: Path) -> None:
    whole = answer(run, ONE)
    before = signal.getsignal(signal.SIGINT)
    screen, record = talk(run, ONE, "/reset", ONE, screen=Screen(act_after=2))
    assert signal.getsignal(signal.SIGINT) is before
    first = screen.turns[0]["tuned"]
    assert whole.startswith(first)
    assert 0 < len(first) < len(whole)
    assert "(stopped)" in screen.said
    assert screen.turns[1]["tuned"] == whole, "the model is as it was"
    assert record["turns"] == 2


def test_ctrl_c_at_the_prompt_does_not_leave(run: Path) -> None:
    entries: list[Any] = [KeyboardInterrupt(), ONE, None]

    def read() -> str | None:
        entry = entries.pop(0)
        if isinstance(entry, BaseException):
            raise entry
        return entry

    screen = Screen()
    assert chat(str(run), read, screen, max_new_tokens=3)["turns"] == 1
    assert "leaves" in screen.said[0]


def test_a_long_conversation_drops_its_oldest_turns_and_says_so(run: Path) -> None:
    """512 positions, 200 of them kept for answers."""
    screen, record = talk(run, "first " * 50, "second " * 50, "third " * 40, max_new_tokens=200)
    assert any("no longer fits into 512 tokens" in line for line in screen.said)
    kept = [m["content"][:5] for m in record["conversations"]["tuned"] if m["role"] == "user"]
    assert kept[-1] == "third"
    assert len(kept) < 3
    assert any("cut at" in line for line in screen.said)


def test_a_plain_model_has_no_adapter_to_switch(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    options: dict[str, Any] = {"dtype": "float32"}
    screen, record = talk(tiny_llama, "/adapter off", ONE, **options)
    assert "no adapter" in screen.said[0]
    assert list(record["conversations"]) == ["base"]
    with pytest.raises(InputError, match="no two models"):
        talk(tiny_llama, compare=True, **options)
    bare = shutil.copytree(tiny_llama, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    screen, _ = talk(bare, "The list", "type has", **options)
    assert "no chat template" in screen.said[0]
    alone = generate(str(bare), ["type has"], max_new_tokens=10, dtype="float32")[0]
    assert screen.turns[1]["base"] == alone


def test_trained_biases_cannot_be_switched_off(
    tiny_llama: Path, qa_file: Path, tmp_path: Path
) -> None:
    import shutil

    from transformers import AutoModelForCausalLM

    base = shutil.copytree(tiny_llama, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, attention_bias=True)
    model.save_pretrained(base)
    run = tmp_path / "run"
    train(
        tiny_run(base, qa_file, run, adapter={"bias": "lora_only", "target_modules": ["q_proj"]},
                 training={"max_steps": 1}),
        progress=QuietProgress(),
    )  # fmt: skip
    screen, _ = talk(run, "/adapter off")
    assert "trains biases" in screen.said[0]
    with pytest.raises(InputError, match="trains biases"):
        talk(run, compare=True)
