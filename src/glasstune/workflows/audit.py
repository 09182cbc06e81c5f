"""`glasstune audit`: the first updates of a configuration, with every gradient looked at.

The updates are made as training makes them, on a copy in memory: the optimiser moves, so that the
second update shows the gradients of A once B has left zero. No file of a run is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.core.config_load import LoadedConfig, load_config
from glasstune.core.errors import InputError, RunError
from glasstune.core.findings import Finding
from glasstune.core.protocols import Progress
from glasstune.workflows.open_model import ADAPTER_CONFIG, complete_steps, is_run
from glasstune.workflows.prepare_run import Prepared, prepare

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from glasstune.audit.report import AuditReport
    from glasstune.audit.update import UpdateAudit
    from glasstune.training.batching import Update
    from glasstune.training.step import AdaptedModel


@dataclass
class AuditResult:
    """What the audit of a configuration found.

    Args:
        reports: One an update, in order; never empty.
        gate: What the first-step gate said.
        bad: Step and words of an update that was not finite; empty where all were.
        model: As the configuration names it.
        bits: Precision of the base.
    """

    reports: list[AuditReport]
    gate: list[Finding] = field(default_factory=list)
    bad: str = ""
    model: str = ""
    bits: int = 16

    @property
    def ok(self) -> bool:
        """Whether training would have gone on: the gate let it pass and all was finite."""
        return not self.bad and not any(item.severity == "error" for item in self.gate)

    @property
    def findings(self) -> list[Finding]:
        """Of the gate, then of the last update."""
        return [*self.gate, *self.reports[-1].findings]

    def to_dict(self) -> dict[str, Any]:
        """Returns the audit record of the last update; `steps` holds all where there are several.

        Beside the contract's fields: `ok`, `model`, `bits`.
        """
        record = {"ok": self.ok, "model": self.model, "bits": self.bits}
        record |= self.reports[-1].to_dict()
        record["findings"] = [item.to_dict() for item in self.findings]
        if len(self.reports) > 1:
            record["steps"] = [report.to_dict() for report in self.reports]
        return record

    def text(self, *, full: bool = False, values: bool = False, match: str | None = None) -> str:
        """Returns the last update as text, and the gate's verdict.

        Args:
            full: Every parameter, of every update.
            values: The tensors too.
            match: Glob of parameter names; these are listed one by one.

        Raises:
            InputError: `no_match`, `values_not_kept`.
        """
        shown = self.reports if full or values else self.reports[-1:]
        parts = [_overview(self.reports)] if len(self.reports) > len(shown) else []
        parts += [report.text(full=full, values=values, match=match) for report in shown]
        if self.gate:
            lines = ["First-step gate:"]
            for item in self.gate:
                lines.append(f"- {item.severity}: {item.where}: {item.message}")
            parts.append("\n".join(lines))
        if self.bad:
            parts.append(f"stopped: {self.bad}")
        return "\n\n".join(parts)


def _overview(reports: Sequence[AuditReport]) -> str:
    """One line an update."""
    lines = []
    for report in reports:
        losses = ", ".join(f"{term.name} {term.value:.4f}" for term in report.terms)
        states: dict[str, int] = {}
        for row in report.parameters:
            if row.requires_grad:
                states[row.status] = states.get(row.status, 0) + 1
        counted = ", ".join(f"{number} {status}" for status, number in states.items())
        lines.append(f"step {report.record.step}: {losses}; {counted}")
    return "\n".join(lines)


def find_config(target: str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Reads a configuration; of a run folder its own, with the adapter that it has.

    Args:
        target: YAML file or run folder.
        overrides: `key=value` with dots.

    Raises:
        InputError: Neither, or anything wrong inside.
    """
    folder = Path(target).expanduser()
    if not folder.is_dir():
        return load_config(target, overrides)
    if not is_run(folder):
        raise InputError(
            "no_run",
            "the folder holds no run",
            where=target,
            fix="name a configuration file, or a folder that glasstune train has written",
        )
    loaded = load_config(folder / "config.yaml", overrides)
    adapter = folder / "adapter"
    if not (adapter / ADAPTER_CONFIG).is_file():
        steps = complete_steps(folder / "checkpoints")
        adapter = folder / "checkpoints" / f"step-{steps[-1]}" if steps else adapter
    if (adapter / ADAPTER_CONFIG).is_file():
        loaded.config.adapter.path = str(adapter)
    else:
        loaded.notes.append(f"{target} has no adapter yet: the audit starts from a fresh one")
    return loaded


def read_history(target: str) -> list[dict[str, Any]]:
    """Returns the rows of a run's `audit.jsonl`; none where the target is no run.

    A last line that a kill cut off is left out.
    """
    file = Path(target).expanduser() / "audit.jsonl"
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def audit(
    config: Config,
    *,
    steps: int = 1,
    values: bool = False,
    match: str | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Makes the first updates of a configuration in memory and audits each.

    Args:
        config: The whole configuration; resolved in place.
        steps: Updates to make; fewer where the gate refuses, a number is not finite, or the
            configuration makes no more.
        values: Keeps tensors as text.
        match: Glob of parameter names; only these are in the record.
        progress: Bars and log; None draws them on a terminal.

    Raises:
        InputError: Config, data, model or an option are wrong.
        RunError: A loss function failed, or no update trained anything.
    """
    if steps < 1:
        raise InputError("bad_value", f"{steps} updates are none", where="steps", fix="give 1")
    if progress is None:
        from glasstune.reports.terminal import RichProgress

        progress = RichProgress()
    choices = Choices()
    prepared = prepare(config, choices, progress)
    auditing = _Auditing(prepared, progress)
    for choice in choices:
        progress.say(f"{choice.name}: {choice.value} ({choice.reason})")
    return auditing.run(steps, values, match)


class _Auditing:
    """The parts of a run that the audit needs."""

    def __init__(self, prepared: Prepared, progress: Progress) -> None:
        from glasstune.workflows.trained_model import first_step_gate, open_trained

        self.prepared, self.progress = prepared, progress
        self.config = prepared.config
        opened = open_trained(
            prepared, self._note, plainly="the audit looks into every module, as PEFT computes it"
        )
        self.adapted: AdaptedModel = opened[0]
        self.parameters: dict[str, Parameter] = opened[1]
        self.optimizer: Optimizer = opened[2]
        self.gate = first_step_gate(self.config, self.adapted)

    def _note(self, finding: Finding) -> None:
        self.progress.say(f"{finding.severity}: {finding.where}: {finding.message}")

    def run(self, steps: int, values: bool, match: str | None) -> AuditResult:
        """Makes up to `steps` updates."""
        result = AuditResult([], model=self.config.model.path, bits=self.config.model.bits)
        total = self.prepared.schedule.total
        if steps > total:
            self.progress.say(f"the configuration makes {total} updates: no more are audited")
        self.adapted.model.train()
        self.progress.start("audit", min(steps, total), "updates")
        stream = self._updates()
        try:
            while len(result.reports) < min(steps, total) and result.ok:
                update = next(stream, None)
                if update is None:
                    break
                self._step(update, len(result.reports) + 1, result, values, match)
        finally:
            self.progress.finish("audit")
        if not result.reports:
            raise RunError(
                "nothing_trained",
                "no update of the first epoch had a trained token",
                fix="look at the data with glasstune data",
            )
        return result

    def _updates(self) -> Iterator[Update]:
        from glasstune.training.batching import updates

        prepared, config = self.prepared, self.config
        stream = updates(
            prepared.schedule, prepared.data.train, config.training.seed, 0, 0,
            config.data.num_workers, prepared.pad_id,
        )  # fmt: skip
        for update in stream:
            if update.epoch > 0:
                return
            yield update

    def _step(
        self, update: Update, step: int, result: AuditResult, values: bool, match: str | None
    ) -> None:
        from glasstune.audit.update import UpdateAudit
        from glasstune.training.nonfinite import NonFinite
        from glasstune.training.optimizer import move
        from glasstune.training.step import compute_update

        model, optimizer = self.adapted.model, self.optimizer
        watch = UpdateAudit(model, optimizer, always=True, full=True, values=values, match=match)
        hooks = (watch, *self.gate)
        try:
            for hook in hooks:
                hook.before_update(step)
            computed = compute_update(
                self.adapted, self.prepared.terms, update.micro_batches, step, update.epoch,
                hooks, counting=watch, check=False,
            )  # fmt: skip
            if computed is None:
                self.progress.say(f"update skipped: no trained token before row {update.position}")
                return
            for hook in hooks:
                hook.after_backward(step, model, optimizer)
        finally:
            watch.drop()
        assert watch.report is not None
        result.reports.append(watch.report)
        bad = [name for name, value in computed.losses.items() if not math.isfinite(value or 0.0)]
        if bad:
            text = ", ".join(f"loss term {name!r} is {computed.losses[name]}" for name in bad)
            result.bad = self._looked_into(f"{text} at step {step}", update, step, watch, bad)
            return
        try:
            total = self.prepared.schedule.total
            _, rate = move(self.parameters, optimizer, self.config.training, step, total)
        except NonFinite as error:
            result.bad = self._looked_into(error.message, update, step, watch, [])
            return
        self.progress.advance("audit", 1, loss=computed.loss)
        rows = {row.name: row for row in watch.report.parameters}
        for hook in self.gate:
            for item in hook.after_update(step, model, rate):
                result.gate.append(_explained(item, rows.get(item.where)))

    def _looked_into(
        self, text: str, update: Update, step: int, watch: UpdateAudit, bad: Sequence[str]
    ) -> str:
        """Adds rows, terms and the first bad module, as training's error has them."""
        from glasstune.audit.live import bad_terms, failure_text
        from glasstune.training.nonfinite import guilty_of_gradient, guilty_of_loss, rows_text

        assert watch.report is not None
        record = watch.report.record
        terms, batches = self.prepared.terms, update.micro_batches
        self.optimizer.zero_grad(set_to_none=True)
        if bad:
            mine = [term for term in terms if term.name in bad]
            guilty = guilty_of_loss(self.adapted, mine, batches, step, update.epoch)
        else:
            guilty = guilty_of_gradient(
                self.adapted, terms, batches, self.parameters, step, update.epoch
            )
            if named := bad_terms(record):
                text += f"; not finite from term {', '.join(map(repr, named))}"
        rows = rows_text(guilty) if guilty else "none of them gives it alone"
        seen = failure_text(record)
        return f"{text}; rows: {rows}" + (f"; {seen}" if seen else "")


def _explained(item: Finding, row: Any) -> Finding:
    """A finding of the gate with the audit's reason."""
    from glasstune.audit.live import reason_text

    why = "" if row is None else reason_text(row)
    if not why or why in item.message:
        return item
    return Finding(item.code, item.severity, item.where, f"{item.message}: {why}", item.fix)
