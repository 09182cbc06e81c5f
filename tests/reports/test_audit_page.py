"""The page of a gradient audit: its numbers are the record's, unknown and None are no zero."""

from __future__ import annotations

import copy
import re
from html import unescape

import pytest
from audits import audited, history

from glasstune.reports.audit_page import audit_page, common_prefix, number
from glasstune.reports.charts import Line, line_chart


def plain(html: str) -> str:
    """The words of the page's body, without its data and scripts."""
    body = html[html.index("<body") : html.index('<script type="application/json"')]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_the_numbers_are_those_of_the_record() -> None:
    record = audited().to_dict()
    text = plain(audit_page(record))
    for term in record["terms"]:
        row = f"{term['name']} {number(term['weight'])} {number(term['value'])}"
        assert f"{row} {number(term['norm'])} {term['share']:.1%} {term['reaches']}" in text
    first = next(row for row in record["parameters"] if row["name"] == "blocks.0.weight")
    assert f"max {number(first['grad_after']['max_abs'])}" in text
    layer = record["layers"][0]
    for at, share in enumerate(layer["shares"]):
        assert f"{share:.1%}" in text
        assert number(layer["gram"][at][at] ** 0.5) in text


def test_reasons_name_module_and_parameters() -> None:
    text = plain(audit_page(audited().to_dict()))
    # The two tensors of each of the two modules that learn nothing.
    assert "2 parameters: none leads_to_no_loss" in text
    assert "2 parameters: none module_not_called" in text
    assert "2 more have none or a zero one, and that is healthy" in text  # frozen
    assert "cut.weight" in text


def test_none_is_not_zero_and_unknown_is_neither() -> None:
    record = audited().to_dict()
    html = audit_page(record)
    cut = html[html.index('data-name="cut.weight"') :]
    assert '<td class="number nothing">None</td>' in cut[: cut.index("</tr>")]
    blind = copy.deepcopy(record)
    blind["layers"][0]["gram"] = [[None] * 3] * 3
    blind["layers"][0]["shares"] = [None] * 3
    assert '<td class="unknown">unknown</td>' in audit_page(blind)
    assert '<td class="unknown">unknown</td>' not in html
    assert number(None) == "–"
    assert number(0.0) == "0"


def test_a_term_against_the_step_is_hatched() -> None:
    html = audit_page(audited().to_dict())
    share = html[html.index('data-map="share"') : html.index('data-map="cosine"')]
    assert re.search(r'<td class="minus l\d">-\d', share)


def test_without_terms() -> None:
    record = audited().to_dict() | {"terms": [], "layers": [], "gram": [], "sum_check": None}
    for row in record["parameters"]:
        row["terms"] = {}
    text = plain(audit_page(record))
    assert "No terms were named" in text
    assert "Layer by layer" not in text


def test_hostile_names_stay_text() -> None:
    name = "</script><img src=x onerror=alert(1)>"
    html = audit_page(audited(name).to_dict())
    assert "<img" not in html
    assert html.count("</script>") == 2


def test_history_gives_curves() -> None:
    rows = history()
    html = audit_page(audited().to_dict(), rows)
    assert html.count('<svg class="chart"') == 3  # norms; norm and share of the terms
    assert plain(html).count("logarithmic") == 2
    assert '<svg class="chart"' not in audit_page(audited().to_dict(), rows[:1])


def test_a_page_from_the_report(tmp_path) -> None:
    report = audited()
    report.to_html(tmp_path / "audit.html")
    assert "loss0" in (tmp_path / "audit.html").read_text(encoding="utf-8")


def test_common_prefix() -> None:
    assert common_prefix(["a.b.layers.0", "a.b.layers.1"]) == "a.b."
    assert common_prefix(["a.b.layers.0", "a.norm"]) == ""
    assert common_prefix(["layers.0"]) == ""
    assert common_prefix([]) == ""


@pytest.mark.parametrize("log", [False, True])
def test_lines_are_where_their_values_are(log: bool) -> None:
    chart = line_chart(
        [Line("a", [(0, 1.0), (5, 10.0), (10, 100.0)])], title="t", x="x", y="y", log=log
    )
    points = re.search(r'points="([^"]+)"', chart).group(1)
    (_, bottom), (_, middle), (_, top) = (map(float, p.split(",")) for p in points.split())
    share = (bottom - middle) / (bottom - top)
    assert share == pytest.approx(0.5 if log else 9 / 99, abs=0.002)


def test_gaps_break_a_line_and_nothing_draws_nothing() -> None:
    broken = line_chart(
        [Line("a", [(0, 1.0), (1, 2.0), (2, None), (3, float("nan")), (4, 1.0), (5, 2.0)])],
        title="t", x="x", y="y",
    )  # fmt: skip
    assert broken.count("<polyline") == 2
    assert line_chart([Line("a", [(0, None)])], title="t", x="x", y="y") == ""
    assert line_chart([Line("a", [(0, 0.0)])], title="t", x="x", y="y", log=True) == ""
    assert "NaN" not in line_chart([Line("a", [(0, 3.0), (1, 3.0)])], title="t", x="x", y="y")
