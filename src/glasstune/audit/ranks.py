"""What the ranks of a run saw of one update, put together: each then holds the whole update's.

A rank sees its own rows. Gradients by term, the self-check's residual and losses are sums over
rows, so they are added up; what a term reaches is reached where any rank's rows reach it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from glasstune.audit.session import Session
from glasstune.audit.state import TermState, Watched
from glasstune.core.protocols import Exchange


def join_ranks(session: Session, exchange: Exchange | None) -> None:
    """Adds up an update over all ranks; every rank calls it once, after its last backward.

    Args:
        session: What this rank saw; its hooks are gone.
        exchange: The ranks; None or one alone changes nothing.
    """
    if exchange is None or exchange.size == 1:
        return
    watched = {one.name: one for one in session.watched.values() if one.tensor.requires_grad}
    everybody = exchange.gather(_told(session, watched))
    engines = {told["engine"] for told in everybody}
    for engine in ("none", "grad", "backward", "unknown"):  # one that could not split spoils all
        if engine in engines:
            session.engine = engine
    session.arrivals = sum(told["arrivals"] for told in everybody)
    for told in everybody:
        session.compiled |= told["compiled"]
        session.reentrant |= told["reentrant"]
        session.notes = {**told["notes"], **session.notes}
    _join_terms(session, everybody)
    for name, one in watched.items():
        rows = [told["tensors"][name] for told in everybody if name in told["tensors"]]
        one.arrivals = sum(row["arrivals"] for row in rows)
        orders = [row["order"] for row in rows if row["order"] >= 0]
        one.order = min(orders, default=-1)
        for row in rows:
            for term, reached in row["reached"].items():
                one.note_reach(term, reached)
    if session.engine == "unknown":
        for one in watched.values():
            one.gradients, one.residual = {}, None
        return
    _join_tensors(watched, everybody, exchange)


def _told(session: Session, watched: dict[str, Watched]) -> dict[str, Any]:
    return {
        "engine": session.engine,
        "arrivals": session.arrivals,
        "compiled": session.compiled,
        "reentrant": session.reentrant,
        "notes": session.notes,
        "terms": [
            (name, state.weight, [float(loss) for loss in state.losses], state.counts[-1:])
            for name, state in session.terms.items()
        ],
        "tensors": {
            name: {
                "arrivals": one.arrivals,
                "order": one.order,
                "reached": one.reached,
                "gradients": list(one.gradients),
                "residual": one.residual is not None,
            }
            for name, one in watched.items()
        },
    }


def _join_terms(session: Session, everybody: list[dict[str, Any]]) -> None:
    losses: dict[str, list[float]] = {}
    for told in everybody:
        for name, weight, values, counts in told["terms"]:
            state = session.terms.setdefault(name, TermState(name, weight))
            state.counts = state.counts or list(counts)
            losses.setdefault(name, []).extend(values)
    for name, values in losses.items():
        finite = all(map(math.isfinite, values))
        total = math.fsum(values) if finite else math.nan
        session.terms[name].losses = [torch.tensor(total, dtype=torch.float64)]


def _join_tensors(
    watched: dict[str, Watched], everybody: list[dict[str, Any]], exchange: Exchange
) -> None:
    """Sums gradients and residuals in one exchange; a tensor that a rank lacks counts as zero."""
    places: list[tuple[Watched, str | None]] = []
    for name, one in watched.items():
        rows = [told["tensors"][name] for told in everybody if name in told["tensors"]]
        terms = dict.fromkeys(term for row in rows for term in row["gradients"])
        places += [(one, term) for term in terms]
        if any(row["residual"] for row in rows):
            places.append((one, None))
    given: list[Tensor] = []
    for one, term in places:
        held = one.residual if term is None else one.gradients.get(term)
        given.append(
            torch.zeros_like(one.tensor, dtype=torch.float32) if held is None else held.float()
        )
    for (one, term), total in zip(places, exchange.sum_tensors(given), strict=True):
        if term is None:
            one.residual = total
        else:
            one.gradients[term] = total
