"""The page of `glasstune inspect` in Chromium: unfolds, filters, draws its map, takes keys."""

from __future__ import annotations

from typing import Any

import pytest
from inspections import bloom, bloom_record, llama70b_record, mixture, record

from browser import Page
from glasstune.reports.inspect_page import inspect_page

UP, DOWN, LEFT, RIGHT = "\ue013", "\ue015", "\ue012", "\ue014"
HOME, END, ENTER = "\ue011", "\ue010", "\ue007"
ROWS = "#tree-rows tr"


@pytest.fixture(scope="module")
def bloom_page() -> str:
    return inspect_page(bloom_record())


def paths(page: Page) -> list[str]:
    found: list[str] = page.run(
        f"return [...document.querySelectorAll('{ROWS}')].map(r => r.dataset.path)"
    )
    return found


def active(page: Page) -> str:
    return str(page.run("return document.activeElement.dataset.path"))


def choose(page: Page, label: str) -> None:
    next(each for each in page.all("#map-choice label") if each.text == label).click()


def type_filter(page: Page, text: str) -> None:
    box = page.one("#tree-filter")
    box.clear()
    page.run("document.getElementById('live').textContent = ''")
    if text:
        box.send_keys(text)
        page.until("document.getElementById('live').textContent")
    else:
        box.send_keys("x\ue003")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("make", [bloom_record, llama70b_record], ids=["bloom", "llama70b"])
def test_opens_readable(page: Page, make: Any, width: int, dark: bool) -> None:
    page.open(inspect_page(make()), width=width, dark=dark)
    page.screenshot(f"{make.__name__}-{width}-{'dark' if dark else 'light'}")
    assert page.overflow() <= 0
    assert page.contrast(
        "h1, h2, p, th, td, small, code, i, dd, dt, label, button, .line span, .tile, .tile span,"
        "input, summary, pre, .map-head, .map-head span"
    ) >= 4.5  # fmt: skip
    assert len(page.all(".tile")) >= 5
    assert len(paths(page)) > 10
    page.run("document.getElementById('tree-unfold').click()")
    assert page.overflow() <= 0
    wide = page.run(
        "return [...document.querySelectorAll('.tree th, .tree td')]"
        ".filter(cell => cell.scrollWidth > cell.clientWidth).map(cell => cell.textContent)"
    )
    assert wide == [], "no cell runs into its neighbour"


def test_the_tree_folds_equal_blocks_and_shows_the_precisions_side_by_side(
    page: Page, bloom_page: str
) -> None:
    page.open(bloom_page)
    assert page.texts(".tree thead th")[:4] == [
        "Module", "bfloat16", "LLM.int8", "NF4, double quantisation",
    ]  # fmt: skip
    assert paths(page)[0] == ""
    block = page.one(f'{ROWS}[data-path="transformer.h.0-29"]')
    assert "(0-29): 30 x BloomBlock" in block.text
    assert "30 × 157.4 MB" in block.text
    assert "1.22 GB together" in block.text
    row = page.one(f'{ROWS}[data-path="transformer.h.0-29.self_attention.query_key_value"]')
    cells = [cell.text for cell in row.find_elements("css selector", "td")]
    assert cells[0].split("\n")[:2] == ["bfloat16", "39.3 MB"]
    assert cells[1].startswith("→ Linear8bitLt")
    assert cells[2].startswith("→ Linear4bit")
    assert "scales" in cells[2]
    assert "expands to 39.3 MB" in cells[2]
    assert "+ LoRA(r=16)" in cells[3]
    assert "163,840 parameters" in cells[3]
    assert "7680 × 2560" in row.text
    assert "frozen" in row.text
    head = page.one(f'{ROWS}[data-path="lm_head"]')
    assert "stays at 16 bit: the output head stays" in head.text


def test_unfolds_and_folds_with_the_mouse(page: Page, bloom_page: str) -> None:
    page.open(bloom_page)
    page.one("#tree-unfold").click()
    everything = paths(page)
    assert len(everything) == 18  # counted in print(model)
    page.one("#tree-fold").click()
    folded = paths(page)
    assert "transformer.h.0-29" in folded
    assert "transformer.h.0-29.mlp" not in folded
    page.one(f'{ROWS}[data-path="transformer.h.0-29"] code').click()
    assert "transformer.h.0-29.mlp" in paths(page)
    assert active(page) == "transformer.h.0-29"
    page.one(f'{ROWS}[data-path=""] code').click()
    assert paths(page) == [""]
    assert page.one(ROWS).get_attribute("aria-expanded") == "false"


def test_the_tree_takes_keys(page: Page, bloom_page: str) -> None:
    page.open(bloom_page)
    page.one("#tree-fold").click()
    page.run(f"document.querySelector('{ROWS}').focus()")
    page.keys(DOWN)
    assert active(page) == "transformer"
    page.keys(LEFT)
    assert paths(page) == ["", "transformer", "lm_head"]
    page.keys(RIGHT)
    assert "transformer.h" in paths(page)
    page.keys(RIGHT)
    assert active(page) == "transformer.word_embeddings"
    page.keys(LEFT)
    assert active(page) == "transformer"
    page.keys(END)
    assert active(page) == "lm_head"
    page.keys(HOME)
    assert active(page) == ""
    page.keys(ENTER)
    assert paths(page) == [""]
    page.keys(" ")
    assert len(paths(page)) > 1
    # One row alone is in the order of Tab, and what has the focus is outlined.
    assert page.run(f"return document.querySelectorAll('{ROWS}[tabindex=\"0\"]').length") == 1
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize(
    ("query", "found", "hidden"),
    [
        ("lm_head", {"", "lm_head"}, {"transformer"}),
        ("LINEAR4BIT", {"transformer.h.0-29.mlp.dense_h_to_4h"}, {"lm_head", "transformer.ln_f"}),
        ("output head", {"", "lm_head"}, {"transformer"}),
        ("lora", {"transformer.h.0-29.self_attention.dense"}, {"transformer.h.0-29.mlp"}),
        (
            "h.7.mlp.gelu",
            {"transformer.h.0-29.mlp.gelu_impl"},
            {"transformer.h.0-29.self_attention"},
        ),
        ("h.30.mlp", set(), {""}),
        ("nothing like it", set(), {""}),
    ],
)
def test_the_filter_shows_matches_with_their_ancestors(
    page: Page, bloom_page: str, query: str, found: set[str], hidden: set[str]
) -> None:
    page.open(bloom_page)
    page.one("#tree-fold").click()
    type_filter(page, query)
    shown = set(paths(page))
    assert found <= shown
    assert not hidden & shown
    for path in shown:
        assert path.rpartition(".")[0] in shown, "each stands below its parents"
    assert bool(page.all("#tree-none")) is (not found)


def test_emptying_the_filter_brings_the_tree_back(page: Page, bloom_page: str) -> None:
    page.open(bloom_page)
    before = paths(page)
    type_filter(page, "lm_head")
    assert paths(page) == ["", "lm_head"]
    type_filter(page, "")
    page.until(f"document.querySelectorAll('{ROWS}').length === {len(before)}")
    assert paths(page) == before


def test_only_what_stays(page: Page, bloom_page: str) -> None:
    page.open(bloom_page)
    page.one("#tree-stays").click()
    leaves = [path.rpartition(".")[2] for path in paths(page)]
    assert "lm_head" in leaves
    assert "input_layernorm" in leaves
    assert not {"query_key_value", "gelu_impl", "dense"} & set(leaves)
    type_filter(page, "norm")
    assert "lm_head" not in paths(page)
    page.one("#tree-stays").click()
    page.until(f"document.querySelectorAll('{ROWS}').length > 5")


def test_the_map_draws_areas_in_proportion_and_changes_with_the_precision(
    page: Page, bloom_page: str
) -> None:
    page.open(bloom_page)

    def tiles() -> dict[str, tuple[float, str]]:
        found = page.run(
            "return [...document.querySelectorAll('.tile')].map(t => [t.getAttribute('aria-label'),"
            "t.offsetWidth * t.offsetHeight, t.className])"
        )
        return {
            label.split(":")[0].rpartition(".")[2]: (area, style) for label, area, style in found
        }

    four = tiles()
    assert "part-4" in four["dense_h_to_4h"][1]
    assert "part-16" in four["lm_head"][1]
    # 4 : 3 in the same frame; borders and gaps take a little.
    ratio = four["query_key_value"][0] / four["dense"][0]
    assert ratio == pytest.approx(304.8 / 101.6, rel=0.05)
    choose(page, "bfloat16")
    sixteen = tiles()
    assert "part-16" in sixteen["dense_h_to_4h"][1]
    assert sixteen["lm_head"][0] < four["lm_head"][0] / 2
    choose(page, "LLM.int8")
    assert "part-8" in tiles()["dense_h_to_4h"][1]
    assert page.one("#map-area").get_attribute("aria-label") == "Bytes by module, LLM.int8"


def test_the_map_tells_its_numbers_and_leads_to_the_tree(page: Page, bloom_page: str) -> None:
    page.open(bloom_page)
    page.one("#tree-fold").click()
    page.run("document.querySelector('.tile').focus()")
    first = page.one("#map-detail").text
    assert "MB" in first
    page.keys(RIGHT)
    assert page.one("#map-detail").text != first
    page.keys(END)
    words = page.one("#map-detail").text
    page.keys(ENTER)
    assert active(page) == words.split(":")[0]
    assert page.run("return document.activeElement.tagName") == "TR"


def test_the_map_of_a_big_model_has_no_slivers(page: Page) -> None:
    for made in (llama70b_record(), record("moe", "moe", mixture(16, 64))):
        page.open(inspect_page(made), width=400)
        sizes = page.run(
            "return [...document.querySelectorAll('.tile')]"
            ".map(tile => [tile.offsetWidth, tile.offsetHeight])"
        )
        assert 2 <= len(sizes) <= 40
        assert min(min(size) for size in sizes) >= 4


def test_the_layers_with_the_largest_error_come_first(page: Page, bloom_page: str) -> None:
    page.open(bloom_page)
    rows = "#errors tbody tr"
    assert len(page.all(rows)) == 21
    assert "transformer.h.29" in page.texts(rows)[1]
    page.one("#errors-more").click()
    assert len(page.all(rows)) == 61
    assert not page.all("#errors-more")


def test_one_precision_no_adapter_and_no_errors(page: Page) -> None:
    page.open(inspect_page(record("m", "bloom", bloom(3), bits=(16,))))
    assert not page.all("#tree-stays")
    assert not page.all("#errors")
    assert "No adapter" in page.one("#adapter").text
    assert len(page.all("#map-choice label")) == 1


def test_hostile_names_are_inert_everywhere(page: Page) -> None:
    bad = "</script><img src=x onerror=\"document.title='broken'\">"
    made = record(bad, bad, bloom(3), targets=("dense",))
    made.peft_line = made.rule = made.architecture = bad
    made.adapter = {bad: [bad]}
    for value in made.precisions.values():
        value.label += bad
        for row in value.modules:
            row.detail += bad
            row.reason += bad
            row.class_name += bad
    page.open(inspect_page(made))
    page.one("#tree-unfold").click()
    page.run("document.querySelector('.tile').focus()")
    type_filter(page, "onerror")
    assert len(paths(page)) > 5
    assert page.run("return document.images.length") == 0
    assert page.run("return document.title").startswith(bad)
    assert page.one("h1").text == bad


def test_a_tree_that_does_not_fold_stays_usable(page: Page) -> None:
    made = llama70b_record()
    for value in made.precisions.values():
        for index, row in enumerate(value.modules):
            row.transient_bytes = index
    page.open(inspect_page(made))
    page.one("#tree-unfold").click()
    assert len(paths(page)) == len(made.precisions["16"].modules)
    type_filter(page, "layers.77.mlp.up_proj")
    assert paths(page)[-1] == "model.layers.77.mlp.up_proj"
    assert len(paths(page)) == 6


def test_a_record_of_the_real_workflow(page: Page) -> None:
    """A small model, inspected for real: the page and the record agree."""
    from tiny import tiny_config

    from glasstune.workflows.inspect import inspect_model

    made = inspect_model(tiny_config("llama"), target_modules=["q_proj"], r=4).to_dict()
    page.open(inspect_page(made))
    page.one("#tree-unfold").click()
    for value in made["precisions"].values():
        assert f"{value['total_bytes']:,}" in page.one("#sizes").text
    row = page.one(f'{ROWS}[data-path="model.layers.0-1.self_attn.q_proj"]').text
    assert "→ Linear4bit" in row
    assert "+ LoRA(r=4)" in row
    assert made["peft_line"] in page.one("#adapter").text
