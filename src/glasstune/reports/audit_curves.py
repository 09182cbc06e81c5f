"""Curves over the updates: from a run's `audit.jsonl`, or from the updates of one audit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glasstune.reports.charts import Line, line_chart

Json = Mapping[str, Any]

_GROUPS = 4
"""Groups that numbered layers are put into; more lines than that are hard to tell apart."""
_LINES = 6
_ROWS = 250
"""Rows of the table below a chart."""


def curves(record: Json, history: Sequence[Json]) -> list[dict[str, Any]]:
    """Returns the charts, each with title, a line about it and its numbers as a table.

    Args:
        record: The audit record; its `steps` are drawn where there is no history of audits.
        history: Rows of `audit.jsonl`.
    """
    norms = [row for row in history if row.get("event") == "norms"]
    audits = [row for row in history if row.get("event") == "audit" and row["terms"]]
    if len(audits) < 2:
        audits = list(record.get("steps") or [])
    found = [_norms(norms)] if len(norms) > 1 else []
    if len(audits) > 1:
        found.append(_by_term(audits, "norm", "Norm of each term's gradient", log=True))
        found.append(_by_term(audits, "share", "Share of the step by term", log=False))
    return [curve for curve in found if curve["chart"]]


def failures(history: Sequence[Json]) -> list[Json]:
    """Returns the updates that were not finite."""
    return [row for row in history if row.get("event") == "failure"]


def _norms(rows: Sequence[Json]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for row in rows for name in row["layers"]))
    groups = layer_groups(names)
    lines = [Line("all", [(row["step"], row["norm"]) for row in rows])]
    for title, members in groups.items():
        lines.append(Line(title, [(row["step"], _together(row, members)) for row in rows]))
    remarks = []
    for key, words in (
        ("nonfinite", "with NaN or Inf"),
        ("none", "where tensors had no gradient"),
    ):
        steps = [row["step"] for row in rows if row.get(key)]
        if steps:
            shown = ", ".join(f"{step:,}" for step in steps[:8])
            more = f" and {len(steps) - 8:,} more" if len(steps) > 8 else ""
            remarks.append(f"Updates {words}: {shown}{more}.")
    about = "Of all trained tensors, and of groups of layers, before clipping."
    return _curve("Norms while training", " ".join([about, *remarks]), lines, "norm", log=True)


def _together(row: Json, members: Sequence[str]) -> float | None:
    """Norm over some layers; None where one is not finite or none had a gradient."""
    values = [row["layers"][name] for name in members if name in row["layers"]]
    if not values or any(value is None for value in values):
        return None
    return math.hypot(*values)


def layer_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Puts layers into a few groups: numbered ones by their place, others one by one.

    Args:
        names: Layers as `model.layers.3` or `lm_head`.

    Returns:
        Title (`layers 0-7`) to its layers.
    """
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(re.sub(r"\.\d+$", "", name), []).append(name)
    room = max(1, _GROUPS // max(1, sum(len(m) > 1 for m in families.values())))
    groups: dict[str, list[str]] = {}
    for stem, members in families.items():
        title = stem.rpartition(".")[2]
        parts = min(room, len(members)) if len(members) > 1 else 1
        for part in range(parts):
            own = members[part * len(members) // parts : (part + 1) * len(members) // parts]
            first, last = (name.rpartition(".")[2] for name in (own[0], own[-1]))
            label = title
            if first.isdigit():
                label += f" {first}" if len(own) == 1 else f" {first}\u2013{last}"
            while label in groups:
                label += "\u2032"
            groups[label] = own
    if len(groups) > _LINES - 1:  # the rest stays one line
        kept = dict(list(groups.items())[: _LINES - 2])
        rest = [name for own in list(groups.values())[_LINES - 2 :] for name in own]
        return {**kept, f"{len(rest)} others": rest}
    return groups


def _by_term(rows: Sequence[Json], key: str, title: str, *, log: bool) -> dict[str, Any]:
    names = list(dict.fromkeys(term["name"] for row in rows for term in row["terms"]))
    lines = []
    for name in names:
        points = []
        for row in rows:
            values = [term[key] for term in row["terms"] if term["name"] == name]
            points.append((row["step"] or 0, values[0] if values else None))
        lines.append(Line(name, points))
    about = "Without its weight." if key == "norm" else "The shares of an update sum to 1."
    return _curve(title, about, lines, key, log=log)


def _curve(title: str, about: str, lines: Sequence[Line], key: str, *, log: bool) -> dict[str, Any]:
    chart = line_chart(lines, title=f"{title}, by update", x="update", y=key, log=log)
    steps = [at for at, _ in lines[0].points]
    every = max(1, math.ceil(len(steps) / _ROWS))
    rows = [
        (steps[at], [line.points[at][1] for line in lines]) for at in range(0, len(steps), every)
    ]
    return {
        "title": title,
        "about": about,
        "chart": chart,
        "names": [line.name for line in lines],
        "rows": rows,
        "every": every,
    }
