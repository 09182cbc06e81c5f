"""`glasstune plan` on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from glasstune.cli.main import run


@pytest.fixture
def config(tiny_llama: Path, qa_file: Path, tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {{path: {tiny_llama}, device: cpu}}\n"
        f"data: {{sources: [{{path: {qa_file}}}], max_length: 128}}\n"
        f"training: {{output_dir: {tmp_path / 'run'}}}\n",
        encoding="utf-8",
    )
    return file


def test_prints_the_plan_and_writes_record_and_page(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, record = tmp_path / "plan.html", tmp_path / "plan.json"
    assert run(["plan", str(config), "--html", str(page), "--json", str(record)]) == 0
    out = capsys.readouterr().out
    content = json.loads(record.read_text(encoding="utf-8"))
    assert content["peak_bytes"] == sum(content["parts"].values())
    assert "Recomputation: no layer computed again" in out
    assert "activations" in out
    # What the configuration leaves open, as a training run says it.
    names = {choice["name"] for choice in content["choices"]}
    assert {"data.packing", "training.compile", "training.save_steps"} & names
    for choice in content["choices"]:
        assert f"{choice['name']}: {choice['value']} ({choice['reason']})" in out
        assert choice["name"] in page.read_text(encoding="utf-8")
    assert not re.search(r"\b1 \w+s\b", out)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_fit_ends_with_2(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "plan.json"
    words = ["plan", str(config), "training.max_memory=10MiB", "--json", str(record)]
    assert run(words) == 2
    error = json.loads(record.read_text(encoding="utf-8"))["error"]
    assert error["code"] == "does_not_fit"
    assert "10.0 MiB may be used" in error["message"]
    assert "Traceback" not in capsys.readouterr().err


def test_a_dry_run_shows_the_plan(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(config), "--dry-run"]) == 0
    assert "The peak is in the" in capsys.readouterr().out


def test_a_page_that_cannot_be_written_is_said_first(config: Path) -> None:
    assert run(["plan", str(config), "--html", "/nowhere/at/all.html"]) == 2
