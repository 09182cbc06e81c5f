"""`glasstune evaluate --generate` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glasstune.cli.main import run


def test_answers_are_judged_shown_and_written(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output, record = (tmp_path / name for name in ("d.jsonl", "a.jsonl", "r.json"))
    rows = [{"prompt": f"What is {number}?", "completion": "a"} for number in range(3)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    own = tmp_path / "own.py"
    own.write_text("def size(answer, reference):\n    return len(answer) - len(reference)\n")
    words = ["evaluate", str(tiny_llama), "--data", str(data), "--generate", "--dtype", "float32"]
    words += ["--metric", f"exact_match,{own}:size", "--max-new-tokens", "5"]
    assert run([*words, "--output", str(output), "--json", str(record)]) == 0
    shown = capsys.readouterr()
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    found = json.loads(record.read_text())
    mean = sum(len(row["base"]["answer"]) - 1 for row in answers) / 3
    assert found["metrics"]["base"]["size"] == pytest.approx(mean)
    assert found["metrics"]["base"]["answers"] == 3
    assert found["by_source"]["d"]["size"] == pytest.approx(mean)
    (line,) = [line for line in shown.out.splitlines() if line.strip().startswith("base")]
    assert f"{mean:.4f}" in line
    assert "measuring the base model" in shown.err


def test_wrong_options_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "m", "--data", "d", "--metric", "contains", "--json", "-"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["code"] == "needs_generate"
    assert "hint: add --generate" in shown.err
