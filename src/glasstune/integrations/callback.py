"""`GlasstuneCallback`: gate, live norms and audits inside `transformers.Trainer` and TRL.

When the Trainer calls (5.17 to 5.24 alike): `on_step_begin`; forward and backward of each
micro-batch; clipping; `on_pre_optimizer_step`; the optimiser moves; `on_optimizer_step`; gradients
are dropped; `on_step_end`; `on_log`. Norms and the check for NaN and Inf are those of the whole
update's gradient before clipping (see `watch.py`); the gate reads what the optimiser gets, which is
clipped: a positive factor makes no gradient zero or None.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakKeyDictionary, ref

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from glasstune.audit.gate import FirstStepGate
from glasstune.audit.peft_names import layer_of
from glasstune.audit.report import AuditReport
from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.core.gradients import ParameterAudit
from glasstune.integrations.audits import FILE, Audits
from glasstune.integrations.refusals import (
    check_mode,
    explained,
    never_scaled,
    not_finite,
    nothing_trained,
    refusal,
    refuse_hidden_gradients,
)
from glasstune.integrations.term_loss import listener
from glasstune.integrations.watch import GradientWatch, norm_numbers, to_host

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from glasstune.core.batch import MicroBatch

Mode = Literal["stop", "warn", "off"]
OVERFLOWS = 20
"""Updates in a row that an fp16 scaler passed over, until it is said: it began at 65536."""
log = logging.getLogger("glasstune")
_on_model: WeakKeyDictionary[nn.Module, ref[GlasstuneCallback]] = WeakKeyDictionary()
"""Whose hooks are on a model. A training that was interrupted leaves them there."""


class GlasstuneCallback(TrainerCallback):
    """Looks at the gradients of a Trainer's run; changes nothing in it.

    A gate that refuses raises `RunError` out of `trainer.train()`: setting
    `control.should_training_stop` would end the run as if all were well, with a saved model.

    Args:
        first_step_gate: `stop` raises where a trained tensor does not learn, `warn` logs it.
        gate_allow: Globs of tensor names that may stay dead.
        output: Where audit records go; None = `audit.jsonl` in the Trainer's `output_dir`.
        every_n_steps: The first update is audited, and each n-th; 0 = the first alone.
        non_finite: What a NaN or Inf in loss or gradient does, before the optimiser moves.

    Attributes:
        findings: What was seen so far.
        norms: Gradient norm of each trained tensor in the latest update, before clipping; None
            where it had no gradient.

    Raises:
        InputError: A mode or number that does not exist.
    """

    def __init__(
        self,
        first_step_gate: Mode = "stop",
        gate_allow: Sequence[str] = (),
        output: str | Path | None = None,
        every_n_steps: int = 50,
        non_finite: Mode = "stop",
    ) -> None:
        check_mode("first_step_gate", first_step_gate)
        check_mode("non_finite", non_finite)
        if (
            isinstance(every_n_steps, bool)
            or not isinstance(every_n_steps, int)
            or every_n_steps < 0
        ):
            raise InputError(
                "wrong_value",
                f"every_n_steps is {every_n_steps!r}, not a whole number from 0 on",
                where="GlasstuneCallback",
            )
        self.first_step_gate = first_step_gate
        self.gate_allow = (gate_allow,) if isinstance(gate_allow, str) else tuple(gate_allow)
        self.output = None if output is None else Path(output)
        self.every_n_steps = every_n_steps
        self.non_finite = non_finite
        self.findings: list[Finding] = []
        self.norms: dict[str, float | None] = {}
        self._gate: FirstStepGate | None = None
        self._audits: Audits | None = None
        self._watch: GradientWatch | None = None
        self._names: list[str] = []
        self._weights: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._window: dict[str, Tensor] = {}
        self._updates = 0
        self._rows: list[list[float]] = []
        self._skip = False
        self._overflows = 0
        self._compiled = False

    def first_in(self, trainer: Trainer) -> GlasstuneCallback:
        """Moves the callback before those that report to TensorBoard, W&B and the like.

        The Trainer puts its reporters before a user's callbacks, so what this one adds to a log
        reaches `trainer.state.log_history` and the progress bar, but not them; after this call it
        does.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def close(self) -> None:
        """Removes every hook from the model. Happens by itself at the end of a training."""
        if listener.get() is self:
            listener.set(None)
        if self._gate is not None:
            self._gate.close()
        if self._watch is not None:
            self._watch.close()
        if self._audits is not None:
            self._audits.close()
        self._gate = self._watch = None

    @property
    def report(self) -> AuditReport | None:
        """The latest audit of this process; None before the first (and beside process 0)."""
        return None if self._audits is None else self._audits.report

    @property
    def layer_norms(self) -> dict[str, float]:
        """Gradient norm of each layer in the latest update, before clipping."""
        squares: dict[str, float] = {}
        for name, norm in self.norms.items():
            layer = layer_of(name)
            squares[layer] = squares.get(layer, 0.0) + (norm or 0.0) ** 2
        return {layer: square**0.5 for layer, square in squares.items()}

    # Events of the Trainer, in their order.

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Sets the hooks.

        Raises:
            InputError: Nothing is trained, or gradients are kept where a callback cannot see them.
        """
        assert model is not None
        earlier = _on_model.get(model, lambda: None)()
        for callback in (self, earlier):
            if callback is not None:
                callback.close()
        _on_model[model] = ref(self)
        parameters = {
            name: value for name, value in model.named_parameters() if value.requires_grad
        }
        refuse_hidden_gradients(args, parameters, optimizer)
        self.findings = []
        # Then no hook of the model runs: what happens inside is seen from the loss and `.grad`.
        self._compiled = bool(args.torch_compile)
        self._names = list(parameters)
        self._window, self._updates, self._overflows = {}, 0, 0
        if not parameters:
            self._report([nothing_trained(self.first_step_gate)], state)
        path = self.output or Path(args.output_dir or ".") / FILE
        here = state.is_world_process_zero
        self._audits = Audits(path, self.every_n_steps, here, state.global_step)
        self._watch = GradientWatch(model, parameters, self._backward_ended)
        if self.first_step_gate != "off":
            self._gate = FirstStepGate(
                model, self.first_step_gate, self.gate_allow, calls_seen=not self._compiled
            )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """An update begins."""
        self._weights, self._sums, self._skip = {}, {}, False
        if self._watch is None or self._audits is None or model is None or optimizer is None:
            return
        self._watch.begin()
        self._audits.begin(state.global_step + 1, model, optimizer)
        if self._gate is not None:
            self._gate.before_update(state.global_step + 1)
        listener.set(self)

    def hear(self, terms: Mapping[str, tuple[float, Tensor]]) -> None:
        """Takes the terms of a micro-batch from `term_loss`, before its backward."""
        if self._watch is None or not (self._watch.take_forward() or self._compiled):
            return  # another Trainer's loss, after this one's training broke off
        self._watch.follow([value for _, value in terms.values()])
        for name, (weight, value) in terms.items():
            self._weights[name] = weight
            before = self._sums.get(name)
            now = value.detach().float()
            self._sums[name] = now if before is None else before + now
        if self._audits is not None and self._audits.open:
            self._watch.muted = True
            try:
                self._audits.hear(terms)
            finally:
                self._watch.muted = False

    def _backward_ended(self) -> None:
        """Ends the audit with the update's last backward: what follows is clipping."""
        if self._audits is not None and GradientState().sync_gradients:
            self._audits.end()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """All gradients of the update are there; the Trainer has clipped them.

        Raises:
            RunError: A loss or gradient is not finite.
        """
        if listener.get() is self:
            listener.set(None)
        if self._watch is None or model is None or optimizer is None:
            return
        step = state.global_step + 1
        if self._audits is not None:
            self._audits.write()
        self._read(step, state, optimizer)
        for name, value in self._sums.items():
            before = self._window.get(name)
            self._window[name] = value if before is None else before + value
        self._updates += 1
        if self._gate is not None and not self._skip:
            # The gate wants the names of the terms alone.
            zero = torch.zeros(())
            names = self._weights or {"loss": 1.0}
            terms = {name: (weight, zero) for name, weight in names.items()}
            self._gate.before_backward(step, terms, cast("MicroBatch", None))
            self._gate.after_backward(step, model, optimizer)

    def _read(self, step: int, state: TrainerState, optimizer: Optimizer) -> None:
        """Brings norms and losses to the host and names what is not finite."""
        watch = self._watch
        assert watch is not None
        clipped = watch.measured is None
        if clipped:  # the model's output held no tensor with a graph: nothing told of the backward
            watch.measure()
        assert watch.measured is not None
        losses = dict(self._sums)
        if not losses and watch.losses:
            losses[""] = torch.stack(watch.losses).sum()
        rows, values = to_host(watch.measured, list(losses.values()))
        self.norms = {
            name: None if largest < 0 else norm
            for name, (norm, largest) in zip(self._names, rows, strict=True)
        }
        self._rows = rows
        bad = [
            name
            for name, (_, largest) in zip(self._names, rows, strict=True)
            if not largest < float("inf")
        ]
        bad_losses = {
            name: value
            for name, value in zip(losses, values, strict=True)
            if not abs(value) < float("inf")
        }
        if not bad and not bad_losses:
            self._overflows = 0
            return
        if getattr(optimizer, "scaler", None) is not None and not bad_losses:
            # fp16: the scaled gradient overflowed; the scaler passes over this update.
            self._skip = True
            self._overflows += 1
            if self._overflows == OVERFLOWS and self.non_finite != "off":
                self._report([never_scaled(step, bad, len(self._names), OVERFLOWS)], state)
            return
        if self.non_finite != "off":
            story = "" if self._audits is None else self._audits.story(step)
            self._report(
                [
                    not_finite(
                        step, self.non_finite, bad, bad_losses, len(self._names), clipped, story
                    )
                ],
                state,
            )

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """The optimiser has moved.

        Raises:
            RunError: The gate refuses.
        """
        if self._gate is None or model is None or optimizer is None or self._skip:
            return
        if getattr(optimizer, "step_was_skipped", False):
            return
        found = self._gate.after_update(state.global_step + 1, model, _learning_rate(optimizer))
        self._report([explained(item, self._audited(item.where)) for item in found], state)
        if self._gate.done:
            self._gate = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds a few numbers to the Trainer's log of a training step."""
        if logs is None or "loss" not in logs or self._watch is None or not self._updates:
            return
        extra = {**norm_numbers(self._rows), **self._term_means(args)}
        if self._audits is not None:
            self._audits.write_norms(state.global_step, self._names, torch.tensor(self._rows))
        logs.update(extra)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(extra)

    def _term_means(self, args: TrainingArguments) -> dict[str, float]:
        """Mean of each term over the updates since the last log, over all processes."""
        from transformers.trainer_pt_utils import nested_gather

        window, updates = self._window, self._updates
        self._window, self._updates = {}, 0
        if not window:
            return {}
        values = nested_gather(torch.stack(list(window.values())), args.parallel_mode)
        table = values.reshape(-1, len(window))
        # Each process divided by the trained tokens of all of them, or by its own.
        whole = args.average_tokens_across_devices
        means = ((table.sum(dim=0) if whole else table.mean(dim=0)) / updates).tolist()
        return {f"loss/{name}": mean for name, mean in zip(window, means, strict=True)}

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Removes the hooks."""
        self.close()

    def _audited(self, name: str) -> ParameterAudit | None:
        """What the latest audit says of a tensor."""
        return None if self._audits is None else self._audits.row(name)

    def _report(self, found: Sequence[Finding], state: TrainerState) -> None:
        """Keeps findings, logs warnings, raises errors.

        Raises:
            RunError: A finding is an error.
        """
        self.findings.extend(found)
        for item in found:
            if item.severity == "warning" and state.is_local_process_zero:
                hint = f" (hint: {item.fix})" if item.fix else ""
                log.warning("%s%s", item.message, hint)
        errors = [item for item in found if item.severity == "error"]
        if errors:
            self.close()
            raise refusal(errors, state.global_step + 1)


def _learning_rate(optimizer: Optimizer) -> float:
    rates = [group.get("lr") for group in optimizer.param_groups]
    known = [float(rate) for rate in rates if rate is not None]
    # An optimiser that sets its own rate has none here; any above zero says that it moves.
    return max(known) if known else 1e-3
