"""The frame of every page: nothing in a record can break out of it, nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import date
from html.parser import HTMLParser

import pytest

from glasstune.reports.findings import worst_first
from glasstune.reports.web.page import render_page, script_json

HOSTILE = "</script><img src=x onerror=alert(1)><!-- & \u2028"


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text inside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.inside = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in self.raw else ""
        if self.inside:
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.raw[self.inside][-1] += data


def page(**changes: object) -> str:
    options: dict[str, object] = {
        "kind": "test",
        "title": HOSTILE,
        "findings": [
            {"code": "a", "severity": "info", "where": HOSTILE, "message": "m", "fix": ""},
            {"code": "b", "severity": "error", "where": "", "message": HOSTILE, "fix": HOSTILE},
        ],
        "data": {"name": HOSTILE, "value": float("nan")},
        "made": date(2026, 8, 2),
    }
    return render_page("base.html.j2", **{**options, **changes})  # type: ignore[arg-type]


def test_hostile_names_open_no_element() -> None:
    hostile, plain = Elements(page()), Elements(page(title="x", findings=[], data=None))
    assert not [tag for tag, _ in hostile.tags if tag == "img"]
    count = [sum(tag == "script" for tag, _ in page.tags) for page in (hostile, plain)]
    assert count == [2, 2]
    assert all(not name.startswith("on") for _, attrs in hostile.tags for name in attrs)


def test_data_comes_back_as_it_went_in() -> None:
    raw = Elements(page()).raw["script"][0]
    assert "<" not in raw
    assert json.loads(raw) == {"name": HOSTILE, "value": None}
    assert script_json("<>&\u2028\u2029") == r'"\u003c\u003e\u0026\u2028\u2029"'


def test_the_policy_names_the_page_s_own_script_and_style_and_nothing_else() -> None:
    elements = Elements(page())
    policy = next(
        str(attrs["content"])
        for tag, attrs in elements.tags
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for name, text in (
        ("script", elements.raw["script"][1]),
        ("style", elements.raw["style"][0]),
    ):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
    assert set(rules) == {
        "default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"
    }  # fmt: skip


def test_nothing_is_loaded_from_anywhere() -> None:
    text = page()
    for _, attrs in Elements(text).tags:
        assert attrs.get("src") is None
        assert (attrs.get("href") or "#").startswith(("#", "data:"))
        assert "style" not in attrs, "the policy would refuse it"
    assert not re.search(r"url\((?!#)|@import", text)


def test_findings_are_on_top_worst_first_with_their_words() -> None:
    text = page(title="x")
    assert text.index("<code>b</code>") < text.index("<code>a</code>")
    assert re.findall(r'class="severity">(\w+)<', text) == ["error", "info"]
    assert text.count("What to do:") == 1, "an empty fix shows nothing"
    assert "Nothing to report" in page(findings=[])


def test_an_unknown_severity_is_our_fault() -> None:
    with pytest.raises(ValueError, match="fatal"):
        worst_first([{"severity": "fatal"}])


def test_the_footer_has_version_and_date() -> None:
    import glasstune

    assert f"glasstune {glasstune.__version__} · 2026-08-02" in page()
