"""The loop: updates, held-out loss, checkpoints, metrics; the same for every precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch.nn import Parameter
from torch.optim import Optimizer

from glasstune.adapters.state import restore_state
from glasstune.core.config import Config
from glasstune.core.errors import RunError
from glasstune.core.findings import Finding
from glasstune.core.protocols import MetricsWriter, Progress, StepHook
from glasstune.core.tensors import load_tensors
from glasstune.data.packing import PackedSet
from glasstune.training import checkpoint as checkpoints
from glasstune.training.batching import Schedule, Update, evaluation_interval, updates
from glasstune.training.checkpoint import Identity, LoopState
from glasstune.training.heldout import heldout_loss
from glasstune.training.metrics import MetricsLog, peak_memory_bytes
from glasstune.training.optimizer import clip_gradients, set_learning_rate
from glasstune.training.schedule import learning_rate
from glasstune.training.signals import Interrupted, SignalHook, SignalWatch
from glasstune.training.step import AdaptedModel, UpdateResult, compute_update
from glasstune.training.terms import Term

SAVE_EVERY_SECONDS = 600


@dataclass
class Run:
    """Everything the loop needs; the workflow builds it.

    Args:
        config: Resolved.
        folder: The run folder.
        adapted: The model.
        parameters: Trained tensors, in the optimiser's order.
        optimizer: Over exactly those.
        terms: Loss terms.
        train: Training rows.
        validation: Held-out rows, or None.
        schedule: Sizes and number of updates.
        pad_id: Padding token.
        identity: What checkpoints belong to.
        write_adapter: Writes adapter, tokenizer and template into a folder.
        progress: Bars and log.
        hooks: Gate and audit.
        writers: Metric sinks beside the file.
    """

    config: Config
    folder: Path
    adapted: AdaptedModel
    parameters: Mapping[str, Parameter]
    optimizer: Optimizer
    terms: Sequence[Term]
    train: PackedSet
    validation: PackedSet | None
    schedule: Schedule
    pad_id: int
    identity: Identity
    write_adapter: Callable[[Path], None]
    progress: Progress
    hooks: Sequence[StepHook] = ()
    writers: Sequence[MetricsWriter] = ()

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"


StoppedBy = Literal["done", "signal", "early_stopping"]


@dataclass
class Outcome:
    """How the loop ended.

    Args:
        stopped_by: Why.
        state: Where it stands.
        findings: What gate and hooks said.
    """

    stopped_by: StoppedBy
    state: LoopState
    findings: list[Finding] = field(default_factory=list)


@dataclass
class Window:
    """Sums since the last metrics row."""

    updates: int = 0
    loss: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)
    grad_norm: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def add(self, result: UpdateResult, seconds: float) -> None:
        """Takes one update."""
        self.updates += 1
        self.loss += result.loss
        for name, value in result.losses.items():
            if value is not None:
                self.losses.setdefault(name, []).append(value)
        self.grad_norm = result.grad_norm
        self.tokens += result.tokens
        self.trained_tokens += result.trained_tokens
        self.seconds += seconds


class Loop:
    """Runs updates from a state on."""

    def __init__(self, run: Run, state: LoopState) -> None:
        self.run = run
        self.state = state
        self.findings: list[Finding] = []
        self.watch = SignalWatch()
        self.metrics = MetricsLog(run.folder, state.attempt, run.writers)
        self.window = Window()
        self._idle_rows = 0
        self._rate = 0.0
        self._started = time.monotonic() - state.seconds
        self._last_save = time.monotonic()
        saves = run.config.training.save_steps
        self.eval_every = evaluation_interval(run.config.training, run.schedule.total)
        self.save_every = None if saves == "auto" else saves

    def execute(self) -> Outcome:
        """Runs to the end, a signal, or early stopping.

        Raises:
            RunError: A loss or gradient is not finite, the gate refuses, the disk is full.
        """
        with self.watch:
            try:
                stopped_by: StoppedBy = self._train()
            except Interrupted:
                self.run.optimizer.zero_grad(set_to_none=True)
                self._save(force=True)
                stopped_by = "signal"
            finally:
                self.run.progress.finish("train")
                self.metrics.close()
        return Outcome(stopped_by, self.state, self.findings)

    def _train(self) -> Literal["done", "early_stopping"]:
        run, state, training = self.run, self.state, self.run.config.training
        total = run.schedule.total
        if state.step == 0 and state.last_eval < 0 and training.eval_on_start:
            self._evaluate()
        elif self._eval_due() and state.last_eval != state.step:
            self._evaluate()  # the run was stopped between an update and its evaluation
        if self._patience_over():  # before this start, or by that evaluation
            self._save(force=True)
            return "early_stopping"
        run.adapted.model.train()
        run.progress.start("train", total, "updates")
        run.progress.advance("train", state.step)
        stream = updates(
            run.schedule, run.train, training.seed, state.epoch, state.position,
            run.config.data.num_workers, run.pad_id,
        )  # fmt: skip
        while state.step < total:
            update = next(stream, None)
            if update is None:
                break
            self.watch.check()
            if not self._update(update):
                self._refuse_idle_epoch()
                continue
            if self._eval_due():
                if self._evaluate() and self._patience_over():
                    self._write_window()
                    self._save(force=True)
                    return "early_stopping"
                run.adapted.model.train()
            self._save()
        if state.step < total:  # skipped updates: the planned last one never came
            self._write_window()
            if 0 < state.step != state.last_eval:
                self._evaluate()
        self._save(force=True)
        return "done"

    def _update(self, update: Update) -> bool:
        """Computes one update; returns False where it trained nothing and so was none."""
        run, state = self.run, self.state
        step = state.step + 1
        started = time.monotonic()
        for hook in run.hooks:
            hook.before_update(step)
        result = compute_update(
            run.adapted, run.terms, update.micro_batches, step, update.epoch,
            (*run.hooks, SignalHook(self.watch)),
        )  # fmt: skip
        if result is None:
            state.skipped += 1
            self._idle_rows += update.rows
            self._move_to(update)
            run.progress.say(f"update skipped: no trained token before row {update.position}")
            return False
        for hook in run.hooks:
            hook.after_backward(step, run.adapted.model, run.optimizer)
        result.grad_norm = clip_gradients(run.parameters, run.config.training.max_grad_norm)
        rate = learning_rate(run.config.training, step, run.schedule.total)
        set_learning_rate(run.optimizer, rate)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        state.step = step
        state.trained_tokens += result.trained_tokens
        self._idle_rows = 0
        self._move_to(update)
        self.window.add(result, time.monotonic() - started)
        self._log(step, rate)
        self._ask_hooks(step, rate)
        return True

    def _move_to(self, update: Update) -> None:
        state = self.state
        state.epoch, state.position = update.epoch, update.position
        # A fraction of an epoch stays open: a resumed run may be given the rest of it.
        if state.position >= self.run.schedule.rows:
            state.epoch, state.position = state.epoch + 1, 0

    def _refuse_idle_epoch(self) -> None:
        """Stops where an epoch of rows gave no update: with `max_steps` it would never end."""
        rows = self.run.schedule.rows
        if self._idle_rows >= rows:
            raise RunError(
                "nothing_trained",
                f"the last {self._idle_rows} rows, a whole epoch, had no trained token: every loss "
                "term counted nothing in them",
                where=f"step {self.state.step}",
                fix="look at losses (sources, counts of your own functions) and at loss_weight of "
                "the sources",
            )

    def _ask_hooks(self, step: int, rate: float) -> None:
        for hook in self.run.hooks:
            found = list(hook.after_update(step, self.run.adapted.model, rate))
            self.findings.extend(found)
            dead = [item for item in found if item.severity == "error"]
            for item in found:
                if item.severity == "warning":
                    self.run.progress.say(f"warning: {item.message}")
            if dead:
                names = ", ".join(item.where for item in dead[:6])
                more = f" and {len(dead) - 6} more" if len(dead) > 6 else ""
                raise RunError(
                    "first_step_gate",
                    f"{len(dead)} trained tensors do not learn: {names}{more}. "
                    f"First: {dead[0].message}",
                    where=f"step {step}",
                    fix="audit.first_step_gate: warn goes on anyway; audit.gate_allow takes globs "
                    "of tensors that may stay dead",
                )

    def _log(self, step: int, rate: float) -> None:
        window = self.window
        self._rate = rate
        self.run.progress.advance(
            "train", 1, loss=window.loss / window.updates, tokens_per_second=window.speed
        )
        if step % self.run.config.training.logging_steps == 0 or step == self.run.schedule.total:
            self._write_window()

    def _write_window(self) -> None:
        window, state = self.window, self.state
        if window.updates == 0:
            return
        self.metrics.write(
            {
                "event": "train",
                "step": state.step,
                "epoch": self._epoch(),
                "loss": window.loss / window.updates,
                "losses": {name: sum(all_) / len(all_) for name, all_ in window.losses.items()},
                "learning_rate": self._rate,
                "grad_norm": window.grad_norm,
                "tokens": window.tokens,
                "trained_tokens": window.trained_tokens,
                "tokens_per_second": window.speed,
                "step_seconds": window.seconds / window.updates,
                "peak_memory_bytes": peak_memory_bytes(self.run.adapted.device),
            }
        )
        state.seconds = time.monotonic() - self._started
        self.window = Window()

    def _epoch(self) -> float:
        rows = max(1, self.run.schedule.rows)
        return round(self.state.epoch + self.state.position / rows, 6)

    def _eval_due(self) -> bool:
        step = self.state.step
        return step > 0 and (step % self.eval_every == 0 or step == self.run.schedule.total)

    def _evaluate(self) -> bool:
        """Measures the held-out loss; returns whether there was anything to measure."""
        run, state = self.run, self.state
        if run.validation is None:
            return False
        loss, tokens = heldout_loss(
            run.adapted, run.validation, run.schedule.micro, run.pad_id, run.progress,
            self.watch.check,
        )  # fmt: skip
        state.last_eval, state.last_loss = state.step, loss
        self.metrics.write(
            {
                "event": "eval",
                "step": state.step,
                "epoch": self._epoch(),
                "eval_loss": loss,
                "eval_tokens": tokens,
            }
        )
        run.progress.say(f"step {state.step}: held-out loss {loss:.4f} over {tokens:,} tokens")
        if state.step == 0:
            state.loss_before = loss
            return True
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_step, state.stale = loss, state.step, 0
        else:
            state.stale += 1
        return True

    def _patience_over(self) -> bool:
        patience = self.run.config.training.early_stopping_patience
        return patience is not None and self.state.stale >= patience

    def _save_due(self) -> bool:
        state, schedule = self.state, self.run.schedule
        at_epoch_end = state.position in (0, schedule.epoch_rows(state.epoch))
        if state.best_step == state.step:
            return True  # the best must exist on disk
        if self.run.config.training.save_strategy == "epoch":
            return at_epoch_end
        if self.save_every is not None:
            return state.step % self.save_every == 0
        waited = time.monotonic() - self._last_save
        return at_epoch_end or waited > SAVE_EVERY_SECONDS or state.step == schedule.total

    def _save(self, force: bool = False) -> None:
        run, state = self.run, self.state
        exists = state.step in checkpoints.complete_steps(run.checkpoints)
        if state.step == 0 or (force and exists) or not (force or self._save_due()):
            return
        state.seconds = time.monotonic() - self._started
        self.metrics.sync()
        checkpoints.save_checkpoint(
            run.checkpoints, state, run.identity, run.optimizer, run.write_adapter
        )
        self._last_save = time.monotonic()
        self.metrics.write({"event": "save", "step": state.step, "epoch": self._epoch()})
        checkpoints.rotate(run.checkpoints, run.config.training.save_total_limit, state.best_step)


def load_best(run: Run, state: LoopState) -> tuple[int, Path]:
    """Picks the checkpoint that `adapter/` is made of and loads it into the model.

    Returns:
        (its update, its folder): the best by held-out loss where wanted and known, else the last.
    """
    wants_best = run.config.training.load_best_model_at_end and state.best_step is not None
    step = state.best_step if wants_best and state.best_step is not None else state.step
    folder = run.checkpoints / f"step-{step}"
    if step != state.step:
        restore_state(run.adapted.model, load_tensors(folder / checkpoints.ADAPTER))
    return step, folder
