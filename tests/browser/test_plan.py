"""The page of a plan in Chromium: readable at two widths and in both colours, bars to scale."""

from __future__ import annotations

import pytest
from plans import GIB, hand_plan

from browser import Page
from glasstune.core.plan import PARTS, Alternative
from glasstune.reports.plan_page import plan_page

WIDTHS = (
    "return [...document.querySelectorAll('#peak .stack > .part')]"
    ".map(p => [p.className.baseVal.replace('part ', ''), p.querySelector('.fill')"
    ".getBoundingClientRect().width])"
)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_opens_readable(page: Page, width: int, dark: bool) -> None:
    record = hand_plan(measured_peak_bytes=19 * GIB, error=-0.04)
    page.open(plan_page(record), width=width, dark=dark)
    page.screenshot(f"plan-{width}-{'dark' if dark else 'light'}")
    assert page.overflow() <= 0
    assert page.contrast("h1, h2, p, span, small, strong, b, th, td, code, dd, dt, li") >= 4.5


def test_the_bar_is_to_scale(page: Page) -> None:
    record = hand_plan()
    page.open(plan_page(record))
    whole = page.run("return document.querySelector('#peak .stack').getBoundingClientRect().width")
    drawn = dict(page.run(WIDTHS))
    assert list(drawn) == [name for name in PARTS if record.parts[name]]
    for name, found in drawn.items():
        assert found / whole == pytest.approx(record.parts[name] / (22 * GIB), abs=0.003), name


def test_a_limit_below_the_peak_is_marked(page: Page) -> None:
    page.open(plan_page(hand_plan(limit_bytes=12 * GIB)))
    place = page.run(
        "const box = document.querySelector('#peak .stack').getBoundingClientRect();"
        "const line = document.querySelector('#peak .limit').getBoundingClientRect();"
        "return (line.left - box.left) / box.width"
    )
    peak = hand_plan().peak_bytes
    assert place == pytest.approx(12 * GIB / peak, abs=0.005)


@pytest.mark.parametrize("width", [400, 1280])
def test_a_long_change_stays_in_its_column(page: Page, width: int) -> None:
    change = {"training.per_device_train_batch_size": 1}
    other = Alternative(change, 14 * GIB, 900.0, True, 3.0)
    page.open(plan_page(hand_plan(alternatives=[other])), width=width)
    edges = page.run(
        "const row = document.querySelector('#ways tbody tr');"
        "return [row.querySelector('code').getBoundingClientRect().right,"
        " row.querySelector('th').getBoundingClientRect().right]"
    )
    assert edges[0] <= edges[1]
