import io
import re

from glasstune.reports.terminal import RichProgress, console_for, show_fields


def test_plain_output_has_lines_and_no_escapes():
    file = io.StringIO()
    progress = RichProgress(file, every=0.0)
    assert not progress.live
    progress.start("train", 4, "updates")
    progress.advance("train", 1, loss=2.5, tokens_per_second=1840.2)
    progress.advance("train", 1, loss=2.25)
    progress.say("[bold]kept as it is[/bold] :smile:")
    progress.finish("train")
    lines = file.getvalue().splitlines()
    assert re.fullmatch(r"train: 1/4 updates · loss 2.5000 · 1,840 tokens/s · .* left", lines[0])
    assert lines[2] == "[bold]kept as it is[/bold] :smile:"
    assert re.fullmatch(r"train: 2 updates in .* s · loss 2.2500 · 1,840 tokens/s", lines[-1])
    assert "\x1b" not in file.getvalue()


def test_plain_output_is_not_a_line_an_update():
    file = io.StringIO()
    progress = RichProgress(file, every=1000.0)
    progress.start("train", 500, "updates")
    for _ in range(500):
        progress.advance("train", 1, loss=1.0)
    progress.finish("train")
    assert file.getvalue() == ""


def test_time_left_does_not_count_what_a_resumed_run_has_behind_it(monkeypatch):
    now = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr("glasstune.reports.terminal.time.monotonic", lambda: next(now))
    file = io.StringIO()
    progress = RichProgress(file, every=5.0)
    progress.start("train", 100, "updates")
    progress.advance("train", 90)
    progress.advance("train", 1, loss=1.0)
    assert file.getvalue().splitlines()[-1].endswith("· 1 min 30 s left")


def test_live_bars_show_values_and_can_nest():
    file = io.StringIO()
    progress = RichProgress(file, live=True, every=0.0)
    progress.start("train", 3, "updates")
    progress.advance("train", 1, loss=2.125)
    progress.start("evaluate", None, "rows")
    progress.advance("evaluate", 5)
    progress.finish("evaluate")
    progress.say("step 1: held-out loss 2.0")
    progress.advance("train", 2, loss=1.0)
    progress.finish("train")
    text = file.getvalue()
    assert "step 1: held-out loss 2.0" in text
    assert "train: 3 updates in" in text
    assert "loss 1.0000" in text


def test_unknown_tasks_and_double_finish_do_nothing():
    for live in (True, False):
        progress = RichProgress(io.StringIO(), live=live)
        progress.advance("never", 1)
        progress.finish("never")
        progress.start("a", 1, "x")
        progress.start("a", 2, "x")
        progress.close()
        progress.finish("a")


def test_fields_in_words():
    assert show_fields({"loss": 0.5, "tokens_per_second": 12.4, "lr": "2e-4"}) == (
        "loss 0.5000 · 12 tokens/s · lr 2e-4"
    )


def test_a_console_without_a_terminal_does_not_break_lines(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    stream = io.StringIO()
    console_for(stream).print("x" * 110)
    assert stream.getvalue() == "x" * 110 + "\n"
