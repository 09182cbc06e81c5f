"""Two answers beside each other on a terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from glasstune.reports.chat_view import ChatView


def terminal(width: int = 60, height: int = 12) -> tuple[ChatView, io.StringIO]:
    out = io.StringIO()
    view = ChatView(out, out)
    view.console = Console(
        file=out, force_terminal=True, width=width, height=height, color_system=None
    )
    return view, out


def test_both_answers_stand_whole_side_by_side() -> None:
    view, out = terminal()
    view.begin(["tuned", "base"])
    long = " ".join(f"word{number}" for number in range(60))
    view.piece("tuned", long)
    view.piece("base", "No.\n\nReally [not].")
    view.end()
    final = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).rpartition("tuned")[2]
    rows = [[cell.strip() for cell in line.split("│")] for line in final.splitlines()]
    rows = [row for row in rows if len(row) == 2]
    assert " ".join(row[0] for row in rows).split() == long.split()
    assert [row[1] for row in rows[:3]] == ["No.", "", "Really [not]."]
    assert max(len(line) for line in final.splitlines()) <= 60


def test_while_it_streams_the_newest_lines_are_shown() -> None:
    view, out = terminal()
    view.begin(["tuned", "base"])
    view.piece("tuned", "\n".join(f"line {number}" for number in range(40)))
    assert view._live is not None
    view._live.refresh()
    shown = out.getvalue()
    assert "line 39" in shown
    assert "line 20" not in shown
    view.end()
    assert out.getvalue().count("line 0 ") >= 1, "the whole answer stays in the end"


def test_one_answer_streams_as_plain_text() -> None:
    view, out = terminal()
    view.begin(["tuned"])
    view.piece("tuned", "a" * 100)
    assert out.getvalue() == "a" * 100
    view.end()
    assert out.getvalue() == "a" * 100 + "\n"
