"""What the page of an audit draws by layer: norms, shares, cosines, and each parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from glasstune.core.gradients import cosines

Json = Mapping[str, Any]

_CONFLICT = -1e-6
"""As in the audit: above it is the rounding of gradients that have nothing in common."""


def common_prefix(names: Sequence[str]) -> str:
    """Returns the dotted beginning that all names share, with its dot; empty without one."""
    if len(names) < 2:
        return ""
    shared = []
    for level in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    if all(name.rpartition(".")[2].isdigit() for name in names):
        shared = shared[:-1]  # `layers.0` says more than `0`
    return "".join(f"{part}." for part in shared)


def signed(value: float | None) -> str:
    """Writes a cosine with its sign; what is not known is a word."""
    return "unknown" if value is None else f"{value:+.3f}".replace("-", "\u2212")


def _cosines(gram: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    return cosines([[math.nan if value is None else value for value in row] for row in gram])


def matrix(record: Json) -> list[tuple[str, list[float | None]]]:
    """Rows of the matrix of cosines over all parameters; empty without two terms."""
    gram, terms = record.get("gram") or [], record["terms"]
    if len(terms) < 2 or not gram:
        return []
    return [(term["name"], row) for term, row in zip(terms, _cosines(gram), strict=True)]


def pairs(record: Json) -> list[dict[str, Any]]:
    """Each pair of terms: its cosine, in how many layers they conflict, and where most."""
    whole = matrix(record)
    names = [name for name, _ in whole]
    by_layer = [(layer["layer"], _cosines(layer["gram"])) for layer in record["layers"]]
    found = []
    for b in range(len(names)):
        for a in range(b):
            known = [(value, layer) for layer, row in by_layer if (value := row[a][b]) is not None]
            against = [(value, layer) for value, layer in known if value < _CONFLICT]
            worst: tuple[float | None, str] = min(against) if against else (None, "")
            found.append(
                {
                    "a": names[a],
                    "b": names[b],
                    "cosine": whole[a][1][b],
                    "layers": len(known),
                    "against": len(against),
                    "worst": worst[0],
                    "worst_layer": worst[1],
                }
            )
    return found


def norm_of(layer: Json, term: int) -> float | None:
    """Norm of a term's gradient in a layer; None where it is not finite."""
    square = layer["gram"][term][term]
    return None if square is None or square < 0 else math.sqrt(square)


def layer_table(record: Json) -> list[dict[str, Any]]:
    """The map as text: per layer the (norm, share) of each term, and the cancellation."""
    return [
        {
            "layer": layer["layer"],
            "cells": [
                (norm_of(layer, index), layer["shares"][index])
                for index in range(len(record["terms"]))
            ],
            "cancellation": layer["cancellation"],
        }
        for layer in record["layers"]
    ]


def page_data(record: Json, parameters: Sequence[Json], known: bool) -> dict[str, Any]:
    """What the scripts draw.

    Args:
        record: The audit record.
        parameters: Those that the page holds.
        known: Whether norms by term were measured; then a missing one is not finite.

    Returns:
        `terms`, `layers` (name, norms, shares, cosines), `reasons`, `parameters` with `layer` and
        `reason` as places in `columns` and `reasons`, and gradients as
        `[norm, max_abs, zero_fraction, nan, inf]`. What is None is left out.
    """
    columns = list(dict.fromkeys(row["layer"] for row in parameters))
    place = {name: index for index, name in enumerate(columns)}
    terms = [term["name"] for term in record["terms"]]
    reasons: dict[tuple[Any, ...], int] = {}
    rows = []
    for row in parameters:
        shown: dict[str, Any] = {
            "name": row["name"],
            "layer": place[row["layer"]],
            "status": row["status"],
            "trained": row["requires_grad"],
            "held": row["in_optimizer"],
            "shape": row["shape"],
            "dtype": row["dtype"],
            "texts": row.get("texts") or None,
        }
        for key in ("value", "grad_before", "increment", "grad_after"):
            shown[key] = _summary(row[key])
        if row["requires_grad"]:
            shown["terms"] = [_term(row["terms"].get(name)) for name in terms]
        if (reason := row["reason"]) is not None:
            values = tuple(reason[key] for key in ("code", "text", "module", "line"))
            shown["reason"] = reasons.setdefault(values, len(reasons))
        rows.append({key: value for key, value in shown.items() if value is not None})
    return {
        "terms": terms,
        "known": known,
        "columns": columns,
        "prefix": common_prefix(columns),
        "layers": [
            {
                "layer": layer["layer"],
                "norms": [_short(norm_of(layer, index)) for index in range(len(terms))],
                "shares": [_short(share) for share in layer["shares"]],
                "cosines": [[_short(value) for value in row] for row in _cosines(layer["gram"])],
            }
            for layer in record["layers"]
        ],
        "whole": [[_short(value) for value in row] for _, row in matrix(record)],
        "parameters": rows,
        "reasons": [
            dict(zip(("code", "text", "module", "line"), values, strict=True)) for values in reasons
        ],
    }


def _short(value: float | None) -> float | None:
    """Six digits: more only makes the page long."""
    return None if value is None else float(f"{value:.6g}")


def _summary(summary: Json | None) -> list[Any] | None:
    if summary is None:
        return None
    numbers = [_short(summary[key]) for key in ("norm", "max_abs", "zero_fraction")]
    return [*numbers, summary["nan"], summary["inf"]]


def _term(term: Json | None) -> list[Any]:
    if term is None:
        return ["unknown", None, None]
    return [term["reached"], _short(term["norm"]), _short(term["share"])]
