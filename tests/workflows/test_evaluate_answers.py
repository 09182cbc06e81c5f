"""`evaluate --generate`: answers against transformers' own generate, metrics by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import QuietProgress, tiny_run

from glasstune.core.errors import InputError
from glasstune.workflows.evaluate import evaluate
from glasstune.workflows.generate import generate
from glasstune.workflows.train import train

LENGTH = 12


@pytest.fixture(scope="module")
def run(tiny_llama: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "run"
    config = tiny_run(tiny_llama, qa_file, folder, training={"learning_rate": 2e-3})
    train(config, progress=QuietProgress())
    return folder


@pytest.fixture(scope="module")
def rows(qa_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "held.jsonl"
    found = json.loads(qa_file.read_text())[:24]
    path.write_text("\n".join(json.dumps(row) for row in found))
    return path


def judged(target: Path, data: Path, output: Path, **options: Any) -> tuple[Any, list[Any]]:
    record = evaluate(
        str(target), str(data), generate=True, output=output, max_new_tokens=LENGTH, **options
    )
    return record, [json.loads(line) for line in output.read_text().splitlines()]


@torch.no_grad()
def by_transformers(base: Path, adapter: Path | None, prompts: list[Any]) -> list[str]:
    """One prompt at a time, greedy, with plain PEFT and transformers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = []
    for messages in prompts:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        found = model.generate(
            **inputs, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0, eos_token_id=1
        )
        new = found[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_answers_are_transformers_own_for_any_batch(
    run: Path, rows: Path, tiny_llama: Path, tmp_path: Path, batch_size: int
) -> None:
    _, answers = judged(run, rows, tmp_path / "a.jsonl", batch_size=batch_size, compare="base")
    assert len(answers) == 24
    prompts = [row["messages"] for row in answers]
    assert len({len(str(messages)) for messages in prompts}) > 5, "rows are padded"
    for side, adapter in (("tuned", run / "adapter"), ("base", None)):
        want = by_transformers(tiny_llama, adapter, prompts)
        assert [row[side]["answer"] for row in answers] == want
        assert len(set(want)) > 3


def test_metrics_are_means_over_the_rows(run: Path, rows: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "def sure(answer, reference, row):\n"
        "    assert row['output'] == reference\n    return 'Sure' in answer\n"
    )
    metric = f"exact_match,contains,{own}:sure"
    record, answers = judged(run, rows, tmp_path / "a.jsonl", metric=metric, compare="base")
    sources = {str(row["origin"]) for row in answers}
    assert sources == {f"{rows}:{number}" for number in range(1, 25)}
    assert list(record.metrics) == ["tuned", "base"]
    for side in ("tuned", "base"):
        found = record.metrics[side]
        texts = [(row[side]["answer"], row["reference"]) for row in answers]
        assert found["exact_match"] == sum(a == r for a, r in texts) / 24
        assert found["contains"] == sum(r in a for a, r in texts) / 24
        assert found["sure"] == sum("Sure" in a for a, _ in texts) / 24
        assert found["answers"] == 24
    assert record.metrics["tuned"]["sure"] > record.metrics["base"]["sure"]
    (source,) = record.by_source.values()
    assert source["sure"] == record.metrics["tuned"]["sure"]
    assert source["base_sure"] == record.metrics["base"]["sure"]


def test_compare_alone_measures_both_losses(run: Path, rows: Path) -> None:
    record = evaluate(str(run), str(rows), compare="base")
    base = evaluate(str(run), str(rows), no_adapter=True)
    assert record.metrics["tuned"]["eval_loss"] == record.eval_loss
    assert record.metrics["base"]["eval_loss"] == pytest.approx(base.eval_loss, rel=1e-6)
    assert record.metrics["base"]["token_accuracy"] == base.token_accuracy
    assert "exact_match" not in record.metrics["base"]
    assert record.by_source["held"]["base_eval_loss"] == record.metrics["base"]["eval_loss"]
    assert record.eval_loss < base.eval_loss


def test_trained_biases_are_left_out_of_the_base(
    tiny_llama: Path, qa_file: Path, rows: Path, tmp_path: Path
) -> None:
    """PEFT leaves trained biases in the base when an adapter is off: it is opened again."""
    import shutil

    from transformers import AutoModelForCausalLM

    base = shutil.copytree(tiny_llama, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, attention_bias=True).save_pretrained(base)
    run = tmp_path / "run"
    train(
        tiny_run(base, qa_file, run, adapter={"bias": "lora_only", "target_modules": ["q_proj"]},
                 training={"max_steps": 4, "learning_rate": 0.05}),
        progress=QuietProgress(),
    )  # fmt: skip
    both = evaluate(str(run), str(rows), compare="base")
    alone = evaluate(str(run), str(rows), no_adapter=True)
    assert both.metrics["base"]["eval_loss"] == pytest.approx(alone.eval_loss, rel=1e-6)
    assert both.eval_loss != pytest.approx(alone.eval_loss, rel=1e-3)


def test_only_the_last_answer_is_asked_and_calls_are_left_out(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "talk.jsonl"
    texts = ("What is 3 plus 3?", "6", "And 4?", "8")
    talk = [
        {"role": "assistant" if at % 2 else "user", "content": text}
        for at, text in enumerate(texts)
    ]
    data.write_text("\n".join(json.dumps({"messages": part}) for part in (talk, talk[:2])))
    _, answers = judged(run, data, tmp_path / "a.jsonl")
    assert [row["messages"] for row in answers] == [talk[:3], talk[:1]]
    assert [row["reference"] for row in answers] == ["8", "6"]
    want = generate(str(run), [{"messages": talk[:3]}], max_new_tokens=LENGTH)
    assert answers[0]["tuned"]["answer"] == want[0]


def test_a_base_model_goes_on_with_the_prompt(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    bare = shutil.copytree(tiny_llama, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "The list", "completion": " type"}))
    record, (row,) = judged(bare, data, tmp_path / "a.jsonl", dtype="float32")
    assert row["prompt"] == "The list"
    assert list(record.metrics) == ["base"]
    want = generate(str(bare), ["The list"], max_new_tokens=LENGTH, dtype="float32")
    assert row["base"]["answer"] == want[0]
    data.write_text(json.dumps({"text": "The list type"}))
    with pytest.raises(InputError, match="plain texts"):
        judged(bare, data, tmp_path / "a.jsonl", dtype="float32")


def test_a_failing_metric_does_not_cost_the_answers(run: Path, rows: Path, tmp_path: Path) -> None:
    own, output = tmp_path / "own.py", tmp_path / "a.jsonl"
    own.write_text("def fn(answer, reference):\n    raise KeyError('x')\n")
    with pytest.raises(InputError, match=r"KeyError.*held\.jsonl:1"):
        judged(run, rows, output, metric=f"{own}:fn")
    assert len(output.read_text().splitlines()) == 24


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"metric": "contains"}, "needs_generate"),
        ({"output": "a.jsonl"}, "needs_generate"),
        ({"compare": "last"}, "bad_compare"),
        ({"compare": "base", "no_adapter": True}, "nothing_to_compare"),
        ({"generate": True, "metric": "bleu"}, "unknown_metric"),
        ({"generate": True, "max_new_tokens": 0}, "bad_option"),
        ({"generate": True, "output": "/nowhere/at/all/a.jsonl"}, "no_folder"),
        ({"generate": True, "output": "a.csv"}, "output_format"),
        ({}, "no_such_file"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_load(
    options: dict[str, Any], code: str
) -> None:
    with pytest.raises(InputError) as error:
        evaluate("no/such-model", "none.jsonl", **options)
    assert error.value.code == code
    assert error.value.fix


def test_nothing_to_compare_without_an_adapter(tiny_llama: Path, rows: Path) -> None:
    with pytest.raises(InputError, match="no adapter") as error:
        evaluate(str(tiny_llama), str(rows), compare="base", dtype="float32")
    assert error.value.code == "nothing_to_compare"
    with pytest.raises(InputError, match="one file"):
        evaluate(str(tiny_llama), str(rows), generate=True, output=str(rows))


def test_progress_says_what_happens(run: Path, rows: Path) -> None:
    said = QuietProgress()
    evaluate(str(run), str(rows), generate=True, compare="base", max_new_tokens=2, progress=said)
    assert [line for line in said.lines if line.startswith("measuring")] == [
        "measuring the tuned model",
        "measuring the base model",
    ]
