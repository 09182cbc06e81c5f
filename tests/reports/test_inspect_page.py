"""The page of an inspect record, without a browser: its size, data and words."""

from __future__ import annotations

import json
import re
import time
from importlib.resources import files
from typing import Any

from inspections import bloom, bloom_record, llama70b_record, mixture, record

from glasstune.core.findings import Finding
from glasstune.reports.folding import fold_tree
from glasstune.reports.inspect_page import inspect_page
from glasstune.reports.inspect_parts import all_findings, lora_places
from glasstune.reports.numbers import count_text, percent_text, size_text


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.S)
    assert found
    loaded: dict[str, Any] = json.loads(found[1])
    return loaded


def bytes_of(data: dict[str, Any], column: int) -> int:
    """Sums every cell of the data, as often as it stands in the model."""

    def below(index: int) -> int:
        node = data["nodes"][index]
        cell = node["cells"][column] or {}
        return cell.get("bytes", 0) + sum(
            times * below(child) for _, _, times, child in node.get("children", [])
        )

    return below(data["root"])


def test_the_page_s_data_sums_to_the_record_at_every_precision() -> None:
    made = bloom_record()
    data = data_of(inspect_page(made))
    assert [item["key"] for item in data["precisions"]] == ["16", "8", "4"]
    for column, value in enumerate(made.precisions.values()):
        assert bytes_of(data, column) == value.total_bytes
        assert data["nodes"][data["root"]]["bytes"][column] == value.total_bytes


def test_exact_bytes_findings_and_peft_s_line_are_in_the_text() -> None:
    page = inspect_page(bloom_record().to_dict())
    for words in (
        "5,193,134,080", "1,691,761,120", "trainable params: 7,372,800", "int8_checkpointing",
        "NF4, double quantisation", "12.300%", "(0-29): 30 x BloomBlock(",
    ):  # fmt: skip
        assert words in page
    assert page.index("int8_checkpointing") < page.index("Bytes at each precision")


def test_one_finding_of_two_precisions_is_shown_once_with_both() -> None:
    made = record("m", "bloom", bloom(2))
    same = Finding("a", "warning", "w", "m", "f")
    made.precisions["8"].findings = [same]
    made.precisions["4"].findings = [same, Finding("b", "error", "", "m2", "")]
    made.findings = [Finding("c", "info", "", "m3", "")]
    found = all_findings(made.to_dict())
    assert [item["code"] for item in found] == ["b", "a", "c"]
    assert [len(item["labels"]) for item in found] == [1, 2, 0]


def test_lora_is_summed_by_name() -> None:
    made = llama70b_record().to_dict()
    tree = fold_tree({key: value["modules"] for key, value in made["precisions"].items()})
    places = {place.name: place for place in lora_places(tree)}
    assert sum(place.parameters for place in places.values()) == made["trainable_parameters"]
    assert places["q_proj"].count == 80
    assert places["k_proj"].parameters == 80 * 16 * (8192 + 1024)
    assert places["k_proj"].training_bytes == 16 * places["k_proj"].parameters


def test_big_models_make_small_pages_quickly() -> None:
    for made in (llama70b_record(), record("moe", "moe", mixture(32, 64))):
        content = made.to_dict()
        started = time.process_time()
        page = inspect_page(content)
        assert time.process_time() - started < 5
        assert len(page) < 300_000


def test_blocks_that_do_not_fold_still_make_a_page_below_a_megabyte() -> None:
    made = llama70b_record()
    for value in made.precisions.values():
        for index, row in enumerate(value.modules):
            row.transient_bytes = index  # no two modules are equal
    assert len(inspect_page(made)) < 1_500_000


def test_the_files_of_the_pages_are_package_data() -> None:
    folder = files("glasstune.reports.web")
    for name in ("style.css", "script.js", "inspect.css", "inspect.js", "treemap.js"):
        assert folder.joinpath(name).is_file()
    for name in ("base.html.j2", "parts.html.j2", "inspect.html.j2"):
        assert folder.joinpath("templates", name).is_file()


def test_numbers() -> None:
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_949: "999.9 kB", 999_950: "1.0 MB",
             8_660_000: "8.7 MB", 5_700_000_000: "5.70 GB", 9_090_000_000: "9.09 GB"}  # fmt: skip
    assert {value: size_text(value) for value in sizes} == sizes
    counts = {0: "0", 9_999: "9,999", 24_800: "24.8 thousand", 2_560_000: "2.56 million",
              70_553_706_496: "70.55 billion"}  # fmt: skip
    assert {value: count_text(value) for value in counts} == counts
    assert [percent_text(x) for x in (0, 0.0001, 0.094, 0.9999, 1)] == [
        "0.0%", "under 0.1%", "9.4%", "over 99.9%", "100.0%",
    ]  # fmt: skip
