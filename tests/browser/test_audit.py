"""The page of a gradient audit in Chromium: maps, matrix, filter, table; by mouse and by keys."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from audits import adapters_record, audited, history

from browser import Page
from glasstune.core.gradients import cosines
from glasstune.reports.audit_page import audit_page

UP, DOWN, LEFT, RIGHT = "\ue013", "\ue015", "\ue012", "\ue014"
HOME, END, ENTER = "\ue011", "\ue010", "\ue007"
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    made: dict[str, Any] = audited().to_dict()
    return made


@pytest.fixture(scope="module")
def html(record: dict[str, Any]) -> str:
    return audit_page(record | {"model": "tiny", "bits": 4, "ok": False}, history())


@pytest.fixture(scope="module")
def adapters() -> str:
    return audit_page(adapters_record())


def choose(page: Page, fieldset: str, label: str) -> None:
    next(each for each in page.all(f"{fieldset} label") if each.text.startswith(label)).click()


def cells(page: Page, box: str) -> dict[tuple[int, int], tuple[str, str, str]]:
    """Place to (kind, text, words) of every square of a map."""
    found = page.run(
        "return [...document.querySelectorAll(arguments[0] + ' .cell')].map(c => "
        "[c.place, c.classList[1], c.textContent, c.getAttribute('aria-label')])",
        box,
    )
    return {tuple(place): (kind, text, words) for place, kind, text, words in found}


def shown(page: Page) -> list[str]:
    names: list[str] = page.run(
        "return [...document.querySelectorAll('#rows .parameter')].map(r => r.dataset.name)"
    )
    return names


def row(page: Page, name: str) -> list[str]:
    """The first text of each cell: name, status, requires_grad, value, before, after, terms."""
    found = page.run(
        "return [...[...document.querySelectorAll('#rows .parameter')]"
        ".find(r => r.dataset.name === arguments[0]).cells]"
        ".map(c => c.firstChild?.textContent ?? '')",
        name,
    )
    return list(found)


def type_filter(page: Page, text: str) -> None:
    box = page.one("#row-filter")
    box.clear()
    page.run("document.getElementById('live').textContent = ''")
    box.send_keys(text or "x\ue003")
    page.until("document.getElementById('live').textContent")


def four(value: float) -> float:
    return float(f"{value:.4g}")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("which", ["small", "adapters"])
def test_opens_readable(
    page: Page, html: str, adapters: str, which: str, width: int, dark: bool
) -> None:
    page.open(html if which == "small" else adapters, width=width, dark=dark)
    page.screenshot(f"audit-{which}-{width}-{'dark' if dark else 'light'}")
    words = (
        "h1, h2, h3, p, th, td, small, code, dd, dt, label span, button, summary, strong, input,"
        "select, figure text, .cell, .cell span, .legend span, .told, .failure, .soft"
    )
    assert page.overflow() <= 0
    for name in ("Norm", "Share of the step", "Agreement"):
        choose(page, "#map-choice", name)
        page.until("getComputedStyle(document.querySelector('#map-choice input:checked + span'))"
                   ".fontWeight === '600'")  # fmt: skip
        assert settled_contrast(page, words) >= 4.5, name
        assert page.overflow() <= 0
    page.run("document.getElementById('rows-unfold').click()")
    page.run("document.querySelector('#rows .parameter button').click()")
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.overflow() <= 0
    assert settled_contrast(page, words) >= 4.5


def settled_contrast(page: Page, selector: str) -> float:
    """The contrast once colours have stopped to change."""
    page.until("document.getAnimations().length === 0")
    return page.contrast(selector)


def test_the_map_has_the_numbers_of_the_record(
    page: Page, html: str, record: dict[str, Any]
) -> None:
    page.open(html)
    names = [term["name"] for term in record["terms"]]
    for (r, c), (kind, _, words) in cells(page, "#map-layers").items():
        layer = record["layers"][c]
        norm = layer["gram"][r][r] ** 0.5
        assert kind == "plus"
        assert words.startswith(f"{layer['layer']} \u00b7 {names[r]}: norm ")
        assert float(words.split("norm ")[1].split(",")[0]) == pytest.approx(norm, rel=5e-4)
    choose(page, "#map-choice", "Share")
    for (r, c), (kind, text, words) in cells(page, "#map-layers").items():
        share = record["layers"][c]["shares"][r]
        assert kind == ("minus" if share < 0 else "plus")
        assert text == f"{share * 100:.0f}%".replace("-", "\u2212"), "the sign is no colour"
        assert words.endswith(f"share {share:.1%}".replace("-", "\u2212"))
    hatched = (
        "return getComputedStyle(document.querySelector('#map-layers .minus')).backgroundImage"
    )
    assert "repeating-linear-gradient" in page.run(hatched)
    choose(page, "#map-choice", "Agreement")
    assert page.texts("#map-layers tbody th") == [
        "loss0 \u00b7 loss1", "loss0 \u00b7 loss2", "loss1 \u00b7 loss2",
    ]  # fmt: skip
    table = cosines(record["layers"][1]["gram"])
    value = f"{table[1][2]:+.3f}".replace("-", "\u2212")
    assert cells(page, "#map-layers")[2, 1][2] == f"blocks.1 \u00b7 loss1 and loss2: cosine {value}"


def test_norms_are_coloured_by_logarithm(page: Page, record: dict[str, Any]) -> None:
    changed = copy.deepcopy(record)
    for layer, norms in zip(changed["layers"], [(1.0, 0.0, 1e-2), (1e-4, 1.0, None)], strict=True):
        for at, norm in enumerate(norms):
            layer["gram"][at][at] = None if norm is None else norm * norm
    page.open(audit_page(changed))
    depth = page.run(
        "return Object.fromEntries([...document.querySelectorAll('#map-layers .cell')].map(c => "
        "[c.place.join(), parseFloat(c.style.getPropertyValue('--depth'))]))"
    )
    assert depth["0,0"] == depth["1,1"] == 58
    assert depth["0,1"] < 8
    assert depth["2,0"] == pytest.approx((depth["0,0"] + depth["0,1"]) / 2, abs=1)
    found = cells(page, "#map-layers")
    assert found[1, 0][:2] == ("zero", "0")
    assert found[2, 1][:2] == ("bad", "!")
    assert "not finite" in found[2, 1][2]
    assert [" ".join(text.split()) for text in page.texts("#map-legend > span")] == [
        "0.0001 1 norm, logarithmic", "0 gradient is zero", "! NaN or Inf",
    ]  # fmt: skip


def test_unknown_is_drawn_as_unknown(page: Page, record: dict[str, Any]) -> None:
    blind = copy.deepcopy(record)
    blind["layers"][0]["shares"] = [None, None, None]
    blind["engine"] = "unknown"
    for parameter in blind["parameters"]:
        for term in parameter["terms"].values():
            term |= {"reached": "unknown", "norm": None, "share": None}
    page.open(audit_page(blind))
    choose(page, "#map-choice", "Share")
    found = cells(page, "#map-layers")
    assert found[0, 0][:2] == ("unknown", "?")
    assert found[0, 1][0] == "plus"
    choose(page, "#place-choice", "loss0")
    kinds = {kind for kind, _, _ in cells(page, "#map-places").values()}
    assert kinds == {"unknown"}
    page.one("#rows-unfold").click()
    assert row(page, "blocks.0.weight")[-3:] == ["unknown"] * 3


def test_the_map_takes_keys_and_leads_to_the_table(page: Page, adapters: str) -> None:
    page.open(adapters)
    page.run("document.querySelector('#map-layers .cell').focus()")
    first = page.one("#map-told").text
    assert "model.layers.0 \u00b7 next_token: norm" in first
    page.keys(RIGHT, DOWN)
    assert "model.layers.1 \u00b7 z_loss" in page.one("#map-told").text
    page.keys(END)
    assert "model.layers.31 \u00b7 z_loss" in page.one("#map-told").text
    assert page.run("return document.getElementById('live').textContent") == (
        page.one("#map-told").text
    )
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keys(UP, LEFT, HOME)
    assert page.one("#map-told").text == first
    stops = "return document.querySelectorAll('#map-layers [tabindex=\"0\"]').length"
    assert page.run(stops) == 1
    page.keys(END, ENTER)
    assert page.run("return document.activeElement.textContent") == "model.layers.31"
    assert len(shown(page)) == 14
    page.run("document.querySelector('#map-places .cell').focus()")
    page.keys(DOWN, ENTER)
    assert page.run("return document.activeElement.textContent") == "self_attn.q_proj.lora_B"
    assert page.all("#rows .detail"), "all its numbers are unfolded"


def test_pointing_at_a_square_tells_its_numbers(page: Page, html: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page.open(html)
    square = page.all("#map-places .cell")[0]
    ActionChains(page.driver).move_to_element(square).perform()
    assert page.one("#place-told").text == square.get_attribute("aria-label")


def test_the_map_of_places_tells_none_from_zero(page: Page, html: str, adapters: str) -> None:
    page.open(html)
    found = {words.split(":")[0]: kind for kind, _, words in cells(page, "#map-places").values()}
    assert found == {
        "blocks.0 \u00b7 weight": "plus", "blocks.0 \u00b7 bias": "plus",
        "blocks.1 \u00b7 weight": "plus", "blocks.1 \u00b7 bias": "plus",
        "cut \u00b7 weight": "none", "cut \u00b7 bias": "none",
        "unused \u00b7 weight": "none", "unused \u00b7 bias": "none",
    }  # fmt: skip
    assert "\u00d7 no gradient" in " ".join(page.one("#place-legend").text.split())
    choose(page, "#place-choice", "loss1")
    assert cells(page, "#map-places")[0, 2][:2] == ("unreached", "\u00b7")
    page.open(adapters)
    kinds = {}
    for kind, _, words in cells(page, "#map-places").values():
        kinds.setdefault(words.split(" \u00b7 ")[1].split(":")[0].rpartition(".")[2], set()).add(
            kind
        )
    assert kinds == {"lora_A": {"zero"}, "lora_B": {"plus"}}, "A is zero while B is"


def test_the_matrix_of_one_layer(page: Page, html: str, record: dict[str, Any]) -> None:
    from selenium.webdriver.support.ui import Select

    page.open(html)

    def matrix() -> list[str]:
        return page.texts("#matrix tbody td")

    def wanted(gram: Any) -> list[str]:
        table = cosines(gram)
        return [f"{value:+.3f}".replace("-", "\u2212") for line in table for value in line]

    assert matrix() == wanted(record["gram"])
    for index, layer in enumerate(record["layers"]):
        Select(page.one("#matrix-layer")).select_by_value(str(index))
        assert matrix() == wanted(layer["gram"])
    against = page.run("return document.querySelectorAll('#matrix .minus').length")
    assert against == sum(text.startswith("\u2212") for text in matrix()) > 0
    Select(page.one("#matrix-layer")).select_by_value("")
    assert matrix() == wanted(record["gram"])


def test_the_table_has_the_numbers_before_and_after(
    page: Page, html: str, record: dict[str, Any]
) -> None:
    page.open(html)
    page.one("#rows-unfold").click()
    choose(page, "#row-choice", "all")
    assert shown(page) == [parameter["name"] for parameter in record["parameters"]]
    for parameter in record["parameters"]:
        found = row(page, parameter["name"])
        assert found[2] == str(parameter["requires_grad"])
        value, before, after = found[3:6]
        assert float(value) == four(parameter["value"]["norm"])
        for text, gradient in (
            (before, parameter["grad_before"]),
            (after, parameter["grad_after"]),
        ):
            if gradient is None:
                assert text == "None"
            else:
                assert float(text) == pytest.approx(gradient["norm"], rel=1e-3)
    assert "not reached" in row(page, "cut.weight")


def test_filter_by_name_status_and_reason(page: Page, html: str) -> None:
    page.open(html)
    choose(page, "#row-choice", "all (10)")
    type_filter(page, "blocks.1")
    assert shown(page) == ["blocks.1.weight", "blocks.1.bias"]
    type_filter(page, "FROZEN")
    assert shown(page) == ["frozen.weight", "frozen.bias"]
    type_filter(page, "never called")
    assert shown(page) == ["unused.weight", "unused.bias"]
    choose(page, "#row-choice", "what needs a look (4)")
    assert shown(page) == ["unused.weight", "unused.bias"]
    type_filter(page, "blocks")
    assert page.texts("#rows-none") == ["No parameter matches."]
    type_filter(page, "")
    page.until("document.getElementById('live').textContent === '4 parameters match'")
    assert shown(page) == ["cut.weight", "cut.bias", "unused.weight", "unused.bias"]
    choose(page, "#row-choice", "trained (8)")
    page.one("#rows-fold").click()
    assert shown(page) == []
    assert len(page.all("#rows .layer")) == 4


def test_layers_with_a_fault_stand_open_and_healthy_ones_do_not(
    page: Page, html: str, adapters: str
) -> None:
    page.open(html)
    assert shown(page) == ["cut.weight", "cut.bias", "unused.weight", "unused.bias"]
    assert [each.text for each in page.all("#rows .layer.bad th")] == ["cut", "unused"]
    page.open(adapters)
    assert shown(page) == [], "A is zero at step 0, and that is healthy"
    assert len(page.all("#rows .layer")) == 32
    assert "7 gradient is zero \u00b7 7 ok" in page.texts("#rows .layer")[0]
    assert "gradient norm" in page.texts("#rows .layer")[0]
    assert "Every trained parameter got a gradient" in page.one("#reasons").text


def test_a_layer_and_a_parameter_unfold_by_keys(page: Page, html: str) -> None:
    page.open(html)
    page.run("document.querySelector('#rows .layer button').focus()")
    page.keys(ENTER)
    assert shown(page)[:2] == ["blocks.0.weight", "blocks.0.bias"]
    assert page.run("return document.activeElement.getAttribute('aria-expanded')") == "true"
    page.keys("\ue004", ENTER)  # Tab to the first parameter
    detail = page.one("#rows .detail").text
    for words in ("blocks.0.weight", "in the optimiser", "added by the backward", "largest"):
        assert words in detail
    page.keys(ENTER)
    assert page.all("#rows .detail") == []
    assert page.run("return document.activeElement.textContent") == "weight"


def test_values_that_were_kept_are_shown(page: Page, record: dict[str, Any]) -> None:
    kept = copy.deepcopy(record)
    kept["parameters"][0]["texts"] = {"value": f"tensor([1.25]) {HOSTILE}"}
    page.open(audit_page(kept))
    page.one("#rows-unfold").click()
    page.all("#rows .parameter button")[0].click()
    assert page.one("#rows .detail pre").text == f"value = tensor([1.25]) {HOSTILE}"


def test_448_adapters_stay_usable(page: Page, adapters: str) -> None:
    page.open(adapters, width=400)
    spent = page.run(
        "const start = performance.now();"
        "document.getElementById('rows-unfold').click();"
        "document.querySelectorAll('#place-choice input')[1].click();"
        "document.body.getBoundingClientRect();"
        "return performance.now() - start;"
    )
    assert spent < 3000
    assert len(shown(page)) == 448
    assert len(cells(page, "#map-places")) == 448
    type_filter(page, "layers.17.mlp.up_proj.lora_b")
    (name,) = shown(page)
    assert name.endswith("layers.17.mlp.up_proj.lora_B.default.weight")
    labels = page.texts("#map-places tbody th")
    assert len(set(labels)) == len(labels) == 14, "also on a narrow screen"


def test_curves_are_told_apart_without_colour(page: Page, html: str) -> None:
    page.open(html)
    assert len(page.all(".chart")) == 3
    for chart in page.all(".chart"):
        dashes = page.run(
            "return [...arguments[0].querySelectorAll('polyline')]"
            ".map(line => getComputedStyle(line).strokeDasharray)",
            chart,
        )
        assert len(set(dashes)) == len(dashes) >= 3
        names = page.run(
            "return [...arguments[0].querySelectorAll('.name')].map(t => t.textContent)", chart
        )
        assert len(names) == len(dashes), "each has its name at its end"


def test_without_scripts_the_numbers_stand_there(page: Page, html: str) -> None:
    page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.open(html)
    finally:
        page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "This table needs JavaScript" in page.one("#parameters").text
    assert page.texts("#matrix tbody td")[0] == "+1.000"
    assert not page.all("#row-filter")


def test_hostile_names_are_inert(page: Page) -> None:
    bad = audited(HOSTILE).to_dict() | {"model": HOSTILE}
    for parameter in bad["parameters"]:
        parameter["name"] += HOSTILE
        parameter["layer"] += HOSTILE
        parameter["dtype"] = HOSTILE
        if parameter["reason"]:
            parameter["reason"] = dict.fromkeys(("code", "text", "module", "line"), HOSTILE)
    for layer in bad["layers"]:
        layer["layer"] += HOSTILE
    rows = [{"event": "failure", "step": 1, "error": HOSTILE, "rows": [HOSTILE]}, *history()]
    page.open(audit_page(bad, rows))
    for fieldset in ("#map-choice", "#place-choice", "#row-choice"):
        for label in page.all(f"{fieldset} label"):
            label.click()
    page.one("#rows-unfold").click()
    page.run("document.querySelectorAll('#rows .parameter button')[0].click()")
    page.run("document.querySelector('#map-places .cell').focus()")
    assert HOSTILE in page.one("#place-told").text
    type_filter(page, "onerror")
    assert len(shown(page)) == 10
    assert page.run("return document.images.length") == 0
    assert page.run("return document.title") != "broken"
