"""Makes the record of an audit: one host copy of everything, then plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from glasstune.audit.findings import Facts, all_findings
from glasstune.audit.finite import bracket
from glasstune.audit.judge import Judge
from glasstune.audit.numbers import Numbers, Rows, all_finite, gather, root, sum_check, tolerance
from glasstune.audit.peft_names import layer_of
from glasstune.audit.session import Session
from glasstune.audit.state import Watched
from glasstune.core.gradients import (
    AuditRecord,
    Conflict,
    Gram,
    LayerAudit,
    ParameterAudit,
    TermAudit,
    cancellation,
    cosines,
    shares,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer

CONFLICT = -1e-6
"""A cosine below it is a conflict; above it is the rounding of orthogonal gradients."""


def build_record(
    session: Session,
    *,
    audited: Callable[[str], bool],
    optimizer: Optimizer | None,
    step: int | None,
    keep_values: bool,
) -> AuditRecord:
    """Reads gradients as they are now and judges every parameter.

    Args:
        session: What was seen; its hooks are gone.
        audited: Whether a parameter of that name is audited.
        optimizer: Or None.
        step: For the record.
        keep_values: Whether gradients are kept as text.
    """
    rows = _rows(session, audited)
    numbers = gather(session, rows)
    names = list(session.terms)
    weights = [session.terms[name].weight for name in names]
    held = (
        None
        if optimizer is None
        else {id(value) for group in optimizer.param_groups for value in group["params"]}
    )
    judge = Judge(session, numbers, names, weights, held)
    parameters = [judge.row(name, watched, keep_values) for name, watched in rows]
    layers = _layers(rows, numbers, weights)
    whole = _sum_grams([layer.gram for layer in layers], len(names))
    check, scale = sum_check(session, rows, numbers)
    known = session.engine in ("grad", "backward")
    record = AuditRecord(
        step=step,
        terms=_terms(session, numbers, parameters, whole if known else []),
        parameters=parameters,
        layers=layers if known else [],
        conflicts=_conflicts(names, whole) if known else [],
        sum_check=check,
        gram=whole if known else [],
        cancellation=cancellation(whole, weights) if known else None,
        scale=scale,
        engine=session.engine,
    )
    record.findings = all_findings(record, _facts(session, rows, numbers, optimizer))
    return record


def _rows(session: Session, audited: Callable[[str], bool]) -> list[tuple[str, Watched]]:
    """The model's parameters as it holds them now."""
    return [
        (name, session.watched.get(id(tensor)) or Watched(name, tensor))
        for name, tensor in session.model.named_parameters()
        if audited(name)
    ]


def _sum_grams(grams: list[Gram], size: int) -> Gram:
    return [
        [sum(gram[row][column] for gram in grams) for column in range(size)] for row in range(size)
    ]


def _layers(rows: Rows, numbers: Numbers, weights: list[float]) -> list[LayerAudit]:
    by_layer: dict[str, list[Gram]] = {}
    for name, watched in rows:
        gram = numbers.gram.get(id(watched.tensor))
        if gram is not None:
            by_layer.setdefault(layer_of(name), []).append(gram)
    found = []
    for layer, grams in by_layer.items():
        total = _sum_grams(grams, len(weights))
        found.append(LayerAudit(layer, total, shares(total, weights), cancellation(total, weights)))
    return found


def _conflicts(names: list[str], gram: Gram) -> list[Conflict]:
    table = cosines(gram)
    return [
        Conflict(names[a], names[b], cosine)
        for a in range(len(names))
        for b in range(a + 1, len(names))
        if (cosine := table[a][b]) is not None and cosine < CONFLICT
    ]


def _terms(
    session: Session, numbers: Numbers, parameters: list[ParameterAudit], gram: Gram
) -> list[TermAudit]:
    weights = [state.weight for state in session.terms.values()]
    parts = shares(gram, weights) if gram else [None] * len(weights)
    found = []
    for index, (name, state) in enumerate(session.terms.items()):
        total = math.fsum(numbers.losses[name]) if all_finite(numbers.losses[name]) else math.nan
        count = state.counts[-1] if state.counts else float(len(state.losses))
        found.append(
            TermAudit(
                name=name,
                weight=state.weight * count if state.counts else state.weight,
                sum=total,
                count=count,
                value=total / count if count else math.nan,
                norm=root(gram[index][index]) if gram else None,
                share=parts[index],
                reaches=sum(row.terms[name].reached is True for row in parameters),
            )
        )
    return found


def _facts(
    session: Session,
    rows: Rows,
    numbers: Numbers,
    optimizer: Optimizer | None,
) -> Facts:
    order = sorted(
        (watched.order, name, numbers.increment[id(watched.tensor)].finite)
        for name, watched in rows
        if watched.arrivals and id(watched.tensor) in numbers.increment
    )
    trouble = any(not finite for _, _, finite in order) or not all(
        all_finite(values) for values in numbers.losses.values()
    )
    strangers = 0
    if optimizer is not None:
        own = {id(tensor) for tensor in session.model.parameters()}
        strangers = sum(
            id(value) not in own for group in optimizer.param_groups for value in group["params"]
        )
    return Facts(
        forward=bracket(numbers.forward) if trouble else None,
        backward=bracket(numbers.backward) if trouble else None,
        arrivals=bracket([(name, finite) for _, name, finite in order]),
        strangers=strangers,
        tolerance=tolerance(session),
        notes=session.notes,
        losses=numbers.losses,
        compiled=session.compiled or bool(session.log.compiled),
        reentrant=session.reentrant,
    )
