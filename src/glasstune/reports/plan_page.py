"""The web page of a plan, `glasstune plan --html`: the peak as a picture, then the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glasstune.core.plan import PARTS
from glasstune.core.units import format_bytes, format_seconds
from glasstune.reports.numbers import counted, percent_text
from glasstune.reports.plan_text import ABOUT, PHASES, layers_text
from glasstune.reports.web.page import render_page

Json = Mapping[str, Any]

NAMED_FROM = 0.14
"""Share of the bar from which a part has its name inside it."""


def plan_page(record: Any) -> str:
    """Renders a plan record as one HTML file.

    Args:
        record: A `PlanRecord`, or its JSON object.

    Returns:
        The text of the file; it loads nothing else.
    """
    json: Json = record if isinstance(record, Mapping) else record.to_dict()
    whole = max(
        [json["limit_bytes"], json["peak_bytes"], json.get("measured_peak_bytes") or 0, 1]
        + [moment["bytes"] for moment in json["moments"]]
    )
    measured = json.get("measured_peak_bytes")
    context = {
        "record": json,
        "totals": _totals(json),
        "bar": _bar(json["parts"], whole),
        "spoken": _spoken(json["parts"], json["peak_bytes"]),
        "whole": format_bytes(whole),
        "limit": json["limit_bytes"] / whole,
        "measured": None if not measured else measured / whole,
        "parts": [
            (name, ABOUT[name], format_bytes(json["parts"].get(name, 0)),
             percent_text(json["parts"].get(name, 0) / max(1, json["peak_bytes"])))
            for name in PARTS
        ],
        "moments": [
            {
                "phase": PHASES.get(moment["phase"], moment["phase"]),
                "where": moment["where"],
                "size": format_bytes(moment["bytes"]),
                "peak": moment["phase"] == json["phase"],
                "bar": _bar(moment["parts"], whole),
                "spoken": _spoken(moment["parts"], moment["bytes"]),
            }
            for moment in json["moments"]
        ],
        "facts_list": _facts(json),
        "alternatives": [
            {
                "change": ", ".join(f"{key}={value}" for key, value in item["change"].items()),
                "size": format_bytes(item["peak_bytes"]),
                "share": min(1.0, item["peak_bytes"] / whole),
                "seconds": format_seconds(item["total_seconds"]),
                "fits": item["fits"],
            }
            for item in json["alternatives"]
        ],
        "several": [
            (item["devices"], item["strategy"], format_bytes(item["peak_bytes"]))
            for item in json["several"]
        ],
        "choices": [
            (item["name"], str(item["value"]), item["reason"]) for item in json.get("choices", ())
        ],
        "basis": list(json["basis_of"].items()),
    }  # fmt: skip
    return render_page(
        "plan.html.j2",
        kind="plan",
        title=str(json["model"]),
        findings=json["findings"],
        data={"kind": "plan"},
        styles=("plan.css",),
        context=context,
    )


def _totals(json: Json) -> list[tuple[str, str, str]]:
    limit = format_bytes(json["limit_bytes"])
    found = [
        (format_bytes(json["peak_bytes"]), f"at the peak, of {limit}", json["limit_reason"]),
        (format_seconds(json["total_seconds"]), "in all",
         f"{counted(json['updates'], 'update')} of {format_seconds(json['seconds_per_update'])}, "
         f"{json['basis']}"),
        (format_bytes(json["disk_bytes"]), "on disk", "checkpoints and adapter"),
    ]  # fmt: skip
    if json.get("measured_peak_bytes"):
        size = format_bytes(json["measured_peak_bytes"])
        found.insert(1, (size, "measured", f"the plan is off by {json['error']:+.1%}"))
    return found


def _bar(parts: Mapping[str, int], whole: int) -> list[tuple[str, float, float, str, bool]]:
    """Returns (part, start, share, words, whether its name fits) of each part that is there."""
    found, start = [], 0.0
    for name in PARTS:
        size = parts.get(name, 0)
        if size <= 0:
            continue
        share = size / whole
        words = f"{name}: {format_bytes(size)}"
        found.append((name, start, share, words, share >= NAMED_FROM))
        start += share
    return found


def _spoken(parts: Mapping[str, int], total: int) -> str:
    inside = ", ".join(f"{name} {format_bytes(parts[name])}" for name in PARTS if parts.get(name))
    return f"{format_bytes(total)}: {inside}"


def _facts(json: Json) -> list[tuple[str, str]]:
    fetched = json["download_bytes"]
    recomputed = f"{json['recompute_layers']} of {json['layers']} ({json['recompute']})"
    return [
        ("base", f"{json['bits']} bit"),
        ("device", str(json["device"])),
        ("layers computed again", recomputed),
        ("kept by each layer", layers_text(json.get("layer_bytes", ())) or "not known"),
        ("largest batch", f"{json['rows']} x {counted(json['length'], 'token')}"),
        ("trained in it", f"{json['trained_tokens']:,}"),
        ("speed", f"{json['tokens_per_second']:,.0f} tokens/s"),
        ("evaluations", format_seconds(json["evaluation_seconds"])),
        ("download", "not known" if fetched is None else format_bytes(fetched)),
        ("pinned host memory", format_bytes(json["host_bytes"])),
    ]
