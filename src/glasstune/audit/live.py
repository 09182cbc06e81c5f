"""The gradient audit inside a training: structure once, norms as it logs, terms every N updates.

`audit.jsonl` holds one object a line; `event` says what it is:

- `norms`, at each logging step: `norm` over all trained tensors, `layers` {layer: norm}, and how
  many tensors have no gradient (`none`), only zeros (`zero`), NaN or Inf (`nonfinite`);
- `audit`, at the first update and every N: the audit record, with the trained parameters alone;
- `failure`: the audit record of an update that was not finite, with every parameter, computed
  again from the same rows; `rows` are their origins, `error` says what was wrong.

All have `step` and `attempt`. Norms are those of the whole update before clipping.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glasstune.audit.norms import live_norms
from glasstune.audit.peft_names import layer_of
from glasstune.audit.update import UpdateAudit
from glasstune.core.files import disk_full_named, dump_json
from glasstune.core.findings import Finding
from glasstune.core.gradients import AuditRecord, ParameterAudit
from glasstune.core.protocols import Examined

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from glasstune.core.batch import MicroBatch
    from glasstune.core.protocols import Exchange

FILE = "audit.jsonl"
STRUCTURE_UPDATES = 2
"""Updates of a start that are looked at for reasons: the gate judges at the first two."""
_EXPECTED = frozenset({"terms_conflict", "term_against_step", "term_weight_zero"})


class LiveAudit:
    """Looks into every update of a training and changes nothing in it (a `StepAudit`).

    Args:
        model: The model.
        optimizer: Over its trained tensors.
        folder: Where `audit.jsonl` goes.
        every: Updates between audits by term; 0 = none.
        structure: Whether the first updates are looked at for reasons even then.
        log_every: Updates between rows of norms.
        total: Planned number of updates; the last one has a row of norms.
        attempt: 1 for the first start of the run, one more for each resume.
        exchange: The ranks that share each update; the first of them writes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        folder: Path,
        *,
        every: int = 50,
        structure: bool = True,
        log_every: int = 1,
        total: int = 0,
        attempt: int = 1,
        exchange: Exchange | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.exchange = exchange
        self.path = folder / FILE
        self.every, self.log_every, self.total = every, log_every, total
        self.attempt = attempt
        self.on = every > 0 or structure
        self.parameters = {
            name: value for name, value in model.named_parameters() if value.requires_grad
        }
        self._update: UpdateAudit | None = None
        self._made = 0  # updates of this start
        self._norms: Callable[[], Tensor] | None = None
        self._told: set[tuple[str, str]] = set()
        self._file: IO[str] | None = None

    def before_update(self, step: int) -> None:
        """Opens an audit where the update is due for one."""
        self._drop()
        self._norms = None
        if self._is_due(step) or (self.on and self._made < STRUCTURE_UPDATES):
            self._update = UpdateAudit(
                self.model, self.optimizer, split=self._is_due(step), exchange=self.exchange
            )
            self._update.before_update(step)

    def _is_due(self, step: int) -> bool:
        return self.every > 0 and (self._made == 0 or step % self.every == 0)

    def take_counts(self, step: int, counts: Mapping[str, float]) -> None:
        """Counts of the terms over the whole update."""
        if self._update is not None:
            self._update.take_counts(step, counts)

    def before_backward(
        self, step: int, terms: Mapping[str, tuple[float, Tensor]], batch: MicroBatch
    ) -> None:
        """Walks the graph of each term and, in an update that is due, splits the gradient."""
        if self._update is not None:
            self._update.before_backward(step, terms, batch)

    def after_backward(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Reads the gradients, before clipping; what was read is written once the update stands."""
        if self._update is not None:
            self._update.after_backward(step, model, optimizer)
        if self.on and (step % self.log_every == 0 or step == self.total):
            self._norms = _on_its_way(live_norms(list(self.parameters.values())))

    def after_update(self, step: int, model: nn.Module, learning_rate: float) -> Sequence[Finding]:
        """Writes the rows of this update; returns what was not told before, never an error."""
        if self._norms is not None:
            self._write("norms", {"step": step, **norms_row(list(self.parameters), self._norms())})
        found: list[Finding] = []
        record = self._record(step)
        if record is not None:
            if self._is_due(step) or self._made == 0:
                trained = [row for row in record.parameters if row.requires_grad]
                self._write("audit", {**record.to_dict(), "parameters": _plain(trained)})
            found = [_softened(item) for item in _worth_telling(record)]
        self._made += 1
        fresh = [item for item in found if (item.code, item.where) not in self._told]
        self._told.update((item.code, item.where) for item in fresh)
        return fresh

    def _record(self, step: int) -> AuditRecord | None:
        report = None if self._update is None else self._update.report
        return report.record if report is not None and report.record.step == step else None

    def explain(self, step: int, names: Sequence[str]) -> Mapping[str, str]:
        """Why tensors of this update got no gradient, or a zero one; those it knows of."""
        record = self._record(step)
        rows = {} if record is None else {row.name: row for row in record.parameters}
        return {name: text for name in names if name in rows and (text := reason_text(rows[name]))}

    def examine(
        self, step: int, replay: Callable[[], None], *, rows: Sequence[str], error: str
    ) -> Examined:
        """Has an update computed again with everything watched; see `core.protocols.StepAudit`."""
        self._drop()
        self._update = UpdateAudit(self.model, self.optimizer, always=True, full=True)
        self._update.before_update(step)
        try:
            replay()
            self._update.after_backward(step, self.model, self.optimizer)
        finally:
            self._drop()
        record = self._record(step)
        assert record is not None
        self._write("failure", {**record.to_dict(), "rows": list(rows), "error": error})
        return Examined(failure_text(record), bad_terms(record))

    def sync(self) -> None:
        """Flushes to the disk, so that a checkpoint is never newer than its audits."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Removes the hooks of an update that was broken off and closes the file."""
        self._drop()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _drop(self) -> None:
        if self._update is not None and self._update.open:
            self._update.drop()

    def _write(self, event: str, content: Mapping[str, Any]) -> None:
        if self.exchange is not None and self.exchange.rank:
            return
        row = {"event": event, "attempt": self.attempt, **content}
        with disk_full_named(self.path):
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(dump_json(_rounded(row)) + "\n")
            self._file.flush()


def _on_its_way(tensor: Tensor) -> Callable[[], Tensor]:
    """Starts a copy to the host; what is returned waits for it.

    The loop reads its losses after that, so the numbers are there when they are asked for, and
    the device is waited for once an update.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


def norms_row(names: Sequence[str], measured: Tensor) -> dict[str, Any]:
    """The numbers of a `norms` row, at one copy to the host.

    Args:
        names: n names of trained tensors.
        measured: float32 [n, 2] of `live_norms`.
    """
    layers: dict[str, float] = {}
    none = zero = bad = 0
    for name, (norm, largest) in zip(names, measured.tolist(), strict=True):
        if largest < 0:
            none += 1
            continue
        zero += largest == 0
        bad += not math.isfinite(largest)
        layer = layer_of(name)
        layers[layer] = math.hypot(layers.get(layer, 0.0), norm)
    return {
        "norm": math.hypot(*layers.values()),
        "layers": layers,
        "none": none,
        "zero": zero,
        "nonfinite": bad,
    }


def reason_text(row: ParameterAudit) -> str:
    """The reason of a parameter as a clause with its line; empty while all is well."""
    if row.reason is None:
        return ""
    return row.reason.text + (f" [{row.reason.line}]" if row.reason.line else "")


def failure_text(record: AuditRecord) -> str:
    """What a full audit of a bad update shows, as clauses of an error message."""
    by_code = {item.code: item for item in reversed(record.findings)}
    parts = []
    for code in (
        "first_nonfinite_output",
        "first_nonfinite_output_gradient",
        "first_nonfinite_gradient",
    ):
        if code in by_code:
            parts.append(by_code[code].message)
            break
    bad = [row.name for row in record.parameters if row.value and not row.value.finite]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        parts.append(f"the weights themselves hold NaN or Inf: {', '.join(bad[:3])}{more}")
    terms_bad = any(not math.isfinite(term.value) for term in record.terms)
    if not parts and not terms_bad:
        parts.append("computed again from the same rows, every loss and gradient is finite")
    return "; ".join(parts)


def bad_terms(record: AuditRecord) -> tuple[str, ...]:
    """Names of the terms whose value or gradient is not finite."""
    return tuple(
        term.name
        for term in record.terms
        if not math.isfinite(term.value) or (term.norm is not None and not math.isfinite(term.norm))
    )


def _worth_telling(record: AuditRecord) -> list[Finding]:
    """Findings about tensors that are not reached and terms that lead nowhere."""
    unreached = {
        row.reason.code for row in record.parameters if row.status == "none" and row.reason
    }
    return [
        item
        for item in record.findings
        if item.code in unreached or (item.severity != "info" and item.code not in _EXPECTED)
    ]


def _softened(item: Finding) -> Finding:
    """Only the gate stops a run."""
    if item.severity != "error":
        return item
    return Finding(item.code, "warning", item.where, item.message, item.fix)


def _plain(rows: Sequence[ParameterAudit]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _rounded(value: Any) -> Any:
    """Floats to eight digits: a record of every trained tensor is long enough."""
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
