"""Folding: what is equal folds, what differs in any column does not, nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from inspections import bloom, bloom_record, mixture, precision, record

from glasstune.core.inspection import LoraOverlay
from glasstune.reports.folding import Child, Node, fold_tree, stays


def rows(specs: list[Any], bits: int) -> list[dict[str, Any]]:
    return [row.to_dict() for row in precision(specs, bits).modules]


def places(node: Node, path: str = "", times: int = 1) -> Iterator[tuple[str, int, Node]]:
    """Every (path with folded names, how often it stands in the model, node)."""
    yield path, times, node
    for child in node.children:
        below = f"{path}.{child.label}" if path else child.label
        yield from places(child.node, below, times * child.count)


def run(node: Node) -> list[str]:
    """The labels below the list of blocks."""
    return [
        child.label for child in next(n for p, _, n in places(node) if p.endswith(".h")).children
    ]


def test_equal_blocks_fold_and_sizes_are_of_the_whole() -> None:
    three = {str(bits): rows(bloom(5), bits) for bits in (16, 8, 4)}
    tree = fold_tree(three)
    assert run(tree) == ["0-4"]
    for key, modules in three.items():
        assert tree.bytes[key] == sum(row["bytes"] for row in modules)
    assert tree.parameters == sum(row["parameters"] for row in three["16"])


def test_every_module_is_there_once() -> None:
    specs = mixture(4, 6)
    tree = fold_tree({"16": rows(specs, 16), "4": rows(specs, 4)})
    assert sum(times for _, times, _ in places(tree)) == len(specs)
    labels = [path for path, _, _ in places(tree)]
    # The last layer has one expert: it does not fold with the others.
    assert "model.layers.0-2.experts.0-5.up" in labels
    assert "model.layers.3.experts.0.up" in labels


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class", "Linear"),
        ("bytes", 1),
        ("parts", {"weights": 1}),
        ("shape", [1, 2]),
        ("reason", "another"),
        ("reason_code", "another"),
        ("trainable", True),
        ("transient_bytes", 5),
        ("detail", "in_features=1"),
        ("lora", {"kind": "lora", "r": 2}),
    ],
)
@pytest.mark.parametrize("key", ["16", "4"])
def test_one_difference_at_one_precision_unfolds(field: str, value: Any, key: str) -> None:
    three = {"16": rows(bloom(6), 16), "4": rows(bloom(6), 4)}
    changed = next(row for row in three[key] if row["path"] == "transformer.h.2.mlp.dense_h_to_4h")
    changed[field] = value if field != "class" else "Other"
    assert run(fold_tree(three)) == ["0-1", "2", "3-5"]


def test_a_reason_that_names_its_module_still_folds() -> None:
    modules = rows(bloom(3), 4)
    for row in modules:
        row["reason"] = f"{row['path']} is what it is"
    assert run(fold_tree({"4": modules})) == ["0-2"]


def test_names_fold_only_when_they_are_consecutive_numbers() -> None:
    def tree(names: list[str]) -> Node:
        leaf = rows(bloom(1), 16)[2]
        root = {**leaf, "path": "", "class": "M", "parameters": 0, "bytes": 0}
        return fold_tree({"16": [root, *({**leaf, "path": name} for name in names)]})

    def labels(names: list[str]) -> list[str]:
        return [child.label for child in tree(names).children]

    assert labels(["q_proj", "o_proj"]) == ["q_proj", "o_proj"]
    assert labels(["0", "1", "3", "4", "x", "5"]) == ["0-1", "3-4", "x", "5"]
    assert labels(["9", "10", "11"]) == ["9-11"]


def test_numbers_in_sizes_are_not_taken_for_the_module_s_name() -> None:
    """Of a live nn.Sequential the paths are `1`, `2`: Linear(11, 1) and Linear(22, 2) differ."""
    root = {**rows(bloom(1), 16)[0], "path": ""}
    leaf = rows(bloom(1), 16)[2]
    sizes = {"1": "in_features=11", "2": "in_features=22"}
    pair = [{**leaf, "path": path, "detail": detail} for path, detail in sizes.items()]
    assert len(fold_tree({"16": [root, *pair]}).children) == 2


def test_a_module_that_one_precision_lacks_is_kept() -> None:
    full, less = rows(bloom(2), 16), rows(bloom(2), 4)
    less = [row for row in less if row["path"] != "transformer.ln_f"]
    tree = fold_tree({"16": full, "4": less})
    node = next(node for path, _, node in places(tree) if path == "transformer.ln_f")
    assert set(node.rows) == {"16"}
    assert tree.bytes["4"] == sum(row["bytes"] for row in less)


def test_equal_subtrees_are_one_object() -> None:
    tree = fold_tree({"16": rows(mixture(30, 32), 16)})
    assert len({id(node) for _, _, node in places(tree)}) < 20


def test_lora_and_what_stays() -> None:
    tree = fold_tree(
        {key: value["modules"] for key, value in bloom_record(4).to_dict()["precisions"].items()}
    )
    found = {path: node for path, _, node in places(tree)}
    dense = found["transformer.h.0-3.self_attention.dense"]
    assert dense.lora is not None
    assert dense.lora["r"] == 16
    assert not stays(dense.rows["4"])
    assert stays(found["lm_head"].rows["4"])
    assert not stays(found["transformer"].rows["4"])
    assert not stays(found["transformer.h.0-3.mlp.gelu_impl"].rows["4"])


def test_an_adapter_on_some_blocks_splits_the_run() -> None:
    made = record("m", "bloom", bloom(6))
    for value in made.precisions.values():
        for row in value.modules:
            if row.path in (
                "transformer.h.4.mlp.dense_h_to_4h",
                "transformer.h.5.mlp.dense_h_to_4h",
            ):
                row.lora = LoraOverlay("lora", 8, 16.0, 10, 40, 40, 80)
    tree = fold_tree({k: v["modules"] for k, v in made.to_dict()["precisions"].items()})
    assert run(tree) == ["0-3", "4-5"]


def test_child_labels() -> None:
    tree = fold_tree({"16": rows(bloom(1), 16)})
    assert Child("3", "3", 1, tree).label == "3"
    assert Child("0", "29", 30, tree).label == "0-29"
