"""Findings about rows that are right in form."""

from __future__ import annotations

from pathlib import Path

from preparing import alpaca, codes, finding, prepare


def test_empty_answers_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\nq1,a1\nq2,\nq3, \n")
    assert finding(prepare(file), "empty_answer").message.startswith("2 rows")
    assert "empty_answer" not in codes(prepare(alpaca(3)))
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]
    assert "empty_answer" in codes(prepare([{"messages": chat}]))
