"""What float8 products cost each layer, as a short table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from glasstune.reports.numbers import counted, percent_text

Json = Mapping[str, Any]

_WORST = 3
_HEADS = (
    "layers", "number", "output", "worst", "gradient", "worst", "weight", "peak", "outliers",
)  # fmt: skip


def fp8_lines(record: Json) -> list[str]:
    """Returns a report of float8 products, by kind of layer, in plain text.

    Args:
        record: The JSON object of an `Fp8Record`.
    """
    layers: Sequence[Json] = record["layers"]
    how = ", emulated" if record["emulated"] else ""
    lines = [
        f"fp8: relative errors against bfloat16, {counted(record['documents'], 'row')} of "
        f"{counted(record['tokens'], 'token')}{how}; medians and the worst by kind of layer"
    ]
    lines += _table([_HEADS, *(_row(kind, of) for kind, of in _by_kind(layers).items())])
    measured = [layer for layer in layers if layer["output_error"] is not None]
    for layer in sorted(measured, key=_worst, reverse=True)[:_WORST]:
        lines.append(
            f"  {layer['path']}: output {_error(layer['output_error'])}, gradient "
            f"{_error(layer['gradient_error'])}, weight {_error(layer['weight_error'])}"
        )
    kept: Json = record["kept"]
    for path, reason in kept.items():
        lines.append(f"  kept in bfloat16: {path}: {reason}")
    if not kept:
        lines.append(f"  kept in bfloat16: none (an error of {record['limit']:g} would ask for it)")
    for finding in record["findings"]:
        lines.append(f"  {finding['severity']}: {finding['where']}: {finding['message']}")
    return lines


def _by_kind(layers: Sequence[Json]) -> dict[str, list[Json]]:
    kinds: dict[str, list[Json]] = {}
    for layer in layers:
        kinds.setdefault(str(layer["path"]).rsplit(".", 1)[-1], []).append(layer)
    return kinds


def _row(kind: str, layers: Sequence[Json]) -> tuple[str, ...]:
    cells = [kind, str(len(layers))]
    for name in ("output_error", "gradient_error"):
        found = _numbers(layers, name)
        cells += [_error(median(found)), _error(max(found))] if found else ["-", "-"]
    weights = _numbers(layers, "weight_error")
    cells.append(_error(median(weights)) if weights else "-")
    peak = max(float(layer["peak"]) for layer in layers)
    share = max(float(layer["outliers"]) for layer in layers)
    return (*cells, f"{peak:,.0f}", percent_text(share))


def _numbers(layers: Sequence[Json], name: str) -> list[float]:
    return [float(layer[name]) for layer in layers if layer[name] is not None]


def _worst(layer: Json) -> float:
    errors = ("output_error", "row_error", "gradient_error")
    return max(float(layer[name] or 0) for name in errors)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligns columns: the first to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  " + row[0].ljust(widths[0]) + "".join(
            "  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        )
        for row in rows
    ]  # fmt: skip
