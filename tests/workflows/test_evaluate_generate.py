"""evaluate and generate on a run, its adapter, its checkpoints and its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import QuietProgress, events, tiny_run
from tiny import save_tiny_model, tiny_tokenizer

import glasstune as gt
from glasstune.core.choices import Choices
from glasstune.core.errors import InputError
from glasstune.core.records import TrainRecord
from glasstune.workflows.evaluate import evaluate
from glasstune.workflows.generate import generate, generate_file
from glasstune.workflows.open_model import open_model
from glasstune.workflows.train import train

PROMPTS = ["What is 3 plus 3?", "What is 40 plus 5?", "What is 17 plus 3? Think about it well."]


@pytest.fixture(scope="module")
def run(
    tiny_llama: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainRecord, Path]:
    """A finished run, its record, and the file that it was measured on."""
    folder = tmp_path_factory.mktemp("evaluate")
    rows = json.loads(qa_file.read_text())
    held_out = folder / "held_out.jsonl"
    held_out.write_text("\n".join(json.dumps(row) for row in rows[40:]))
    training = folder / "training.json"
    training.write_text(json.dumps(rows[:40]))
    config = tiny_run(
        tiny_llama, training, folder / "run",
        data={"validation": [{"path": str(held_out)}], "validation_split": 0.0},
        training={"num_train_epochs": 2, "save_steps": 4},
    )  # fmt: skip
    record = train(config, progress=QuietProgress())
    assert isinstance(record, TrainRecord)
    return folder / "run", record, held_out


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_g07_evaluate_gives_the_runs_own_number(run: Any, batch_size: int) -> None:
    folder, record, held_out = run
    found = evaluate(str(folder), str(held_out), batch_size=batch_size)
    assert found.eval_loss == pytest.approx(record.eval_loss_after, rel=1e-5)
    assert found.tokens == events(folder, "eval")[-1]["eval_tokens"]
    assert 0 < found.token_accuracy < 1
    assert found.by_source == {
        "held_out": {
            "eval_loss": found.eval_loss,
            "token_accuracy": found.token_accuracy,
            "tokens": found.tokens,
        }
    }


def test_without_the_adapter_it_is_the_number_before_training(run: Any, tiny_llama: Path) -> None:
    folder, record, held_out = run
    found = evaluate(str(folder), str(held_out), no_adapter=True)
    assert found.eval_loss == pytest.approx(record.eval_loss_before, rel=1e-5)
    base = evaluate(str(tiny_llama), str(held_out), dtype="float32")
    assert base.eval_loss == pytest.approx(record.eval_loss_before, rel=1e-5)


def test_checkpoints_and_the_bare_adapter(run: Any) -> None:
    folder, _, held_out = run
    by_step = {event["step"]: event["eval_loss"] for event in events(folder, "eval")}
    last = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
    for name in ("last", f"step-{last}"):
        found = evaluate(str(folder), str(held_out), checkpoint=name)
        assert found.eval_loss == pytest.approx(by_step[last], rel=1e-5)
    bare = evaluate(str(folder / "adapter"), str(held_out))
    best = evaluate(str(folder), str(held_out), checkpoint="best")
    assert bare.eval_loss == best.eval_loss == pytest.approx(min(by_step.values()), rel=1e-5)


def test_rows_from_python(run: Any) -> None:
    folder, record, held_out = run
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    found = evaluate(str(folder), rows)
    assert found.eval_loss == pytest.approx(record.eval_loss_after, rel=1e-5)


def test_d10_nothing_to_measure_is_said(run: Any) -> None:
    folder, _, _ = run
    with pytest.raises(InputError):
        evaluate(str(folder), [{"instruction": "q" * 500, "output": "a" * 500}])


def test_generate_answers_as_training_asked(run: Any) -> None:
    folder, _, _ = run
    tuned = generate(str(folder), PROMPTS, max_new_tokens=12)
    assert len(tuned) == len(PROMPTS)
    assert tuned == generate(str(folder), PROMPTS, max_new_tokens=12, batch_size=1)
    assert tuned != generate(str(folder), PROMPTS, max_new_tokens=12, no_adapter=True)
    assert all("<|im_end|>" not in answer for answer in tuned)


def test_t03_prompt_ids_are_those_of_training(run: Any) -> None:
    from glasstune.workflows.generate import encode

    opened = open_model(str(run[0]))
    messages = [{"role": "user", "content": PROMPTS[0]}]
    prompt = encode(opened, messages, None, "prompt 1")
    whole, labels = opened.template.encode([*messages, {"role": "assistant", "content": "It is"}])
    first = next(index for index, label in enumerate(labels) if label != -100)
    assert prompt == whole[:first]


def test_packed_and_plain_attention_agree_after_opening(run: Any, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    opened = open_model(str(run[0]), no_adapter=True)
    ids = torch.arange(5, 45).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad():
        want = plain(ids, attention_mask=mask).logits
        got = opened.model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask == 1], want[mask == 1], rtol=1e-5, atol=1e-5)


def test_a_prompt_file_and_its_answers(run: Any, tmp_path: Path) -> None:
    folder, _, _ = run
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": PROMPTS[0], "id": 7},
            {"messages": [{"role": "user", "content": PROMPTS[1]}]}]  # fmt: skip
    source.write_text("\n".join(json.dumps(row) for row in rows))
    generate_file(str(folder), source, target, max_new_tokens=8)
    written = [json.loads(line) for line in target.read_text().splitlines()]
    answers = generate(str(folder), PROMPTS[:2], max_new_tokens=8)
    assert written == [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]


def test_a_base_model_without_template_continues_text(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    opened = open_model(str(base), dtype="float32")
    assert opened.template.kind == "none"
    assert generate(str(base), ["The list"], max_new_tokens=3, dtype="float32")[0]
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    with pytest.raises(InputError, match="no chat template") as caught:
        generate(str(base), [{"messages": talk}], dtype="float32")
    assert caught.value.where == "prompt 1"


def test_choices_that_warn_are_said_without_a_run_too(
    tiny_llama: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4-bit layers that this CPU misreads: whoever answers or measures with them is told."""
    from glasstune.models import load

    def warn(model: Any, choices: Choices) -> None:
        choices.record("model.misread_4bit_layers", 3, "warning: read wrong here")
        choices.record("model.other", 1, "no reason to warn")

    monkeypatch.setattr(load, "_say_misread", warn)
    _, _, held_out = run
    for work in (
        lambda said: generate(str(tiny_llama), ["hi"], bits=4, max_new_tokens=1, progress=said),
        lambda said: evaluate(str(tiny_llama), str(held_out), bits=4, progress=said),
    ):
        said = QuietProgress()
        work(said)
        assert said.lines.count("warning: read wrong here") == 1
        assert not any("no reason to warn" in line for line in said.lines)
    with pytest.warns(UserWarning, match="^read wrong here$"):
        gt.load_model(str(tiny_llama), bits=4)


def test_conversations_and_a_model_without_a_template(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    tiny_tokenizer(chat_template=None).save_pretrained(model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ]
    with pytest.raises(InputError) as error:
        evaluate(str(model), chats, generate=True, max_new_tokens=1)
    assert error.value.code == "no_chat_template"
    alpaca = [{"instruction": "a", "input": "", "output": "b"}]
    assert evaluate(str(model), alpaca, max_new_tokens=1).tokens > 0
    assert evaluate(str(model), chats, chat_template="chatml").tokens > 0
    assert evaluate(str(model), [{"text": "a list"}]).tokens > 0
