"""The web page of a gradient audit: `glasstune audit --html` and `report.to_html`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from glasstune.core.gradients import HEALTHY, cosines
from glasstune.reports.charts import Line, line_chart
from glasstune.reports.web.page import render_page

Json = Mapping[str, Any]

SHOWN_ROWS = 4000
"""Parameters in the table of all; a page of tens of thousands of rows helps nobody."""

LEVELS = 8
"""Steps of colour in a heat map; the number stands in each cell as well."""


def audit_page(record: Any, history: Sequence[Json] = ()) -> str:
    """Renders an audit record as one HTML file.

    Args:
        record: An `AuditRecord`, its JSON object, or that of `glasstune audit` (which may hold
            several updates under `steps`).
        history: Rows of a run's `audit.jsonl`; they become curves.

    Returns:
        The text of the file; it loads nothing else.
    """
    json: Json = record if isinstance(record, Mapping) else record.to_dict()
    terms, parameters = json["terms"], json["parameters"]
    prefix = common_prefix([layer["layer"] for layer in json["layers"]])
    context = {
        "record": json,
        "counts": _counts(parameters),
        "terms": terms,
        "pairs": _matrix([term["name"] for term in terms], json.get("gram") or []),
        "maps": _maps(json),
        "prefix": prefix,
        "unhealthy": _reasons(parameters, healthy=False),
        "healthy": _reasons(parameters, healthy=True),
        "layers": _by_layer(parameters[:SHOWN_ROWS]),
        "left_out": max(0, len(parameters) - SHOWN_ROWS),
        "curves": [*_steps(json.get("steps") or []), *_curves(history)],
        "values": any(row.get("texts") for row in parameters),
        "number": number,
    }
    model = PurePath(json["model"]).name if json.get("model") else ""
    step = json.get("step")
    named = f"step {step}" if step is not None else "one update"
    return render_page(
        "audit.html.j2",
        kind="gradients",
        title=f"{model}, {named}" if model else f"Gradient audit of {named}",
        findings=json["findings"],
        styles=("audit.css",),
        scripts=("audit.js",),
        context=context,
    )


def common_prefix(names: Sequence[str]) -> str:
    """Returns the dotted beginning that all names share, with its dot; empty without one."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    # `layers.0` says more than `0`.
    shared = shared[:-1]
    return "".join(f"{part}." for part in shared) if len(names) > 1 else ""


def number(value: float | None) -> str:
    """Writes a number with three digits; what is not known is a dash, never zero."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.3g}"


def _counts(parameters: Sequence[Json]) -> list[tuple[str, int]]:
    """Status to number of parameters, worst first."""
    order = ("nonfinite", "none", "not_in_optimizer", "zero", "ok", "frozen")
    found = dict.fromkeys(order, 0)
    for row in parameters:
        found[row["status"]] = found.get(row["status"], 0) + 1
    return [(status.replace("_", " "), count) for status, count in found.items() if count]


def _matrix(names: Sequence[str], gram: Sequence[Sequence[float | None]]) -> list[dict[str, Any]]:
    """Rows of the matrix of cosines between terms."""
    if not gram:
        return []
    found = cosines([[_plain(value) for value in row] for row in gram])
    return [
        {"name": name, "cells": [_cosine_cell(value) for value in row]}
        for name, row in zip(names, found, strict=True)
    ]


def _plain(value: float | None) -> float:
    return math.nan if value is None else value


def _cosine_cell(value: float | None) -> dict[str, Any]:
    if value is None:
        return {"text": "unknown", "class": "unknown"}
    level = round(abs(value) * LEVELS)
    return {"text": f"{value:+.3f}", "class": f"{'minus' if value < 0 else 'plus'} l{level}"}


def _maps(record: Json) -> list[dict[str, Any]]:
    """The heat maps: layers down, terms (or pairs of terms) across."""
    layers, names = record["layers"], [term["name"] for term in record["terms"]]
    if not layers or not names:
        return []
    norms = [
        [
            math.sqrt(diagonal) if (diagonal := _plain(layer["gram"][at][at])) >= 0 else None
            for at in range(len(names))
        ]
        for layer in layers
    ]
    maps = [
        {
            "key": "norm",
            "title": "Norm",
            "about": "Norm of each term's own gradient, without its weight. Colour by logarithm, "
            "each term by itself.",
            "names": names,
            "rows": _rows(layers, _norm_cells(norms)),
        },
        {
            "key": "share",
            "title": "Share of the step",
            "about": "What part of the layer's step each weighted term is; a row sums to 100 %. "
            "Hatched: the term works against the step.",
            "names": names,
            "rows": _rows(layers, [[_share_cell(v) for v in layer["shares"]] for layer in layers]),
        },
    ]
    pairs = [(a, b) for a in range(len(names)) for b in range(a)]
    if pairs:
        cells = []
        for layer in layers:
            found = cosines([[_plain(value) for value in row] for row in layer["gram"]])
            cells.append([_cosine_cell(found[a][b]) for a, b in pairs])
        maps.append(
            {
                "key": "cosine",
                "title": "Agreement",
                "about": "Cosine between the gradients of two terms. Hatched: they point apart.",
                "names": [f"{names[b]} · {names[a]}" for a, b in pairs],
                "rows": _rows(layers, cells),
            }
        )
    return maps


def _rows(layers: Sequence[Json], cells: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"layer": layer["layer"], "cells": row} for layer, row in zip(layers, cells, strict=True)
    ]


def _norm_cells(norms: Sequence[Sequence[float | None]]) -> list[list[dict[str, Any]]]:
    """Cells with a level by the logarithm inside their column."""
    columns = list(zip(*norms, strict=True))
    spans = []
    for column in columns:
        logs = [math.log10(value) for value in column if value]
        spans.append((min(logs, default=0.0), max(logs, default=0.0)))
    found = []
    for row in norms:
        cells = []
        for value, (low, high) in zip(row, spans, strict=True):
            if value is None:
                cells.append({"text": "unknown", "class": "unknown"})
            elif value == 0:
                cells.append({"text": "0", "class": "plus l0"})
            else:
                share = (math.log10(value) - low) / (high - low) if high > low else 1.0
                cells.append({"text": number(value), "class": f"plus l{1 + round(share * 7)}"})
        found.append(cells)
    return found


def _share_cell(value: float | None) -> dict[str, Any]:
    if value is None:
        return {"text": "unknown", "class": "unknown"}
    level = min(LEVELS, round(abs(value) * LEVELS))
    return {"text": f"{value:.1%}", "class": f"{'minus' if value < 0 else 'plus'} l{level}"}


def _reasons(parameters: Iterable[Json], *, healthy: bool) -> list[dict[str, Any]]:
    """Parameters that have a reason, those with the same one together."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in parameters:
        reason = row["reason"]
        if reason is None or (reason["code"] in HEALTHY) != healthy:
            continue
        key = (row["status"], reason["code"], reason["module"], reason["line"])
        group = groups.setdefault(key, {**reason, "status": row["status"], "names": []})
        group["names"].append(row["name"])
    return list(groups.values())


def _by_layer(parameters: Iterable[Json]) -> list[dict[str, Any]]:
    """Parameters by layer, with what is worth saying of the whole."""
    groups: dict[str, list[Json]] = {}
    for row in parameters:
        groups.setdefault(row["layer"], []).append(row)
    found = []
    for layer, rows in groups.items():
        increments = [row["increment"]["norm"] for row in rows if row["increment"]]
        bad = sum(row["status"] not in ("ok", "frozen", "zero") for row in rows)
        found.append(
            {
                "layer": layer,
                "rows": rows,
                "trained": sum(bool(row["requires_grad"]) for row in rows),
                "norm": math.hypot(*increments) if increments else None,
                "bad": bad,
            }
        )
    return found


def _steps(steps: Sequence[Json]) -> list[dict[str, Any]]:
    """Curves over the updates of one audit."""
    return _term_curves(steps) if len(steps) > 1 else []


def _term_curves(rows: Sequence[Json]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(term["name"] for row in rows for term in row["terms"]))
    found = []
    for key, title, log in (
        ("norm", "Norm of each term's gradient", True),
        ("share", "Share of the step", False),
    ):
        lines = [
            Line(
                name,
                [
                    (row["step"] or 0, term[key])
                    for row in rows
                    for term in row["terms"]
                    if term["name"] == name
                ],
            )
            for name in names
        ]
        chart = line_chart(lines, title=f"{title}, by update", x="update", y=key, log=log)
        if chart:
            found.append({"title": title, "chart": chart})
    return found


def _curves(history: Sequence[Json]) -> list[dict[str, Any]]:
    """Curves of a training run, from its `audit.jsonl`."""
    norms = [row for row in history if row.get("event") == "norms"]
    audits = [row for row in history if row.get("event") == "audit"]
    found = []
    if len(norms) > 1:
        total = Line("all", [(row["step"], row["norm"]) for row in norms])
        names = list(dict.fromkeys(layer for row in norms for layer in row["layers"]))
        chosen = _spread(names)
        lines = [
            Line(_tail(name), [(row["step"], row["layers"].get(name)) for row in norms])
            for name in chosen
        ]
        chart = line_chart(
            [total, *lines], title="Gradient norms by update", x="update", y="norm", log=True
        )
        about = f"All trained tensors, and {len(chosen)} of {len(names)} layers."
        found.append({"title": "Norms while training", "about": about, "chart": chart})
    if len(audits) > 1:
        found.extend(_term_curves(audits))
    return found


def _spread(names: Sequence[str]) -> list[str]:
    """First, last and three between."""
    if len(names) <= 5:
        return list(names)
    return [names[round(at * (len(names) - 1) / 4)] for at in range(5)]


def _tail(name: str) -> str:
    return name.split("model.")[-1]
