"""The audited steps of a Trainer's run, and `audit.jsonl` beside its checkpoints.

The file has the rows that our own training writes (see `audit.live`): `event: norms` at each
logging step, `event: audit` for each audited one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from glasstune.audit.gradient_audit import GradientAudit
from glasstune.audit.live import failure_text, norms_row
from glasstune.audit.report import AuditReport
from glasstune.core.files import disk_full_named, dump_json, write_text_atomic
from glasstune.core.gradients import ParameterAudit

if TYPE_CHECKING:
    from torch.optim import Optimizer

FILE = "audit.jsonl"


class Audits:
    """Opens an audit for the first update of a run and for each n-th.

    Args:
        path: Where the records go; its folder is made with the first.
        every: n; 0 = the first alone.
        here: Whether this process audits and writes: one of several is enough, since an audit asks
            the others for nothing.
        step: Updates that were done before; records past it are moved beside.
    """

    def __init__(self, path: Path, every: int, here: bool, step: int) -> None:
        self.path, self.every, self.here = path, every, here
        self.attempt = supersede(path, step) + 1 if here else 1
        self.report: AuditReport | None = None
        self._audit: GradientAudit | None = None
        self._first = True
        self._unwritten = False

    def begin(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Opens an audit where the step is to be audited; before its first forward."""
        first, self._first = self._first, False
        if self.here and (first or (self.every > 0 and step % self.every == 0)):
            # Outputs are watched for NaN and Inf in the first update alone: that is where a wrong
            # precision shows, and the watch is half of an audit's time.
            self._audit = GradientAudit(
                model, optimizer, keep=(), step=step, frozen_values=False, activations=first
            ).__enter__()

    @property
    def open(self) -> bool:
        """Whether an audit is under way."""
        return self._audit is not None

    def hear(self, terms: Mapping[str, tuple[float, Tensor]]) -> None:
        """Takes the terms of a micro-batch, before its backward."""
        with_graph = {name: term for name, term in terms.items() if term[1].requires_grad}
        if self._audit is not None and with_graph:
            # Each micro-batch gives its part of the update's mean: their sum is the term's value.
            self._audit.terms(with_graph, counts=dict.fromkeys(with_graph, 1.0))

    def end(self) -> None:
        """Closes the open audit, if there is one, and keeps its report."""
        if self._audit is None:
            return
        audit, self._audit = self._audit, None
        audit.__exit__(None, None, None)
        self.report = audit.report
        self._unwritten = True

    def write(self) -> None:
        """Appends the record of an audit that has ended, if there is one.

        Raises:
            RunError: The disk is full.
        """
        self.end()  # where nothing told of the end of the backward
        if self.report is None or not self._unwritten:
            return
        self._unwritten = False
        trained = [row for row in self.report.parameters if row.requires_grad]
        self._append("audit", replace(self.report.record, parameters=trained).to_dict())

    def write_norms(self, step: int, names: Sequence[str], measured: Tensor) -> None:
        """Appends norms by layer.

        Args:
            step: Of the update.
            names: n names of trained tensors.
            measured: float32 [n, 2] of `live_norms`, on the CPU.

        Raises:
            RunError: The disk is full.
        """
        if self.here:
            self._append("norms", {"step": step, **norms_row(names, measured)})

    def _append(self, event: str, content: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {"event": event, "attempt": self.attempt, **content}
        with disk_full_named(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(dump_json(row) + "\n")

    def story(self, step: int) -> str:
        """Where a NaN or Inf of an update came from; empty where the update was not audited."""
        if self.report is None or self.report.record.step != step:
            return ""
        return failure_text(self.report.record)

    def row(self, name: str) -> ParameterAudit | None:
        """What the latest audit says of a tensor."""
        rows: list[ParameterAudit] = [] if self.report is None else self.report.parameters
        return next((row for row in rows if row.name == name), None)

    def close(self) -> None:
        """Drops an audit that was broken off, with its hooks."""
        if self._audit is not None:
            audit, self._audit = self._audit, None
            error = RuntimeError("broken off")
            audit.__exit__(RuntimeError, error, None)


def supersede(path: Path, step: int) -> int:
    """Moves the records past a step to `*.superseded.jsonl`: training starts again from there.

    A half-written last line, as a kill leaves it, is dropped.

    Args:
        path: The file.
        step: Records up to it stay; 0 = a new training, none stay.

    Returns:
        The last attempt among the records that stay; 0 where none do.
    """
    if not path.exists():
        return 0
    attempt = 0
    kept: list[str] = []
    moved: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = _parsed(line)
        if row is None:
            continue
        stays = (row.get("step") or 0) <= step
        (kept if stays else moved).append(line)
        attempt = max(attempt, row.get("attempt", 0) if stays else 0)
    if moved:
        with path.with_name(f"{path.stem}.superseded.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in moved)
    write_text_atomic(path, "".join(line + "\n" for line in kept))
    return attempt


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row
