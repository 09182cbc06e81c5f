"""The page of a data check, without a browser: its numbers, its data, its histogram."""

from __future__ import annotations

import json
import re
import time
from html import unescape
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from masks import HOSTILE, by_hand, hand_record, real

from glasstune.data.ledger import histogram as count_lengths
from glasstune.reports import mask_page as module
from glasstune.reports.histogram import histogram
from glasstune.reports.mask_page import mask_page

STATES = {"t": "trained", "c": "context", "s": "special", "p": "padding"}


def plain(html: str) -> str:
    """The words of the page's body, without its data and scripts."""
    body = html[html.index("<body") : html.index('<script type="application/json"')]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.S)
    assert found
    loaded: dict[str, Any] = json.loads(found[1])
    return loaded


def test_the_numbers_are_those_of_the_record() -> None:
    text = plain(mask_page(hand_record(), [by_hand()]))
    for words in (
        "1,234 rows read", "1,201 kept 24 of them held out", "33 dropped", "456,789 tokens",
        "123,456 trained tokens 27.0% of all", "too_long 21", "empty_answer 12",
        "half of the rows up to 311 tokens", "95 of 100 up to 1,402 tokens",
        "longest 2,047 tokens", "answers cut 17", "rows that repeat another 19",
        "first 1,000 990 400,000 100,000 25.0%", "empty 0 0 0 0 –", "Latin 75.0%", "Han 25.0%",
        "truncation drop", "0 to 999 800", "2,000 to 2,999 401", "0123456789abcdef",
        "Row 41 2 documents · 13 tokens · 8 trained (61.5%) · 5 padding",
    ):  # fmt: skip
        assert words in text, words
    assert "bad_json" not in text
    assert text.index("mend") < text.index("told") < text.index("Dropped because")


def test_the_data_gives_every_token_of_a_real_pack_back() -> None:
    record, rows = real()
    page = mask_page(record, rows)
    found = data_of(page)["rows"]
    assert len(found) == len(rows) == 3
    for got, row in zip(found, rows, strict=True):
        assert got["documents"] == json.loads(json.dumps(row["documents"]))
        assert [turn["role"] for turn in got["documents"][0]["turns"]] == ["user", "assistant"]
        assert len(got["documents"]) > 1, "the test has a pack"
        assert got["texts"] == [token["text"] for token in row["tokens"]]
        assert got["ids"] == [token["id"] for token in row["tokens"]]
        assert [STATES[s] for s in got["states"]] == [token["state"] for token in row["tokens"]]
        assert got["special"] == [k for k, token in enumerate(row["tokens"]) if token["special"]]
    assert f"{record['trained_tokens']:,} trained tokens" in plain(page)
    assert "1 dropped" in plain(page)


def test_the_strip_has_each_state_where_it_is() -> None:
    page = mask_page(hand_record(), [by_hand()])
    strip = page[page.index('class="strip"') : page.index('<div class="body">')]
    rects = re.findall(r'<rect class="(\w+)" x="([\d.]+)%" width="([\d.]+)%?"', strip)
    at = [(name, round(float(x) * 18 / 100), round(float(w) * 18 / 100)) for name, x, w in rects]
    assert at[:6] == [
        ("special", 0, 1), ("context", 1, 3), ("trained", 4, 7), ("context", 11, 1),
        ("trained", 12, 1), ("padding", 13, 5),
    ]  # fmt: skip
    assert [(name, x) for name, x, _ in at[6:]] == [("edge", 10)], "one border, before document 2"


def test_hostile_text_stays_text() -> None:
    record = hand_record(
        by_source={HOSTILE: {"rows": 1, "kept": 1, "tokens": 1, "trained_tokens": 1}},
        dropped={HOSTILE: 3},
        scripts={HOSTILE: 1.0},
        policies={HOSTILE: HOSTILE},
        lengths={HOSTILE: 3},
    )
    page = mask_page(record, [by_hand()])
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert data_of(page)["rows"][0]["texts"][11] == HOSTILE


def test_no_rows_and_an_empty_set() -> None:
    nothing = hand_record(
        rows=0, kept=0, dropped={}, tokens=0, trained_tokens=0, by_source={}, scripts={},
        lengths={"p50": 0, "p95": 0, "max": 0}, histogram=[],
    )  # fmt: skip
    text = plain(mask_page(nothing))
    assert "No rows are shown" in text
    assert "every row is kept" in text
    assert '<svg class="chart"' not in mask_page(nothing)


def test_a_record_of_before_is_drawn_without_what_it_lacks() -> None:
    old = {key: value for key, value in hand_record().items() if key in (
        "rows", "kept", "dropped", "tokens", "trained_tokens", "lengths", "by_source", "findings",
    )}  # fmt: skip
    text = plain(mask_page(old, [by_hand()]))
    assert "1,201 kept 33 dropped" in text


def test_long_rows_make_a_page_quickly_and_too_many_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = by_hand()
    token = {"text": " word", "id": 12345, "state": "context", "special": False, "instead": None}
    row["tokens"] = [token | {"state": ("trained", "context")[k // 40 % 2]} for k in range(8192)]
    row["documents"] = [
        {"origin": "a", "source": "b", "start": 0, "end": 8192, "trained": 4096}
    ]  # fmt: skip
    started = time.process_time()
    page = mask_page(hand_record(), [row] * 8)
    assert time.process_time() - started < 5
    assert len(page) < 8 * 8192 * 22
    monkeypatch.setattr(module, "SHOWN_TOKENS", 2 * 8192)
    cut = mask_page(hand_record(), [row] * 8)
    assert len(data_of(cut)["rows"]) == 2
    assert "6 more rows are left out" in plain(cut)


def test_bins_count_every_row_once() -> None:
    lengths = np.random.default_rng(0).integers(7, 5000, 3000).astype(np.int32)
    bins = count_lengths(np.bincount(lengths))
    assert len(bins) <= 40
    widths = {last - first + 1 for first, last, _ in bins}
    assert widths == {200}
    for first, last, rows in bins:
        assert rows == sum(first <= value <= last for value in lengths.tolist())
    assert sum(rows for _, _, rows in bins) == 3000
    assert all(b[0] == a[1] + 1 for a, b in pairwise(bins))
    assert count_lengths(np.zeros(0, dtype=np.int64)) == []
    assert count_lengths(np.bincount([9] * 4)) == [[9, 9, 4]]


def test_bars_of_the_histogram_are_as_high_as_their_rows() -> None:
    chart = histogram([[0, 9, 40], [10, 19, 0], [20, 29, 10]], {"p50": 5, "max": 25})
    bars = re.findall(
        r'class="bin" x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', chart
    )
    (x0, w0, h0), (x1, _, h1) = [tuple(map(float, bar)) for bar in bars]
    assert h0 / h1 == pytest.approx(4, rel=0.01)
    assert (x1 - x0) / (w0 + 1) == pytest.approx(2, rel=0.01)
    assert "0 to 9 tokens: 40 rows" in chart
    marks = [float(x) for x in re.findall(r'class="mark" x1="([\d.]+)"', chart)]
    assert (marks[0] - x0) / (w0 + 1) == pytest.approx(0.5, rel=0.01)
    assert histogram([], {}) == ""
