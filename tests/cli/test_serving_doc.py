"""docs/SERVING.md: our commands in it exist with these options, and its metric runs."""

from __future__ import annotations

import re
from pathlib import Path

from glasstune.generation.metrics import load_metrics

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "SERVING.md").read_text(encoding="utf-8")


def test_commands_and_options_are_those_of_the_reference() -> None:
    reference = (ROOT / "docs" / "REFERENCE.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ glasstune (\w+) (.*)$", TEXT, re.MULTILINE)
    assert [name for name, _ in commands] == ["chat", "evaluate", "merge"]
    for name, rest in commands:
        section = reference.partition(f"### `glasstune {name}`")[2].partition("### `glasstune")[0]
        for option in re.findall(r"--[\w-]+", rest):
            assert f"`{option}" in section, f"{name} has no {option}"


def test_the_metric_of_the_page_works(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    close = load_metrics(f"{tmp_path}/mine.py:close")["close"]
    assert close("3.001", "3", {}) == 1
    assert close("3.1", "3", {}) == 0


def test_each_server_has_one_command() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "`" in line]
    assert [row.split("|")[1].strip() for row in rows] == ["vLLM", "llama.cpp", "Ollama"]
    assert "lm_eval" in TEXT
