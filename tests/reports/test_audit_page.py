"""The page of a gradient audit: its numbers are the record's, unknown and None are no zero."""

from __future__ import annotations

import copy
import json
import math
import re
import time
from html import unescape
from itertools import pairwise
from typing import Any

import pytest
import torch
from audits import Net, adapters_record, audited, history, losses

import glasstune as gt
from glasstune.reports import audit_page as module
from glasstune.reports.audit_curves import layer_groups
from glasstune.reports.audit_maps import common_prefix
from glasstune.reports.audit_page import audit_page, number, share_text
from glasstune.reports.charts import Line, line_chart, round_step

HOSTILE = "</script><img src=x onerror=alert(1)>"


def plain(html: str) -> str:
    """The words of the page's body, without its data and scripts."""
    body = html[html.index("<body") : html.index('<script type="application/json"')]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.S)
    assert found
    loaded: dict[str, Any] = json.loads(found[1])
    return loaded


def test_the_numbers_are_those_of_a_plain_autograd() -> None:
    """Against gradients taken by hand from the same model and batch, not against the record."""
    report, batch = audited(), None
    torch.manual_seed(0)
    model = Net()
    batch = torch.randn(3, 4)
    terms = losses(model(batch))
    tensors = [p for name, p in model.named_parameters() if name.startswith("blocks.1.")]
    own = [torch.autograd.grad(loss, tensors, retain_graph=True) for _, loss in terms.values()]
    flat = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in own]).double()
    weights = torch.tensor([weight for weight, _ in terms.values()]).double()
    step = (weights[:, None] * flat).sum(0)
    parts = weights * (flat @ step) / step.square().sum()
    cosine = torch.nn.functional.cosine_similarity(flat[0], flat[2], dim=0)
    layer = data_of(audit_page(report.to_dict()))["layers"][1]
    assert layer["layer"] == "blocks.1"
    assert layer["norms"] == pytest.approx(flat.norm(dim=1).tolist(), rel=1e-5)
    assert layer["shares"] == pytest.approx(parts.tolist(), rel=1e-4)
    assert sum(layer["shares"]) == pytest.approx(1, abs=1e-5)
    assert layer["cosines"][0][2] == pytest.approx(float(cosine), rel=1e-5)
    text = plain(audit_page(report.to_dict()))
    cells = zip(flat.norm(dim=1).tolist(), parts.tolist(), strict=True)
    row = " ".join(f"{number(norm)} {share_text(share)}" for norm, share in cells)
    assert f"blocks.1 {row}" in text


def test_the_terms_with_what_each_adds() -> None:
    record = audited().to_dict()
    text = plain(audit_page(record))
    for term in record["terms"]:
        added = term["weight"] * term["value"]
        numbers = [number(x) for x in (term["weight"], term["value"], added, term["norm"])]
        row = f"{term['name']} {' '.join(numbers)} {term['reaches']} of 8"
        assert f"{row} {share_text(term['share'])}" in text
    assert f"they differ by {record['sum_check']:.1e} of it" in text
    assert f"{record['cancellation']:.1%}" in text
    assert "one autograd.grad a term" in text
    assert text.index("Findings") < text.index("What the step was made of")


def test_every_parameter_before_and_after_is_in_the_data() -> None:
    record = audited().to_dict()
    data = data_of(audit_page(record))
    keys = ("norm", "max_abs", "zero_fraction", "nan", "inf")
    assert len(data["parameters"]) == len(record["parameters"]) == 10
    for shown, row in zip(data["parameters"], record["parameters"], strict=True):
        assert (shown["name"], shown["status"]) == (row["name"], row["status"])
        assert data["columns"][shown["layer"]] == row["layer"]
        assert shown["trained"] is row["requires_grad"]
        for name in ("value", "grad_before", "increment", "grad_after"):
            if row[name] is None:
                assert name not in shown, "None is not there, and no zero"
            else:
                wanted = [row[name][key] for key in keys]
                assert shown[name] == pytest.approx(wanted, rel=1e-5)
        if row["reason"]:
            assert data["reasons"][shown["reason"]] == row["reason"]
        if row["requires_grad"]:
            reached = [term["reached"] for term in row["terms"].values()]
            assert [term[0] for term in shown["terms"]] == reached


def test_reasons_name_module_and_parameters() -> None:
    text = plain(audit_page(audited().to_dict()))
    # The two tensors of each of the two modules that learn nothing.
    assert "2 parameters: no gradient leads_to_no_loss" in text
    assert "2 parameters: no gradient module_not_called" in text
    assert "2 more have none, or a zero one, and that is healthy" in text  # frozen
    assert "cut.weight cut.bias" in text
    assert "module cut at" in text
    assert re.search(r"audits\.py:\d+", text)


def test_unknown_and_not_finite_are_neither_zero_nor_each_other() -> None:
    record = audited().to_dict()
    assert "unknown" not in plain(audit_page(record))[:3000]
    blind = copy.deepcopy(record)
    blind["engine"] = "unknown"
    blind["terms"][0] |= {"norm": None, "share": None}
    blind["sum_check"] = blind["cancellation"] = None
    text = plain(audit_page(blind))
    assert re.search(r"loss0 1 \S+ \S+ unknown 4 of 8 unknown", text)
    assert "not compared" in text
    burnt = copy.deepcopy(record)
    burnt["terms"][0] |= {"norm": None, "share": None, "value": None}
    burnt["layers"][0]["gram"][0][0] = None
    burnt["layers"][0]["shares"] = [None] * 3
    page = audit_page(burnt)
    assert re.search(r"loss0 1 not finite not finite not finite 4 of 8 unknown", plain(page))
    assert "blocks.0 not finite unknown" in plain(page)
    assert data_of(page)["layers"][0]["norms"][0] is None
    assert number(None) == "unknown"
    assert number(0.0) == "0"


def test_a_term_against_the_step_is_hatched() -> None:
    record = audited().to_dict()
    (against,) = [term["name"] for term in record["terms"] if term["share"] < 0]
    rows = audit_page(record).split("<tr>")
    row = next(row for row in rows if f"<code>{against}</code></th>" in row and "meter" in row)
    assert 'class="hatch"' in row
    assert "\u2212" in row
    assert sum('class="against"' in row for row in rows) == 1


def test_without_terms() -> None:
    record = audited().to_dict() | {"terms": [], "layers": [], "gram": [], "sum_check": None}
    record["engine"] = "none"
    for row in record["parameters"]:
        row["terms"] = {}
    text = plain(audit_page(record))
    assert "No terms were named" in text
    assert "Layer by layer" not in text
    assert "Do the terms agree" not in text


def test_one_term_makes_no_matrix() -> None:
    torch.manual_seed(0)
    model = Net()
    with gt.GradientAudit(model) as audit:
        loss = model(torch.randn(3, 4)).square().mean()
        audit.terms({"only": (1.0, loss)})
        loss.backward()
    text = plain(audit_page(audit.report.to_dict()))
    assert "Do the terms agree" not in text
    assert "only 1" in text


def test_hostile_names_stay_text() -> None:
    record = audited(HOSTILE).to_dict() | {"model": HOSTILE}
    record["parameters"][0]["name"] = record["parameters"][0]["layer"] = HOSTILE
    record["parameters"][-1]["reason"] = dict.fromkeys(("code", "text", "module", "line"), HOSTILE)
    record["layers"][0]["layer"] = HOSTILE
    rows = [row | {"layers": {HOSTILE: 1.0}} for row in history() if row["event"] == "norms"]
    rows.append({"event": "failure", "step": 31, "error": HOSTILE, "rows": [HOSTILE]})
    html = audit_page(record, rows)
    assert "<img" not in html
    assert html.count("</script>") == 2


def test_history_gives_curves_and_failures() -> None:
    rows = history()
    rows[3] |= {"norm": None, "nonfinite": 2}
    rows.append({"event": "failure", "step": 31, "error": "loss is NaN", "rows": ["d.jsonl:4"]})
    html = audit_page(audited().to_dict(), rows)
    assert html.count('<svg class="chart"') == 3  # norms; norm and share of the terms
    text = plain(html)
    assert text.count("logarithmic") == 2
    assert f"Updates with NaN or Inf: {rows[3]['step']}." in text
    assert "Update 31 was not finite. loss is NaN \u00b7 rows d.jsonl:4" in text
    assert f"{rows[3]['step']} unknown" in text, "no number is no zero in the table"
    assert '<svg class="chart"' not in audit_page(audited().to_dict(), rows[:1])


def test_the_updates_of_one_audit_make_curves() -> None:
    record = audited().to_dict()
    steps = [{**record, "step": step} for step in (1, 2, 3)]
    assert audit_page({**record, "steps": steps}).count('<svg class="chart"') == 2


def test_a_group_of_layers_has_the_norm_of_its_layers() -> None:
    names = [f"model.layers.{index}" for index in range(32)]
    groups = layer_groups([*names, "lm_head"])
    assert list(groups) == ["layers 0\u20137", "layers 8\u201315", "layers 16\u201323",
                            "layers 24\u201331", "lm_head"]  # fmt: skip
    assert [name for own in groups.values() for name in own] == [*names, "lm_head"]
    assert layer_groups(["a.blocks.4"]) == {"blocks 4": ["a.blocks.4"]}
    many = layer_groups([f"part{k}" for k in range(9)])
    assert list(many)[-1] == "5 others"
    rows = [{"event": "norms", "step": k, "norm": 9.0, "layers": dict.fromkeys(names, 2.0)}
            for k in (1, 2)]  # fmt: skip
    text = plain(audit_page(audited().to_dict(), rows))
    assert f"1 9 {' '.join([number(2 * math.sqrt(8))] * 4)}" in text


def test_a_page_from_the_report(tmp_path) -> None:
    """The audit room draws nothing; who takes the class from the package gets the page."""
    report = audited()
    report.to_html(tmp_path / "audit.html")
    assert data_of((tmp_path / "audit.html").read_text(encoding="utf-8"))["terms"][0] == "loss0"


def test_448_adapters_make_a_small_page_quickly() -> None:
    record = adapters_record()
    assert sum(row["requires_grad"] for row in record["parameters"]) == 448
    started = time.process_time()
    page = audit_page(record)
    assert time.process_time() - started < 3
    assert len(page) < 700_000


def test_trained_parameters_are_kept_where_not_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHOWN_PARAMETERS", 500)
    record = adapters_record()
    page = audit_page(record)
    shown = data_of(page)["parameters"]
    assert len(shown) == 500
    assert sum(row["trained"] for row in shown) == 448
    assert f"{len(record['parameters']) - 500} more parameters" in plain(page)


def test_common_prefix() -> None:
    assert common_prefix(["a.b.layers.0", "a.b.layers.1"]) == "a.b."
    assert common_prefix(["a.b.layers.0", "a.b.norm"]) == "a.b."
    assert common_prefix(["a.b.layers.0", "a.norm"]) == "a."
    assert common_prefix(["layers.0", "layers.1"]) == ""
    assert common_prefix(["layers.0"]) == ""
    assert common_prefix([]) == ""


def test_no_share_reads_as_zero_that_is_none() -> None:
    shares = {0.0: "0.0%", 0.5: "50.0%", -0.0003: "\u22120.03%", 0.0005: "0.1%", 1e-7: "0.00001%"}
    assert {share: share_text(share) for share in shares} == shares
    assert share_text(None) == "unknown"


@pytest.mark.parametrize("log", [False, True])
def test_lines_are_where_their_values_are(log: bool) -> None:
    chart = line_chart(
        [Line("a", [(0, 1.0), (5, 10.0), (10, 100.0)])], title="t", x="x", y="y", log=log
    )
    points = re.search(r'points="([^"]+)"', chart).group(1)
    (_, bottom), (_, middle), (_, top) = (map(float, p.split(",")) for p in points.split())
    share = (bottom - middle) / (bottom - top)
    assert share == pytest.approx(0.5 if log else 9 / 99, abs=0.002)
    ticks = re.findall(r'class="tick end" x="\d+" y="([\d.]+)">([\d.]+)<', chart)
    heights = {float(text): float(y) - 4 for y, text in ticks}
    assert len(heights) >= 3
    at = 10.0 if log else 100.0
    assert heights[at] == pytest.approx(middle if log else top, abs=0.2), "the axis says so, too"


def test_names_of_lines_do_not_cover_each_other() -> None:
    lines = [Line(f"line{k}", [(0, 1.0), (9, 1.0 + k / 1e6)]) for k in range(6)]
    chart = line_chart(lines, title="t", x="x", y="y")
    heights = sorted(float(y) for y in re.findall(r'class="name" x="\d+" y="([\d.]+)"', chart))
    assert all(b - a >= 14.9 for a, b in pairwise(heights))
    assert len(set(re.findall(r'polyline class="line (s\d)"', chart))) == 6


def test_gaps_break_a_line_and_nothing_draws_nothing() -> None:
    broken = line_chart(
        [Line("a", [(0, 1.0), (1, 2.0), (2, None), (3, float("nan")), (4, 1.0), (5, 2.0)])],
        title="t", x="x", y="y",
    )  # fmt: skip
    assert broken.count("<polyline") == 2
    assert line_chart([Line("a", [(0, None)])], title="t", x="x", y="y") == ""
    assert line_chart([Line("a", [(0, 0.0)])], title="t", x="x", y="y", log=True) == ""
    flat = line_chart([Line("a", [(0, 3.0), (1, 3.0)])], title="t", x="x", y="y", log=True)
    assert "nan" not in flat.lower()
    assert [round_step(step) for step in (0.3, 1, 1.1, 4, 60)] == [0.5, 1, 2, 5, 100]
