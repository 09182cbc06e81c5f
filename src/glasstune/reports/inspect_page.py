"""The web page of an inspect record: `glasstune inspect --html` and `Inspection.to_html`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glasstune.core.units import format_seconds
from glasstune.reports.folding import Node, fold_tree, quantised, stays
from glasstune.reports.inspect_parts import PARTS, all_findings, lora_places
from glasstune.reports.inspect_text import lora_text, tree_lines
from glasstune.reports.numbers import UNITS, percent_text, size_text
from glasstune.reports.web.page import render_page

Json = Mapping[str, Any]

SHOWN_ERRORS = 200
"""Layers in the table of errors; a page of thousands of rows helps nobody."""

SHOWN_LINES = 2000
"""Lines of the tree as text."""

SOURCES = {
    "config": "a config",
    "folder": "a folder",
    "hub": "the config of a hub id",
    "gguf": "the header of a GGUF file",
    "run": "a run folder",
    "adapter": "an adapter's folder",
    "module": "a module in memory",
}


def inspect_page(record: Any) -> str:
    """Renders an inspect record as one HTML file.

    Args:
        record: An `InspectRecord`, or its JSON object.

    Returns:
        The text of the file; it loads nothing else.
    """
    json: Json = record if isinstance(record, Mapping) else record.to_dict()
    precisions: Mapping[str, Json] = json["precisions"]
    tree = fold_tree({key: value["modules"] for key, value in precisions.items()})
    context = {
        "record": json,
        "units": UNITS,
        "sizes": [_sizes(value, _widest(precisions)) for value in precisions.values()],
        "parts": [
            part
            for part in PARTS
            if any(part[0] in p["bytes_by_part"] for p in precisions.values())
        ],
        "parameters": tree.parameters,
        "run": _first_run(tree),
        "lora": lora_places(tree),
        "errors": _errors(json.get("error")),
        "texts": [(value["label"], _text(value)) for value in precisions.values()],
        "options": _options(json.get("adapter")),
        "source_words": SOURCES.get(json["source"], json["source"]),
    }
    return render_page(
        "inspect.html.j2",
        kind="inspect",
        title=str(json["model"]),
        findings=all_findings(json),
        data=page_data(json, tree),
        styles=("inspect.css",),
        scripts=("treemap.js", "inspect.js"),
        context=context,
    )


def _text(precision: Json) -> str:
    """Returns the tree as text, cut where a page would get slow."""
    lines = tree_lines(precision)
    if len(lines) > SHOWN_LINES:
        lines = [*lines[:SHOWN_LINES], f"... and {len(lines) - SHOWN_LINES:,} more lines"]
    return "\n".join(lines)


def _first_run(node: Node) -> str:
    """Returns the label of the first folded run, as `0-29`; empty where nothing folds."""
    for child in node.children:
        label = child.label if child.count > 1 else _first_run(child.node)
        if label:
            return label
    return ""


def _options(adapter: Json | None) -> list[tuple[str, str]]:
    """Returns the adapter's options as pairs of words."""
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
        for name, value in (adapter or {}).items()
    ]


def _widest(precisions: Mapping[str, Json]) -> int:
    return max((value["total_bytes"] for value in precisions.values()), default=0) or 1


def _sizes(precision: Json, widest: int) -> dict[str, Any]:
    """Returns what the section on sizes shows of one precision."""
    total = precision["total_bytes"]
    bars = []
    for name, style, short, about in PARTS:
        size = precision["bytes_by_part"].get(name, 0)
        if size:
            words = f"{short} ({about}): {size_text(size)}, {percent_text(size / total)}"
            bars.append((style, f"{short} {size_text(size)}", size / widest, words))
    spoken = "; ".join(bar[3] for bar in bars)
    return {
        **precision,
        "bars": bars,
        "spoken": f"{precision['label']}: {size_text(total)}. {spoken}",
        "share": total / widest,
    }


def _errors(error: Json | None) -> dict[str, Any] | None:
    """Returns the table of quantisation errors: names of columns, rows, how many are left out."""
    if error is None:
        return None
    layers = error["layers"]
    kinds = list(error["mean"]) or sorted({kind for layer in layers for kind in layer["errors"]})
    largest = max((value for layer in layers for value in layer["errors"].values()), default=0.0)
    return {
        "kinds": kinds,
        "layers": layers[:SHOWN_ERRORS],
        "left_out": max(0, len(layers) - SHOWN_ERRORS),
        "largest": largest or 1.0,
        "names": {"8": "8 bit", "nf4": "NF4", "fp4": "FP4", "nf4_double": "NF4 double"},
        "mean": error["mean"],
        "source": error["source"],
        "seconds": format_seconds(error["seconds"]),
    }


def page_data(record: Json, tree: Node) -> dict[str, Any]:
    """Returns what the scripts draw: every different module once.

    Args:
        record: The record.
        tree: Its folded tree.

    Returns:
        `precisions` (key, bits, label, total), `nodes` (see `_Nodes`), `root`.
    """
    keys = list(record["precisions"])
    nodes = _Nodes(keys)
    root = nodes.index(tree)
    return {
        "precisions": [
            {
                "key": key,
                "bits": value["bits"],
                "label": value["label"],
                "total": value["total_bytes"],
            }
            for key, value in record["precisions"].items()
        ],
        "nodes": nodes.nodes,
        "root": root,
    }


class _Nodes:
    """Numbers the different nodes of a tree.

    A node is `{class, detail, shape, parameters, own, trainable, tied, bytes: [by precision, with
    all below], cells: [by precision], lora, stays, children: [[name, last, count, node]]}`.
    """

    def __init__(self, precisions: list[str]) -> None:
        self.precisions = precisions
        self.nodes: list[dict[str, Any]] = []
        self.seen: dict[int, int] = {}

    def index(self, node: Node) -> int:
        """Returns the number of a node; children have smaller ones."""
        if id(node) not in self.seen:
            children = [
                [child.name, child.last, child.count, self.index(child.node)]
                for child in node.children
            ]
            self.seen[id(node)] = len(self.nodes)
            self.nodes.append(self._shown(node, children))
        return self.seen[id(node)]

    def _shown(self, node: Node, children: list[Any]) -> dict[str, Any]:
        row = node.row
        lora = node.lora
        shown = {
            "class": row["original_class"],
            "detail": row["detail"],
            "shape": row["shape"],
            "parameters": node.parameters,
            "own": row["parameters"],
            "trainable": any(item["trainable"] for item in node.rows.values()),
            "tied": row["tied_to"],
            "bytes": [node.bytes.get(key, 0) for key in self.precisions],
            "cells": [self._cell(node.rows.get(key)) for key in self.precisions],
            "lora": {**lora, "text": lora_text(lora)} if lora else None,
            "stays": any(
                stays(node.rows[key]) for key in self.precisions if key in node.rows and key != "16"
            ),
            "children": children,
        }
        return {name: value for name, value in shown.items() if value not in (None, "", [], False)}

    def _cell(self, row: Json | None) -> dict[str, Any] | None:
        if row is None:
            return None
        cell = {
            "class": row["class"],
            "dtype": row["dtype"],
            "bytes": row["bytes"],
            "parts": {name: size for name, size in row["parts"].items() if size},
            "transient": row["transient_bytes"],
            "reason": row["reason"],
            "code": row["reason_code"],
            "quantised": quantised(row),
        }
        return {name: value for name, value in cell.items() if value not in ("", 0, {}, False)}
