"""The report of an audit: the record with its ways out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from glasstune.audit.text import report_text
from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.core.gradients import AuditRecord, LayerAudit, ParameterAudit, TermAudit, cosines


class AuditReport:
    """What an audit found; prints as a table.

    Args:
        record: The record.
    """

    html: ClassVar[Callable[[Mapping[str, Any]], str] | None] = None
    """Makes a page of `to_dict()`; set by whoever can draw one."""

    def __init__(self, record: AuditRecord) -> None:
        self.record = record

    @property
    def terms(self) -> list[TermAudit]:
        """The terms, in the order given."""
        return self.record.terms

    @property
    def parameters(self) -> list[ParameterAudit]:
        """The parameters, in the order of `named_parameters`."""
        return self.record.parameters

    @property
    def layers(self) -> list[LayerAudit]:
        """The layers."""
        return self.record.layers

    @property
    def findings(self) -> list[Finding]:
        """What needs looking at, worst first."""
        return self.record.findings

    @property
    def sum_check(self) -> float | None:
        """‖Σ w_i g_i - increment‖ / ‖increment‖."""
        return self.record.sum_check

    def __getitem__(self, name: str) -> ParameterAudit:
        """The row of a parameter.

        Raises:
            InputError: `unknown_parameter`.
        """
        for row in self.record.parameters:
            if row.name == name:
                return row
        raise unknown("parameter", name, [row.name for row in self.record.parameters])

    def cosines(self, layer: str | None = None) -> list[list[float | None]]:
        """Cosine of each pair of terms, K x K, of one layer or (None) of all parameters.

        Raises:
            InputError: `unknown_layer`.
        """
        if layer is None:
            return cosines(self.record.gram)
        for found in self.record.layers:
            if found.layer == layer:
                return cosines(found.gram)
        raise unknown("layer", layer, [found.layer for found in self.record.layers])

    def to_dict(self) -> dict[str, Any]:
        """Returns the audit record of the contract."""
        return self.record.to_dict()

    def to_frame(self) -> Any:
        """Returns a pandas DataFrame with one row a parameter.

        Raises:
            InputError: `missing_package`: pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            raise InputError(
                "missing_package",
                "to_frame needs pandas, which is not installed",
                where="to_frame",
                fix="pip install pandas, or use to_dict()",
            ) from error
        return pandas.DataFrame([_flat(row) for row in self.record.parameters])

    def to_html(self, path: str | Path) -> None:
        """Writes a page.

        Raises:
            InputError: `not_built`: nothing that draws a page is there.
        """
        draw = type(self).html
        if draw is None:
            raise InputError(
                "not_built",
                "the page of an audit is not built yet",
                where=str(path),
                fix="print the report, or use to_dict()",
            )
        Path(path).write_text(draw(self.to_dict()), encoding="utf-8")

    def text(self, *, values: bool = False, match: str | None = None, full: bool = False) -> str:
        """Returns the report as plain text.

        Args:
            values: Print the tensors too (kept with `keep="values"`).
            match: Glob of parameter names; these are listed one by one.
            full: List every parameter, also of a large model.

        Raises:
            InputError: `no_match`, `values_not_kept`.
        """
        return report_text(self.record, values=values, match=match, full=full)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return (
            f"AuditReport({len(self.parameters)} parameters, {len(self.terms)} terms, "
            f"{len(self.findings)} findings)"
        )


def unknown(kind: str, name: str, known: list[str]) -> InputError:
    """The error for a name that is not there; names the nearest one that is."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1, cutoff=0.4)
    listed = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    return InputError(
        f"unknown_{kind}",
        f"the audit has no {kind} {name!r}",
        where=name,
        fix=f"did you mean {near[0]}?" if near else f"known: {listed or 'none'}",
    )


def _flat(row: ParameterAudit) -> dict[str, Any]:
    flat: dict[str, Any] = {
        "name": row.name,
        "layer": row.layer,
        "shape": tuple(row.shape),
        "dtype": row.dtype,
        "requires_grad": row.requires_grad,
        "in_optimizer": row.in_optimizer,
        "status": row.status,
        "reason": row.reason.code if row.reason else None,
        "module": row.reason.module if row.reason else None,
        "line": row.reason.line if row.reason else None,
    }
    for column in ("value", "grad_before", "increment", "grad_after"):
        found = getattr(row, column)
        for part in ("norm", "max_abs", "zero_fraction", "nan", "inf"):
            flat[f"{column}.{part}"] = None if found is None else getattr(found, part)
    for name, term in row.terms.items():
        flat[f"{name}.reached"] = term.reached
        flat[f"{name}.norm"] = term.norm
        flat[f"{name}.share"] = term.share
    return flat
