"""The record of a gradient audit: what arrived at each parameter, from which term, and why not.

Names of the JSON fields are the contract's; what is added beside them never replaces one of them.
The arithmetic on Gram matrices is here, in plain Python, so that reports can use it without torch.

For terms with weights w and gradients g over one set of tensors, G[i][j] = <g_i, g_j>:
cosine = G_ij / sqrt(G_ii G_jj); share_i = w_i (Gw)_i / (w'Gw), which sums to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from glasstune.core.findings import Finding
from glasstune.core.records import Record

Reached = bool | Literal["unknown"]
Status = Literal["ok", "zero", "none", "nonfinite", "not_in_optimizer", "frozen"]
Gram = list[list[float]]

HEALTHY = frozenset({"frozen", "packed", "partner_zero", "weight_zero", "expert_without_tokens"})
"""Codes of reasons that name no fault."""


@dataclass(slots=True)
class TensorSummary:
    """A tensor in five numbers.

    Args:
        norm: 2-norm over the finite entries, summed in float64.
        max_abs: Largest magnitude of the finite entries.
        zero_fraction: Share of entries that are exactly zero, 0 to 1.
        nan: Number of entries that are NaN.
        inf: Number of entries that are infinite.
    """

    norm: float
    max_abs: float
    zero_fraction: float
    nan: int
    inf: int

    @property
    def finite(self) -> bool:
        """Whether every entry is a number."""
        return self.nan == 0 and self.inf == 0

    @property
    def zero(self) -> bool:
        """Whether every entry is exactly zero."""
        return self.finite and self.max_abs == 0


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a parameter has no gradient, a zero one, or one that nobody uses.

    Args:
        code: A stable name, for example `detached`; `HEALTHY` lists those that are no fault.
        text: The same as a sentence with its evidence.
        module: Path of the module at fault, empty where there is none.
        line: `file.py:12` of the call, None where it is not known.
    """

    code: str
    text: str
    module: str = ""
    line: str | None = None

    @property
    def healthy(self) -> bool:
        """Whether nothing needs doing."""
        return self.code in HEALTHY


@dataclass(slots=True)
class TermAtParameter:
    """One loss term at one parameter.

    Args:
        reached: Whether the term's graph leads to the parameter; `unknown` inside a compiled
            region, or where reentrant checkpointing hid it and no backward told.
        norm: ‖g_i‖ without the weight; 0 where it is not reached, None where it is not known.
        share: w_i (Gw)_i / (w'Gw) on this parameter; None where the total is zero or not finite.
    """

    reached: Reached
    norm: float | None
    share: float | None


@dataclass(slots=True)
class ParameterAudit:
    """One named parameter.

    Args:
        name: As `named_parameters` has it.
        layer: The layer that it is counted to.
        shape: As stored (a packed weight's own shape).
        dtype: For example `float32`.
        requires_grad: At the end of the audit.
        in_optimizer: None where no optimiser was given.
        value: At the start of the audit; None for packed integers and where it was not asked for.
        grad_before: `.grad` as the first backward found it.
        increment: What the backward passes of the audit added.
        grad_after: `.grad` at the end of the audit.
        status: `none` where no gradient arrived; never mixed up with `zero`.
        reason: None while all is well.
        terms: Name of each term to what it did here.
        texts: `value`, `grad_before`, `grad_after` as torch prints them, where values were kept.
    """

    name: str
    layer: str
    shape: list[int]
    dtype: str
    requires_grad: bool
    in_optimizer: bool | None
    value: TensorSummary | None
    grad_before: TensorSummary | None
    increment: TensorSummary | None
    grad_after: TensorSummary | None
    status: Status
    reason: Reason | None
    terms: dict[str, TermAtParameter] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class TermAudit:
    """One term over the whole audit.

    Args:
        name: As given.
        weight: Factor of `sum` in the loss, times `count`: the factor of `value`.
        sum: The loss, summed over the calls.
        count: What `sum` is divided by: what the caller said, else the number of calls.
        value: sum / count.
        norm: ‖g_i‖ over all parameters without the weight; None where it is not known.
        share: Of the whole step; the shares of all terms sum to 1.
        reaches: Number of parameters that it reaches.
    """

    name: str
    weight: float
    sum: float
    count: float
    value: float
    norm: float | None
    share: float | None
    reaches: int


@dataclass(slots=True)
class LayerAudit:
    """One layer: inner products of the terms' gradients over its parameters.

    Args:
        layer: Its name.
        gram: K x K in the order of `terms`; weights are not in it.
        shares: Of each term; None where the total is zero or not finite.
        cancellation: 1 - ‖Σ w_i g_i‖ / Σ ‖w_i g_i‖: 0 where the terms agree, 1 where they cancel.
    """

    layer: str
    gram: Gram
    shares: list[float | None]
    cancellation: float | None


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two terms whose gradients point against each other over all parameters."""

    a: str
    b: str
    cosine: float


@dataclass(slots=True)
class AuditRecord(Record):
    """Result of a gradient audit of one step.

    Args:
        step: As the caller numbers it; None where it does not.
        terms: In the order given.
        parameters: In the order of `named_parameters`.
        layers: In the same order; empty without terms.
        conflicts: Pairs of terms with a negative cosine over all parameters.
        sum_check: ‖Σ w_i g_i - increment‖ / ‖increment‖; None without terms or backward.
        findings: What needs looking at, worst first.
        gram: Over all parameters.
        cancellation: Over all parameters.
        scale: Best factor c of `increment = c Σ w_i g_i`: 1 unless the loss was scaled.
        engine: `grad` (one `autograd.grad` a term), `backward` (one `.backward()` a term, under
            reentrant checkpointing), `single` (one term: the step's gradient is its own, divided
            by the weight), `none` (no terms, or not split), `unknown` (could not be split).
    """

    step: int | None
    terms: list[TermAudit]
    parameters: list[ParameterAudit]
    layers: list[LayerAudit]
    conflicts: list[Conflict]
    sum_check: float | None
    findings: list[Finding] = field(default_factory=list)
    gram: Gram = field(default_factory=list)
    cancellation: float | None = None
    scale: float | None = None
    engine: Literal["grad", "backward", "single", "none", "unknown"] = "none"

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the contract; what is not finite becomes null."""
        plain: dict[str, Any] = _json_safe(asdict(self))
        return plain


def _json_safe(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_safe(item) for item in value]
    return value


def cosines(gram: Gram) -> list[list[float | None]]:
    """Cosine of each pair of gradients; None where one of them is zero or not finite."""
    size = range(len(gram))
    return [[_cosine(gram, a, b) for b in size] for a in size]


def _cosine(gram: Gram, a: int, b: int) -> float | None:
    length = math.sqrt(gram[a][a]) * math.sqrt(gram[b][b]) if _usable(gram, a, b) else 0.0
    if not (math.isfinite(length) and length > 0 and math.isfinite(gram[a][b])):
        return None
    return max(-1.0, min(1.0, gram[a][b] / length))


def _usable(gram: Gram, a: int, b: int) -> bool:
    return gram[a][a] >= 0 and gram[b][b] >= 0  # False for NaN


def shares(gram: Gram, weights: Sequence[float]) -> list[float | None]:
    """w_i (Gw)_i / (w'Gw): what part of the step each term is; negative = works against it.

    Args:
        gram: K x K.
        weights: K.

    Returns:
        K numbers that sum to 1, or K times None where the weighted sum is zero (also where terms
        cancel to less than float64 resolves) or not finite.
    """
    if not all(math.isfinite(entry) for row in gram for entry in row):
        return [None] * len(gram)  # fsum raises on Inf - Inf
    parts = [
        weight * math.fsum(entry * other for entry, other in zip(row, weights, strict=True))
        for weight, row in zip(weights, gram, strict=True)
    ]
    total = sum(parts)
    size = sum(weight * weight * gram[index][index] for index, weight in enumerate(weights))
    if not math.isfinite(total) or not total > 1e-14 * size:
        return [None] * len(parts)
    return [part / total for part in parts]


def cancellation(gram: Gram, weights: Sequence[float]) -> float | None:
    """1 - ‖Σ w_i g_i‖ / Σ ‖w_i g_i‖; None where all are zero or one is not finite."""
    total = sum(
        weights[a] * weights[b] * gram[a][b] for a in range(len(gram)) for b in range(len(gram))
    )
    lengths = sum(
        abs(weight) * math.sqrt(max(gram[index][index], 0.0))
        for index, weight in enumerate(weights)
    )
    if not (math.isfinite(total) and math.isfinite(lengths)) or lengths == 0:
        return None
    return max(0.0, min(1.0, 1.0 - math.sqrt(max(total, 0.0)) / lengths))
