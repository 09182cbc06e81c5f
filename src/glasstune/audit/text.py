"""An audit as plain text: few lines for a large model, every parameter for a small one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from glasstune.core.errors import InputError
from glasstune.core.gradients import (
    AuditRecord,
    ParameterAudit,
    Reached,
    TensorSummary,
    cosines,
)

SMALL = 40
"""Parameters up to which all of them are listed without being asked for."""
FINDINGS = 20
"""Findings printed; the rest is counted."""


def report_text(record: AuditRecord, *, values: bool, match: str | None, full: bool) -> str:
    """Returns the report; see `AuditReport.text`.

    Raises:
        InputError: `no_match`, `values_not_kept`.
    """
    rows = record.parameters
    if match is not None:
        rows = [row for row in rows if fnmatchcase(row.name, match)]
        if not rows:
            raise InputError(
                "no_match",
                f"no audited parameter is named like {match!r}",
                where="match",
                fix=f"it is a glob over names such as {record.parameters[0].name}",
            )
    if values and not any(row.texts for row in rows):
        raise InputError(
            "values_not_kept",
            "the audit kept no tensors",
            where="values",
            fix='give GradientAudit keep="values" or keep=("gradients", "values")',
        )
    parts = [_head(record)]
    if record.terms:
        parts.append(_terms(record))
    listed = full or match is not None or values or len(rows) <= SMALL
    if listed:
        parts.append(_values(rows) if values else _parameters(rows, record))
    else:
        parts.append(_layers(record))
    reasons = _reasons(rows)
    if reasons:
        parts.append(reasons)
    if record.findings:
        parts.append(_findings(record))
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligns columns: the first `left` to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _head(record: AuditRecord) -> str:
    step = "" if record.step is None else f" of step {record.step}"
    counts: dict[str, int] = {}
    for row in record.parameters:
        counts[row.status] = counts.get(row.status, 0) + 1
    states = ", ".join(f"{number} {status}" for status, number in counts.items())
    lines = [f"Gradient audit{step}: {len(record.parameters)} parameters ({states})"]
    if record.terms:
        if record.sum_check is None:
            lines.append("self-check: not possible here")
        else:
            scale = "" if record.scale in (None, 1.0) else f", loss scaled by {record.scale:.6g}"
            lines.append(f"self-check: |sum of weighted terms - gradient| is {record.sum_check:.1e}"
                         f" of |gradient|{scale}")  # fmt: skip
        if record.cancellation is not None:
            lines.append(f"cancellation between terms: {record.cancellation:.1%}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _terms(record: AuditRecord) -> str:
    trained = sum(row.requires_grad for row in record.parameters)
    names = [term.name for term in record.terms]
    table_of = cosines(record.gram) if record.gram else []
    rows = []
    for index, term in enumerate(record.terms):
        angles = [
            "-" if not table_of else _number(table_of[index][other]) for other in range(len(names))
        ]
        rows.append(
            [
                term.name,
                _number(term.weight),
                _number(term.value),
                _number(term.norm),
                _share(term.share),
                f"{term.reaches}/{trained}",
                *(angles if len(names) > 1 else []),
            ]
        )
    head = ["term", "weight", "value", "norm", "share", "reaches"]
    return table([*head, *(f"cos {name}" for name in names if len(names) > 1)], rows)


def _gradient(value: TensorSummary | None) -> str:
    if value is None:
        return "None"
    if not value.finite:
        return f"{value.nan} NaN, {value.inf} Inf"
    return "zero" if value.zero else f"{value.norm:.3e}"


def _value(value: TensorSummary | None) -> str:
    return "-" if value is None else f"{value.norm:.3e}"


def _parameters(rows: Sequence[ParameterAudit], record: AuditRecord) -> str:
    names = [term.name for term in record.terms]
    lines = [
        [
            row.name,
            "x".join(map(str, row.shape)) or "1",
            row.dtype,
            _value(row.value),
            str(row.requires_grad),
            _gradient(row.grad_before),
            _gradient(row.grad_after),
            _status(row),
            *(_cell(row.terms[name].reached, row.terms[name].norm) for name in names),
        ]
        for row in rows
    ]
    head = ["parameter", "shape", "dtype", "|value|", "requires_grad", "grad before", "grad after"]
    return table([*head, "status", *names], lines)


def _status(row: ParameterAudit) -> str:
    if row.reason is None or row.status in ("frozen", row.reason.code):
        return row.status
    return f"{row.status}: {row.reason.code}"


def _cell(reached: Reached, norm: float | None) -> str:
    if reached is False:
        return "not reached"
    text = _number(norm)
    return f"unknown ({text})" if reached == "unknown" else text


def _values(rows: Sequence[ParameterAudit]) -> str:
    blocks = []
    for row in rows:
        lines = [f"{row.name}  shape {tuple(row.shape)}  {row.dtype}  {_status(row)}"]
        lines.append(f"requires_grad: {row.requires_grad}")
        for title, key in (
            ("value", "value"),
            ("grad before backward", "grad_before"),
            ("grad after backward", "grad_after"),
        ):
            lines.append(f"{title}: {row.texts.get(key, 'not kept')}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _layers(record: AuditRecord) -> str:
    """One line a layer with anything trained; frozen parameters are counted in the head."""
    grams = {layer.layer: layer for layer in record.layers}
    by_layer: dict[str, list[ParameterAudit]] = {}
    for row in record.parameters:
        if row.requires_grad:
            by_layer.setdefault(row.layer, []).append(row)
    names = [term.name for term in record.terms]
    lines = []
    for layer, rows in by_layer.items():
        came = [row.increment.norm for row in rows if row.increment is not None]
        bad = [row for row in rows if row.status != "ok"]
        found = grams.get(layer)
        shares = found.shares if found else [None] * len(names)
        lines.append(
            [
                layer,
                str(len(rows)),
                _number(math.hypot(*came)) if came else "None",
                *(_share(share) for share in shares),
                *([_share(found.cancellation if found else None)] if len(names) > 1 else []),
                _counted(bad),
            ]
        )
    head = ["layer", "trained", "norm", *names]
    return table([*head, *(["cancelled"] if len(names) > 1 else []), "not ok"], lines)


def _counted(rows: Sequence[ParameterAudit]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    return ", ".join(f"{number} {status}" for status, number in counts.items()) or "-"


def _reasons(rows: Sequence[ParameterAudit]) -> str:
    """Each reason once for all parameters with one status, one code and one line."""
    groups: dict[tuple[str, str, str | None], list[ParameterAudit]] = {}
    for row in rows:
        if row.reason is not None and row.status != "frozen":
            key = (row.status, row.reason.code, row.reason.line)
            groups.setdefault(key, []).append(row)
    lines = ["Why:"] if groups else []
    for (status, code, line), members in list(groups.items())[:FINDINGS]:
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        text = members[0].reason.text if members[0].reason else ""
        where = f" [{line}]" if line else ""
        lines.append(f"- {members[0].name}{more}: {status} ({code}): {text}{where}")
    if len(groups) > FINDINGS:
        lines.append(f"- and {len(groups) - FINDINGS} more reasons (see to_dict())")
    return "\n".join(lines)


def _findings(record: AuditRecord) -> str:
    lines = ["Findings:"]
    for finding in record.findings[:FINDINGS]:
        lines.append(f"- {finding.severity}: {finding.message}")
        if finding.fix:
            lines.append(f"  hint: {finding.fix}")
    if len(record.findings) > FINDINGS:
        lines.append(f"- and {len(record.findings) - FINDINGS} more (see to_dict())")
    return "\n".join(lines)
