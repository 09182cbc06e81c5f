"""What every page shares: safe, quiet, readable when narrow and when dark, usable by keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest

from browser import Page
from glasstune.reports.web.page import render_page

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><b>&amp;"
FINDINGS = [
    {"code": "a", "severity": severity, "where": HOSTILE, "message": HOSTILE, "fix": "x" * 200}
    for severity in ("info", "warning", "error")
]


def frame(title: str = "A page", data: object = None) -> str:
    return render_page("base.html.j2", kind="test", title=title, findings=FINDINGS, data=data)


def test_hostile_text_stays_text(page: Page) -> None:
    page.open(frame(HOSTILE, {"name": HOSTILE}))
    assert page.one("h1").text == HOSTILE
    assert page.run("return glasstune.data.name") == HOSTILE
    assert page.run("return document.images.length") == 0
    assert page.run("return document.title").startswith(HOSTILE)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_readable_at_any_width_and_in_both_colours(page: Page, width: int, dark: bool) -> None:
    page.open(frame(), width=width, dark=dark)
    assert page.overflow() <= 0
    light = page.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0]")
    assert (int(light) < 60) is dark
    assert page.contrast("body, h1, h2, p, strong, code, span, footer") >= 4.5


def test_the_policy_refuses_what_is_not_the_page_s_own(page: Page) -> None:
    """The policy must hold, or hostile text would have only one wall before it."""
    page.open(frame())
    page.run(
        "const s = document.createElement('script'); s.textContent = 'window.broken = 1';"
        "document.body.append(s);"
        "const i = document.createElement('img'); i.src = 'http://127.0.0.1:9/x.png';"
        "document.body.append(i);"
    )
    assert page.run("return window.broken") is None
    problems = page.problems()
    assert sum("Content Security Policy" in problem for problem in problems) >= 2, problems
    assert "refused: http://127.0.0.1:9/x.png" in problems, "it was not sent"


def test_a_logged_error_and_a_request_are_seen(page: Page, tmp_path: Path) -> None:
    """The watch of every other test must be able to fail."""
    other = tmp_path / "other.js"
    other.write_text("")
    page.open(f"<!doctype html><script src='{other.as_uri()}'></script><script>nope()</script>")
    problems = page.problems()
    assert any("nope is not defined" in problem for problem in problems)
    assert f"request: {other.as_uri()}" in problems


def test_contrast_and_overflow_can_fail(page: Page) -> None:
    page.open(
        "<!doctype html><link rel=icon href=data:,><body style='background:#fff'>"
        "<p style='color:#999;width:900px'>grey</p>",
        width=400,
    )
    assert page.contrast("p") == pytest.approx(2.85, abs=0.02)  # known value of #999 on white
    assert page.overflow() > 400
    page.run("document.querySelector('p').style.background = 'color-mix(in srgb, #999 0%, #fff)'")
    assert page.contrast("p") == pytest.approx(2.85, abs=0.02), "mixed colours are read, too"


def test_tab_reaches_the_skip_link_first(page: Page) -> None:
    page.open(frame())
    page.keys("\ue004")
    assert page.run("return document.activeElement.className") == "skip"
    left = page.run("return document.activeElement.getBoundingClientRect().left")
    assert left >= 0, "it is seen once it has the focus"
