"""The page of a gradient audit in Chromium: maps change, the filter finds, all is readable."""

from __future__ import annotations

import pytest
from audits import audited, history

from browser import Page
from glasstune.reports.audit_page import audit_page


@pytest.fixture(scope="module")
def html() -> str:
    return audit_page(audited().to_dict() | {"model": "tiny", "bits": 4}, history())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_opens_readable(page: Page, html: str, width: int, dark: bool) -> None:
    page.open(html, width=width, dark=dark)
    page.one("#rows-unfold").click()
    page.screenshot(f"audit-{width}-{'dark' if dark else 'light'}")
    assert page.overflow() <= 0
    assert page.contrast(
        "h1, h2, h3, p, th, td, small, code, dd, dt, label, button, summary, summary span, li,"
        "strong, input, .heat td"
    ) >= 4.5  # fmt: skip
    for map_name in ("Share of the step", "Agreement"):
        next(each for each in page.all("#map-choice label") if each.text == map_name).click()
        assert page.contrast(".heat td") >= 4.5
    assert len(page.all(".chart")) == 3


def test_one_map_at_a_time_by_keys(page: Page, html: str) -> None:
    page.open(html)
    assert [each.get_attribute("data-map") for each in page.all(".one-map")] == ["norm"]
    page.run("document.querySelector('#map-choice input').focus()")
    page.keys("\ue014")  # right
    assert [each.get_attribute("data-map") for each in page.all(".one-map")] == ["share"]
    page.keys("\ue014")
    assert [each.get_attribute("data-map") for each in page.all(".one-map")] == ["cosine"]


def names(page: Page) -> list[str]:
    page.one("#rows-unfold").click()
    return [row.get_attribute("data-name") for row in page.all(".layer tbody tr")]


def test_filter_by_name_and_status(page: Page, html: str) -> None:
    page.open(html)
    assert len(names(page)) == 10
    box = page.one("#row-filter")
    box.send_keys("blocks.1")
    page.until("document.getElementById('live').textContent === '2 parameters match'")
    assert [row.get_attribute("data-name") for row in page.all(".layer tbody tr")] == [
        "blocks.1.weight", "blocks.1.bias",
    ]  # fmt: skip
    box.clear()
    box.send_keys("none")
    page.until("document.getElementById('live').textContent === '4 parameters match'")
    box.clear()
    box.send_keys("frozen")
    page.until("document.getElementById('live').textContent === '2 parameters match'")
    page.one("#only-trained").click()
    assert page.texts("#rows-none") == ["No parameter matches."]
    box.clear()
    box.send_keys("x\ue003")
    page.until("document.getElementById('live').textContent === '8 parameters match'")


def test_layers_with_a_fault_stand_open(page: Page, html: str) -> None:
    page.open(html)
    opened = page.all("details.layer[open] > summary code")
    assert [each.text for each in opened] == ["cut", "unused"]
    page.one("#rows-fold").click()
    assert page.all("details.layer[open]") == []


def test_hostile_names_are_inert(page: Page) -> None:
    page.open(audit_page(audited("</script><img src=x onerror=alert(1)>").to_dict()))
    assert page.all("img") == []
    assert "onerror" in page.one("#terms").text
