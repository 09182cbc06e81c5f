"""The web page of a gradient audit: `glasstune audit --html` and `report.to_html`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from glasstune.core.gradients import HEALTHY
from glasstune.reports.audit_curves import curves, failures
from glasstune.reports.audit_maps import (
    common_prefix,
    layer_table,
    matrix,
    page_data,
    pairs,
    signed,
)
from glasstune.reports.web.page import render_page

Json = Mapping[str, Any]

SHOWN_PARAMETERS = 8000
"""Parameters that the page holds; beyond it frozen ones are left out first."""

SHOWN_NAMES = 400
"""Names listed under one reason."""

ENGINES = {
    "grad": "one autograd.grad a term",
    "backward": "one backward a term (reentrant checkpointing)",
    "single": "one term: the step's gradient is its own",
    "none": "not split",
    "unknown": "could not be split",
}
STATUSES = {
    "nonfinite": "NaN or Inf",
    "none": "no gradient",
    "not_in_optimizer": "in no optimiser group",
    "zero": "gradient is zero",
    "ok": "ok",
    "frozen": "frozen",
}


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
    parameters = json["parameters"]
    shown = _worth_showing(parameters)
    known = json["engine"] in ("grad", "backward")
    context = {
        "record": json,
        "trained": sum(bool(row["requires_grad"]) for row in parameters),
        "counts": _counts(parameters),
        "terms": _terms(json["terms"], known),
        "facts_list": _facts(json),
        "matrix": matrix(json),
        "pairs": pairs(json),
        "prefix": common_prefix(list(dict.fromkeys(row["layer"] for row in shown))),
        "table": layer_table(json),
        "unhealthy": _reasons(parameters, healthy=False),
        "healthy": _reasons(parameters, healthy=True),
        "left_out": len(parameters) - len(shown),
        "curves": curves(json, history),
        "failures": failures(history),
        "number": number,
        "signed": signed,
        "share_text": share_text,
        "shown_names": SHOWN_NAMES,
    }
    model = PurePath(str(json["model"])).name if json.get("model") else ""
    step = json.get("step")
    named = f"step {step}" if step is not None else "one step"
    return render_page(
        "audit.html.j2",
        kind="gradients",
        title=f"{model}, {named}" if model else f"Gradient audit of {named}",
        findings=json["findings"],
        data=page_data(json, shown, known),
        styles=("audit.css",),
        scripts=("audit_maps.js", "audit.js"),
        context=context,
    )


def number(value: float | None) -> str:
    """Writes a number with four digits; what is not known is a word, never zero."""
    if value is None:
        return "unknown"
    return "0" if value == 0 else f"{value:.4g}"


def share_text(share: float | None) -> str:
    """Writes a share in percent; a small one gets the digits that keep it from reading as zero."""
    if share is None:
        return "unknown"
    size = abs(share) * 100
    digits = 1 if size == 0 or size >= 0.05 else min(6, -math.floor(math.log10(size)))
    return f"{share * 100:.{digits}f}%".replace("-", "\u2212")


def _worth_showing(parameters: Sequence[Json]) -> list[Json]:
    """All parameters, or the trained ones and as many others as fit, in their order."""
    if len(parameters) <= SHOWN_PARAMETERS:
        return list(parameters)
    first = sorted(range(len(parameters)), key=lambda at: parameters[at]["status"] == "frozen")
    return [parameters[at] for at in sorted(first[:SHOWN_PARAMETERS])]


def _counts(parameters: Sequence[Json]) -> list[tuple[str, str, int]]:
    """(status, its words, number of parameters), worst first."""
    found = dict.fromkeys(STATUSES, 0)
    for row in parameters:
        found[row["status"]] = found.get(row["status"], 0) + 1
    return [(status, STATUSES.get(status, status), n) for status, n in found.items() if n]


def _terms(terms: Sequence[Json], known: bool) -> list[dict[str, Any]]:
    """The terms with what each adds to the loss, and the place of its bar of shares."""
    shares = [term["share"] for term in terms if term["share"] is not None]
    low, high = min(0.0, *shares, 0.0), max(1.0, *shares, 1.0)
    found = []
    for term in terms:
        value, weight, share = term["value"], term["weight"], term["share"]
        bar = None
        if share is not None:
            start = (min(share, 0.0) - low) / (high - low)
            bar = {"x": start, "width": abs(share) / (high - low), "zero": -low / (high - low)}
        # The record has no NaN: what was none there is null, and only a loss without number is.
        added = None if value is None or weight is None else value * weight
        found.append(
            {
                **term,
                "value_text": "not finite" if value is None else number(value),
                "weight_text": "not finite" if weight is None else number(weight),
                "added_text": "not finite" if added is None else number(added),
                "norm_text": "not finite" if known and term["norm"] is None
                else number(term["norm"]),
                "share_text": share_text(share),
                "bar": bar,
            }
        )  # fmt: skip
    return found


def _facts(record: Json) -> list[tuple[str, str]]:
    check, cancelled, scale = record["sum_check"], record["cancellation"], record["scale"]
    facts = [
        (
            "self-check: weighted terms against the gradient",
            "not compared" if check is None else f"they differ by {check:.1e} of it",
        ),
        ("cancelled between terms", "unknown" if cancelled is None else f"{cancelled:.1%}"),
        ("split by", ENGINES[record["engine"]]),
    ]
    if scale is not None and abs(scale - 1) > 1e-4:
        facts.append(("the loss was scaled by", number(scale)))
    return facts


def _reasons(parameters: Iterable[Json], *, healthy: bool) -> list[dict[str, Any]]:
    """Parameters that have a reason, those with the same one together."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in parameters:
        reason = row["reason"]
        if reason is None or (reason["code"] in HEALTHY) != healthy:
            continue
        key = (row["status"], reason["code"], reason["module"], reason["line"])
        status = STATUSES.get(row["status"], row["status"])
        group = groups.setdefault(key, {**reason, "status": status, "names": [], "texts": {}})
        group["names"].append(row["name"])
        group["texts"].setdefault(reason["text"], row["name"])
    return list(groups.values())
