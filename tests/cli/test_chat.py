"""`glasstune chat` as a user has it: entries of several lines, a pipe, a real terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import save_tiny_model

from glasstune.cli.chat import read_entry, reader
from glasstune.cli.main import run
from glasstune.core.errors import InputError
from glasstune.reports.chat_view import ChatView


def entries(*lines: str) -> list[str]:
    """What is read from these lines until their end."""
    waiting = iter(lines)

    def ask(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    found: list[str] = []
    while (entry := read_entry(ask)) is not None:
        found.append(entry)
    return found


def test_entries_of_several_lines() -> None:
    assert entries("one", "two\\", "  three\\", "four", "") == ["one", "two\n  three\nfour", ""]
    assert entries('"""', "a", "  b\\", '"""', "c") == ["a\n  b\\", "c"]
    assert entries('"""a', 'b"""', '"""c"""') == ["a\nb", "c"]
    assert entries('""" open', "end") == [" open\nend"], "an end closes the block"
    assert entries("half\\") == ["half"]


def test_a_pipe_gets_answers_on_stdout_only(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("The list\n/reset\n\nA dictionary\n"))
    record = tmp_path / "r.json"
    words = ["chat", str(tiny_llama), "--dtype", "float32", "--max-new-tokens", "6"]
    assert run([*words, "--json", str(record)]) == 0
    shown = capsys.readouterr()
    found = json.loads(record.read_text())
    assert found["turns"] == 2
    (last,) = found["conversations"].values()
    assert shown.out.count("\n") >= 2
    seen = "".join(letter for letter in last[-1]["content"] if letter >= " ")
    assert shown.out.endswith(seen + "\n")
    assert "new conversation" in shown.err
    assert "new conversation" not in shown.out

    monkeypatch.setattr(sys, "stdin", io.StringIO("/wrong\nThe list\n"))
    assert run([*words, "--json", "-"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["code"] == "unknown_command"
    assert "Traceback" not in shown.err


def test_a_pipe_that_is_no_utf8_is_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(InputError, match="not UTF-8") as error:
        reader(typed=False)()
    assert error.value.where == "standard input"


def test_two_answers_in_a_pipe_are_labelled() -> None:
    out, log = io.StringIO(), io.StringIO()
    view = ChatView(out, log)
    view.begin(["tuned", "base"])
    for side, text in (("tuned", "yes"), ("tuned", " sir"), ("base", "no\n\tno")):
        view.piece(side, text)
    view.end()
    view.say("done")
    assert out.getvalue() == "[tuned] yes sir\n[base] no\n\tno\n"
    assert log.getvalue() == "done\n"


def test_a_models_control_codes_do_not_reach_the_terminal() -> None:
    out = io.StringIO()
    view = ChatView(out, out)
    view.begin(["base"])
    view.piece("base", "a\x1b[2Jb\x07\x9bc\r\n[bold]d[/bold]")
    view.end()
    assert out.getvalue() == "a[2Jbc\n[bold]d[/bold]\n"


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *words: str, columns: int = 80) -> None:
        self.master, slave = pty.openpty()
        import fcntl
        import struct
        import termios

        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        env = os.environ | {"TERM": "xterm", "NO_COLOR": "1", "PYTHONWARNINGS": "ignore"}
        env.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "glasstune", "chat", *words],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=env,
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Reads until the pattern stands in what is new; returns that."""
        end = time.monotonic() + seconds
        start = len(self.text)
        while not re.search(pattern, self.text[start:]):
            assert time.monotonic() < end, self.text
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    break
        return self.text[start:]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def press(self, key: str, pattern: str) -> bool:
        """Presses a key again every few seconds until the pattern stands in what is new."""
        for _ in range(12):
            start = len(self.text)
            self.type(key)
            with contextlib.suppress(AssertionError):
                self.until(pattern, seconds=5)
            if re.search(pattern, self.text[start:]):
                return True
        return False

    def end(self) -> int:
        code = self.process.wait(timeout=60)
        os.close(self.master)
        return code


def test_a_real_terminal(tmp_path: Path) -> None:
    """Prompt, answer, Ctrl-C in an answer too long to wait for, at the prompt, Ctrl-D."""
    model = save_tiny_model(tmp_path, max_position_embeddings=60_000)
    terminal = Terminal(str(model), "--dtype", "float32", "--max-new-tokens", "50000")
    try:
        terminal.until("> ")
        terminal.type("The list\n")
        terminal.until(r"The list\r\n.{8,}")
        terminal.type("\x03")
        terminal.until(r"\(stopped\)\r\n> ")
        # CPython's `input` forgets a signal that comes between its prompt and its wait.
        assert terminal.press("\x03", r"leaves\)\r\n> ")
        terminal.type("/help\n")
        assert "/adapter on|off" in terminal.until("Ctrl-C stops an answer.*\r\n> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
    assert "Traceback" not in terminal.text
