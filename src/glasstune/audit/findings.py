"""What of an audit needs looking at, in few lines, worst first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glasstune.audit.finite import Bracket, whole_story
from glasstune.core.findings import Finding, Severity
from glasstune.core.gradients import AuditRecord, ParameterAudit

_INFO = frozenset({"consumed", "no_backward", "unknown", "untouched_adapter"})
_WARNING = frozenset(
    {
        "adapter_disabled",
        "adapter_inactive",
        "adapter_merged",
        "calls_not_seen",
        "inside_compiled_region",
        "inside_reentrant_checkpoint",
        "module_not_called",
        "terms_cancel",
        "zero_gradient",
    }
)
_FIX = {
    "both_zero": "initialise one of the two away from zero",
    "detached": "look for detach, argmax, item or an integer cast before that module",
    "frozen_at_call": "set requires_grad before the forward",
    "leads_to_no_loss": "use that output in a loss, or freeze what only serves it",
    "module_not_called": "freeze it, or call it",
    "no_grad": "move the call out of torch.no_grad()",
    "inference_mode": "move the call out of torch.inference_mode()",
    "not_a_leaf": "make it an nn.Parameter of its own",
    "not_in_optimizer": "add it to a group of the optimiser",
    "replaced": "replace parameters before the forward, and rebuild the optimiser",
}
_RANK = {"error": 0, "warning": 1, "info": 2}


@dataclass(slots=True)
class Facts:
    """What is not in the record itself.

    Args:
        forward: First output that is not finite, where anything went wrong.
        backward: First gradient of an output that is not finite.
        arrivals: First parameter whose gradient is not finite.
        strangers: Tensors of the optimiser that the model does not hold.
        tolerance: Largest healthy error of the self-check.
        notes: Why terms could not be split.
        losses: Values of each term, one a call.
        compiled: Whether there is a compiled region.
        reentrant: Whether there is reentrant checkpointing.
    """

    forward: Bracket | None
    backward: Bracket | None
    arrivals: Bracket | None
    strangers: int
    tolerance: float
    notes: Mapping[str, str]
    losses: Mapping[str, Sequence[float]]
    compiled: bool
    reentrant: bool


WORTH_SAYING = 0.005
"""Share below which a term that works against the step is not worth a line."""


def all_findings(record: AuditRecord, facts: Facts) -> list[Finding]:
    """Returns every finding of an audit, errors first."""
    found = [
        *_of_losses(record, facts),
        *whole_story(facts.forward, facts.backward, facts.arrivals),
        *_of_parameters(record.parameters),
        *_of_terms(record),
        *_of_the_sum(record, facts),
        *_of_the_engine(record, facts),
    ]
    return sorted(found, key=lambda finding: _RANK[finding.severity])


def _of_losses(record: AuditRecord, facts: Facts) -> list[Finding]:
    found = []
    for term in record.terms:
        bad = [value for value in facts.losses[term.name] if not math.isfinite(value)]
        if bad:
            found.append(
                Finding(
                    "loss_not_finite",
                    "error",
                    term.name,
                    f"loss term {term.name!r} is {bad[0]}",
                    "drop the step, and look at its rows",
                )
            )
        if not math.isfinite(term.weight):
            found.append(
                Finding(
                    "weight_not_finite",
                    "error",
                    term.name,
                    f"the weight of loss term {term.name!r} is {term.weight}",
                    "bound it",
                )
            )
    return found


def _of_parameters(rows: Sequence[ParameterAudit]) -> list[Finding]:
    """One finding for all parameters with one status, one code and one line."""
    groups: dict[tuple[str, str, str | None], list[ParameterAudit]] = {}
    for row in rows:
        if row.reason is not None and row.status not in ("frozen", "nonfinite"):
            key = (row.status, row.reason.code, row.reason.line)
            groups.setdefault(key, []).append(row)
    found = [_group(code, status, members) for (status, code, _), members in groups.items()]
    if rows and not any(row.requires_grad for row in rows):
        found.append(
            Finding(
                "nothing_trained", "error", "", "no parameter requires a gradient",
                "set requires_grad on what is to be trained",
            )
        )  # fmt: skip
    return found


def _group(code: str, status: str, members: list[ParameterAudit]) -> Finding:
    first = members[0]
    assert first.reason is not None
    severity: Severity = "error"
    if first.reason.healthy or code in _INFO:
        severity = "info"
    elif code in _WARNING:
        severity = "warning"
    state = {
        "none": "no gradient",
        "zero": "a gradient of exactly zero",
        "not_in_optimizer": "a gradient that no optimiser uses",
    }[status]
    if len(members) == 1:
        text = f"{first.name} has {state}: {first.reason.text}"
    else:
        more = f" and {len(members) - 3} more" if len(members) > 3 else ""
        names = ", ".join(row.name for row in members[:3])
        text = f"{len(members)} parameters have {state} ({names}{more}): {first.reason.text}"
    where = first.reason.line or first.reason.module or first.name
    return Finding(code, severity, where, text, _FIX.get(code, ""))


def _of_terms(record: AuditRecord) -> list[Finding]:
    found = []
    for term in record.terms:
        at = [row.terms[term.name].reached for row in record.parameters if row.requires_grad]
        if at and not any(at):
            found.append(
                Finding(
                    "term_reaches_nothing",
                    "error",
                    term.name,
                    f"loss term {term.name!r} leads to none of the {len(at)} trained parameters",
                    "compute it from the model's output with gradients on",
                )
            )
        if term.weight == 0:
            text = f"loss term {term.name!r} has the weight 0, so it gives zeros, not None"
            found.append(Finding("term_weight_zero", "info", term.name, text))
        if term.share is not None and term.share < -WORTH_SAYING:
            text = f"loss term {term.name!r} works against the step: its share is {term.share:.1%}"
            found.append(Finding("term_against_step", "info", term.name, text))
    for pair in record.conflicts:
        text = f"the gradients of {pair.a!r} and {pair.b!r} point apart: cosine {pair.cosine:.3f}"
        found.append(Finding("terms_conflict", "info", f"{pair.a}, {pair.b}", text))
    return found


def _of_the_sum(record: AuditRecord, facts: Facts) -> list[Finding]:
    found = []
    if record.sum_check is not None and not record.sum_check <= facts.tolerance:
        found.append(
            Finding(
                "sum_mismatch",
                "warning",
                "terms",
                f"the weighted terms do not add up to the gradient that came: they are "
                f"{record.sum_check:.2g} of it apart (healthy: up to {facts.tolerance:g})",
                "give terms() every part of the loss that is run backward, with its weight",
            )
        )
    elif record.scale is not None and abs(record.scale - 1) > facts.tolerance:
        text = (
            f"the loss that was run backward is {record.scale:.6g} times the sum of the terms (a "
            "gradient scaler, or a division by the number of micro-batches)"
        )
        found.append(Finding("loss_scaled", "info", "terms", text))
    if facts.strangers:
        found.append(
            Finding(
                "optimizer_strangers",
                "warning",
                "optimizer",
                f"the optimiser holds {facts.strangers} tensors that the model does not",
                "build the optimiser after the last change of the model",
            )
        )
    return found


def _of_the_engine(record: AuditRecord, facts: Facts) -> list[Finding]:
    found = []
    if "cannot_split" in facts.notes:
        found.append(
            Finding(
                "terms_not_split", "warning", "terms",
                f"gradients could not be split by term: {facts.notes['cannot_split']}",
            )
        )  # fmt: skip
    if record.engine == "backward":
        text = (
            "reentrant checkpointing hides its region from the graph: each term ran a backward of "
            "its own, and what it reaches is read from that"
        )
        found.append(Finding("reentrant_checkpoint", "info", "model", text))
    if facts.compiled:
        text = "what lies inside a region of torch.compile is reported as unknown, not as reached"
        found.append(Finding("compiled_region", "info", "model", text))
    return found
