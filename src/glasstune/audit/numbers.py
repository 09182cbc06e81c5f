"""Everything measured in an audit, brought to the host together, and the self-check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glasstune.audit.gram import combined, gram_matrix
from glasstune.audit.norms import Gatherer, many_stats, summary, tensor_stats
from glasstune.audit.session import Session
from glasstune.audit.state import Watched, grad_of
from glasstune.core.gradients import Gram, TensorSummary

Rows = Sequence[tuple[str, Watched]]

EXACT, ROUNDED = 1e-3, 5e-2
"""Largest healthy error of the self-check: all in float32 or more; with 16-bit types in between."""


@dataclass(slots=True)
class Numbers:
    """Host values, by id of the parameter.

    Args:
        value: Statistics at the start.
        before: Of `.grad` at the first arrival.
        increment: Of what came.
        after: Of `.grad` now.
        check: [‖residual‖², ‖C‖², <C, residual>] with C = Σ w_i g_i.
        gram: K x K.
    """

    value: dict[int, TensorSummary] = field(default_factory=dict)
    before: dict[int, TensorSummary] = field(default_factory=dict)
    increment: dict[int, TensorSummary] = field(default_factory=dict)
    after: dict[int, TensorSummary] = field(default_factory=dict)
    check: dict[int, list[float]] = field(default_factory=dict)
    gram: dict[int, Gram] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    forward: list[tuple[str, bool]] = field(default_factory=list)
    backward: list[tuple[str, bool]] = field(default_factory=list)


def gather(session: Session, rows: Rows) -> Numbers:
    """Measures what is on the devices and copies it to the host."""
    box = Gatherer()
    entries: dict[int, int] = {}
    terms = list(session.terms)
    after = _after(rows)
    for _, watched in rows:
        key = id(watched.tensor)
        entries[key] = watched.tensor.numel() * (2 if watched.tensor.is_complex() else 1)
        _put(box, ("value", key), session.values.get(key))
        _put(box, ("before", key), watched.before)
        _put(box, ("increment", key), watched.total if watched.total is not None else watched.first)
        _put(box, ("after", key), after.get(key))
        if watched.arrivals and watched.first is None:
            _put(box, ("increment", key), after.get(key))  # `.grad` was None and is left alone
        if watched.gradients:
            watched.gram = gram_matrix([watched.gradients.get(name) for name in terms])
            box.put(("gram", key), watched.gram)
        if watched.residual is not None:
            _put_check(box, key, watched, session)
    for name, state in session.terms.items():
        box.put(("loss", name), torch.stack([loss.double() for loss in state.losses]))
    for kind in ("forward", "backward"):
        for index, (_, extremes) in enumerate(getattr(session.outputs, kind)):
            box.put((kind, index), extremes)
    return _numbers(session, box.gather(), entries, len(terms))


def _after(rows: Rows) -> dict[int, Tensor]:
    """Statistics of every `.grad` as it is now."""
    held = [
        (id(watched.tensor), grad)
        for _, watched in rows
        if (grad := grad_of(watched.tensor)) is not None and not grad.is_meta
    ]
    found = many_stats([grad for _, grad in held])
    return {key: row for (key, _), row in zip(held, found, strict=True)}


def _put(box: Gatherer, key: tuple[str, int], row: Tensor | None) -> None:
    if row is not None:
        box.put(key, row)


def prediction(watched: Watched, session: Session) -> Tensor | None:
    """C = Σ w_i g_i and what came through the weights; None where no term leads here."""
    names = list(session.terms)
    total = combined(
        [*(watched.gradients.get(name) for name in names), watched.extra],
        [*(session.terms[name].weight for name in names), 1.0],
    )
    return total


def _put_check(box: Gatherer, key: int, watched: Watched, session: Session) -> None:
    residual = watched.residual
    assert residual is not None
    expected = prediction(watched, session)
    rows = gram_matrix([residual, expected])
    box.put(("check", key), torch.stack([rows[0, 0], rows[1, 1], rows[0, 1]]))
    if watched.arrivals > 1 and expected is not None:
        box.put(("increment", key), tensor_stats(expected - residual))
    elif watched.arrivals > 1:
        box.put(("increment", key), tensor_stats(residual))


def _numbers(
    session: Session, found: dict[object, list[float]], entries: dict[int, int], size: int
) -> Numbers:
    numbers = Numbers()
    ends: dict[str, list[tuple[str, bool]]] = {"forward": [], "backward": []}
    for key, row in found.items():
        assert isinstance(key, tuple)
        kind, which = key
        if kind == "gram":
            numbers.gram[which] = [row[start : start + size] for start in range(0, size**2, size)]
        elif kind == "check":
            numbers.check[which] = row
        elif kind == "loss":
            numbers.losses[which] = row
        elif kind in ends:
            path = getattr(session.outputs, kind)[which][0]
            ends[kind].append((path, all(math.isfinite(value) for value in row)))
        else:
            getattr(numbers, kind)[which] = summary(row, entries[which])
    numbers.forward, numbers.backward = ends["forward"], ends["backward"]
    return numbers


def all_finite(values: list[float]) -> bool:
    """Whether no value is NaN or infinite."""
    return all(math.isfinite(value) for value in values)


def root(square: float) -> float:
    """Square root; NaN of NaN."""
    return math.sqrt(square) if square >= 0 else math.nan


def sum_check(session: Session, rows: Rows, numbers: Numbers) -> tuple[float | None, float | None]:
    """Relative error of Σ w_i g_i, and the factor by which the loss was scaled."""
    if session.engine not in ("grad", "backward") or not session.arrivals:
        return None, None
    came = math.fsum(numbers.increment[key].norm ** 2 for key in numbers.increment)
    error, expected, product = (
        sum(row[index] for row in numbers.check.values()) for index in range(3)
    )
    if not math.isfinite(error + expected):
        return None, None
    if came == 0:
        return (0.0 if error == 0 else math.inf), 1.0
    plain = math.sqrt(error / came)
    scale = (expected - product) / expected if expected else 1.0
    if plain <= tolerance(session) or expected == 0:
        return plain, 1.0
    left = torch.zeros((), dtype=torch.float64)
    for _, watched in rows:
        if watched.residual is not None:
            part = prediction(watched, session)
            rest = -watched.residual if part is None else part * (1 - scale) - watched.residual
            left += tensor_stats(rest)[0].cpu()
    scaled = math.sqrt(float(left) / came)
    return (scaled, scale) if scaled <= tolerance(session) else (plain, 1.0)


def tolerance(session: Session) -> float:
    """Largest healthy error of the self-check for the types of this model."""
    rounded = session.log.autocast or any(
        tensor.dtype in (torch.float16, torch.bfloat16, torch.uint8)
        for tensor in session.model.parameters()
    )
    return ROUNDED if rounded else EXACT
