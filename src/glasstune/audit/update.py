"""One update of a training under audit: what a `StepHook` hears, given to `GradientAudit`.

The loop names a term's sum and its weight divided by the count of the whole update. The record is
about what a user knows: the weight, and the gradient of the mean sum / count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from glasstune.audit.gradient_audit import GradientAudit
from glasstune.audit.report import AuditReport
from glasstune.core.findings import Finding
from glasstune.core.gradients import AuditRecord, LayerAudit

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from glasstune.core.batch import MicroBatch
    from glasstune.core.protocols import Exchange


class UpdateAudit:
    """A `StepHook` over one update; afterwards `report` is there.

    Args:
        model: The model.
        optimizer: Over its trained tensors.
        split: Whether several terms get a backward each; `always` does it for one term too, and
            so brings the self-check.
        full: Watches every module's output for NaN and Inf, and summarises frozen weights.
        values: Keeps tensors as text.
        match: Glob of parameter names; None = all.
        exchange: The ranks that share the update; all of them audit it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        split: bool = True,
        always: bool = False,
        full: bool = False,
        values: bool = False,
        match: str | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self.model, self.optimizer, self.match = model, optimizer, match
        self.exchange = exchange
        self.split, self.always, self.full, self.values = split, always, full, values
        self.report: AuditReport | None = None
        self._audit: GradientAudit | None = None
        self._counts: dict[str, float] = {}
        self._entered = False

    @property
    def open(self) -> bool:
        """Whether the update is under way."""
        return self._audit is not None

    def before_update(self, step: int) -> None:
        """Sets the hooks; they must be there before the first forward."""
        self.drop()
        self.report = None
        self._counts = {}
        self._audit = GradientAudit(
            self.model,
            self.optimizer,
            match=self.match,
            keep="values" if self.values else (),
            step=step,
            frozen_values=self.full,
            activations=self.full,
            left_alone=True,  # the loop clips and steps after `after_backward`
            exchange=self.exchange,
        )
        self._audit.__enter__()

    def take_counts(self, step: int, counts: Mapping[str, float]) -> None:
        """Counts of the terms over the whole update."""
        self._counts = {name: count for name, count in counts.items() if count > 0}

    def before_backward(
        self, step: int, terms: Mapping[str, tuple[float, Tensor]], batch: MicroBatch
    ) -> None:
        """Takes the terms of a micro-batch."""
        if self._audit is None:
            return
        means = {
            name: (scale * self._counts[name], value / self._counts[name])
            for name, (scale, value) in terms.items()
            if value.requires_grad  # a user's sum over nothing may have no graph
        }
        if means:
            split = self.always or (self.split and len(self._counts) > 1)
            # Each micro-batch gives its part of the update's mean: their sum is the term's value.
            self._audit.terms(means, counts=dict.fromkeys(means, 1.0), split=split)

    def after_backward(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Closes the audit and makes the report: gradients are as the backward left them."""
        if self._audit is None:
            return
        audit, self._audit = self._audit, None
        audit.__exit__(None, None, None)
        if self.exchange is not None:  # a rank without rows was told no counts
            for counts in self.exchange.gather(self._counts):
                self._counts = {**counts, **self._counts}
        record = audit.report.record
        for term in record.terms:
            term.count = self._counts[term.name]
            term.sum = term.value * term.count
        if record.engine == "none" and len(record.terms) == 1:
            _own_gradient(record)
        self.report = audit.report

    def after_update(self, step: int, model: nn.Module, learning_rate: float) -> Sequence[Finding]:
        """Nothing."""
        return ()

    def drop(self) -> None:
        """Leaves an update that was broken off."""
        if self._audit is not None:
            audit, self._audit = self._audit, None
            broken = RuntimeError("broken off")
            audit.__exit__(RuntimeError, broken, None)


def _own_gradient(record: AuditRecord) -> None:
    """Fills in what a lone term did: the step's gradient is its own, times the weight."""
    term = record.terms[0]
    if term.weight == 0:
        return
    squares: dict[str, float] = {}
    for row in record.parameters:
        at = row.terms[term.name]
        came = row.increment
        if at.reached is False or came is None:
            continue
        at.norm = came.norm / abs(term.weight) if came.finite else math.nan
        at.share = 1.0 if came.finite and came.norm > 0 else None
        squares[row.layer] = squares.get(row.layer, 0.0) + at.norm**2
    for layer, square in squares.items():
        share = 1.0 if 0 < square < math.inf else None
        cancelled = None if share is None else 0.0
        record.layers.append(LayerAudit(layer, [[square]], [share], cancelled))
    total = sum(squares.values())
    term.norm = math.sqrt(total) if total >= 0 else math.nan
    term.share = 1.0 if 0 < total < math.inf else None
    record.gram = [[total]]
    record.cancellation = None if term.share is None else 0.0
    record.engine = "single"
