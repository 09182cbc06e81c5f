"""The page of a plan, without a browser."""

from __future__ import annotations

import re
from html import unescape

from plans import GIB, hand_plan

from glasstune.reports.plan_page import plan_page


def plain(html: str) -> str:
    body = html[html.index("<body") : html.index('<script type="application/json"')]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_the_numbers_are_those_of_the_record() -> None:
    text = plain(plan_page(hand_plan(measured_peak_bytes=19 * GIB, error=-0.04)))
    for words in (
        "18.2 GiB at the peak, of 22.0 GiB", "19.0 GiB measured the plan is off by -4.0%",
        "52 min 00 s in all", "base 6.0 GiB 32.9%", "activations 9.0 GiB 49.3%",
        "loss head and loss 18.2 GiB · the peak", "layers computed again 12 of 32 (partial)",
        "training.recompute=full", "1 h 05 min", "fsdp2 16.0 GiB", "calibrated on a card",
    ):  # fmt: skip
        assert words in text, words


def test_choices_stand_with_their_reasons() -> None:
    choice = {"name": "training.compile", "value": False, "reason": "of <no> use here"}
    text = plain(plan_page(hand_plan(choices=[choice], rows=1, updates=1)))
    assert "training.compile False of <no> use here" in text
    assert "Chosen by itself" not in plain(plan_page(hand_plan()))
    assert "1 update of 2.5 s" in text
    assert "1 x 2,048 tokens" in text


def test_a_name_cannot_become_markup() -> None:
    page = plan_page(hand_plan(model="<script>alert(1)</script>"))
    assert "<script>alert(1)" not in page


def test_the_page_is_alone() -> None:
    page = plan_page(hand_plan())
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert 'style="' not in page
