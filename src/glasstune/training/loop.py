"""The loop: updates, held-out loss, checkpoints, metrics; the same for every precision."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from glasstune.adapters.state import restore_state
from glasstune.core.errors import RunError
from glasstune.core.findings import Finding
from glasstune.core.memory import is_out_of_memory
from glasstune.core.tensors import load_tensors
from glasstune.fast.speed_up import plain
from glasstune.training import checkpoint as checkpoints
from glasstune.training.batching import Update, evaluation_interval, updates
from glasstune.training.checkpoint import LoopState
from glasstune.training.heldout import heldout_loss
from glasstune.training.metrics import MetricsLog, Unwritten, peak_memory_bytes
from glasstune.training.nonfinite import (
    NonFinite,
    guilty_of_gradient,
    looked_into,
    of_all_ranks,
)
from glasstune.training.optimizer import gradient_norm, move
from glasstune.training.run import Outcome, Run, StoppedBy, Window
from glasstune.training.signals import Interrupted, SignalHook, SignalWatch
from glasstune.training.step import Launched, UpdateResult, compute_update, launch_update

SAVE_EVERY_SECONDS = 600


class Loop:
    """Runs updates from a state on."""

    def __init__(self, run: Run, state: LoopState) -> None:
        self.run = run
        self.state = state
        self.findings: list[Finding] = []
        self.watch = SignalWatch()
        self.metrics = (
            MetricsLog(run.folder, state.attempt, run.writers) if run.world.writes else Unwritten()
        )
        self.window = Window()
        self._idle_rows = 0
        self._rate = 0.0
        self._stream: Iterator[Update] = iter(())
        self._ahead: Update | None = None
        self._started = time.monotonic() - state.seconds
        self._last_save = time.monotonic()
        self._saved = state.step  # a run begins with nothing, or from a checkpoint
        self._time_to_save = False
        self._moving = False
        saves = run.config.training.save_steps
        self.eval_every = evaluation_interval(run.config.training, run.schedule.total)
        self.save_every = None if saves == "auto" else saves

    def execute(self) -> Outcome:
        """Runs to the end, a signal, or early stopping.

        Raises:
            RunError: A loss or gradient is not finite, the gate refuses, the disk is full.
        """
        # What exists now lives as long as the run. Left out of later collections, which would walk
        # all of it every few hundred steps: 0.5 s each with 1,000 modules and the libraries.
        gc.collect()
        gc.freeze()
        with self.watch:
            try:
                stopped_by: StoppedBy = self._train()
            except Interrupted:
                self.run.optimizer.zero_grad(set_to_none=True)
                self._save(force=True)
                stopped_by = "signal"
            except Exception as error:
                if is_out_of_memory(error):
                    self._save_what_stands(error)
                raise
            finally:
                gc.unfreeze()
                self.run.progress.finish("train")
                self.metrics.close()
                if self.run.audit is not None:
                    self.run.audit.close()
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
        self._stream = updates(
            run.schedule, run.train, training.seed, state.epoch, state.position,
            run.config.data.num_workers, run.pad_id,
        )  # fmt: skip
        while state.step < total:
            update = self._next_update()
            if update is None:
                break
            self._between_updates()
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

    def _save_what_stands(self, error: Exception) -> None:
        """Saves the updates that are done where memory was short in a later one."""
        if self._moving or self.run.world.size > 1:
            return  # some tensors may have moved; or the other ranks wait elsewhere
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        self.run.optimizer.zero_grad(set_to_none=True)
        try:
            self._save(force=True)
        except Exception as second:  # memory that is short is the error to be seen
            self.run.progress.say(f"saving failed too: {type(second).__name__}: {second}")

    def _between_updates(self) -> None:
        """Where ranks agree on what one of them alone knows: a signal, the time since a save."""
        world = self.run.world
        waited = time.monotonic() - self._last_save > SAVE_EVERY_SECONDS
        told = [float(self.watch.received is not None), float(world.writes and waited)]
        stop, save = world.sum(told)
        self._time_to_save = save > 0
        if stop:
            raise Interrupted

    def _next_update(self) -> Update | None:
        update, self._ahead = self._ahead, None
        return next(self._stream, None) if update is None else update

    def _prepare_next(self) -> None:
        """Makes the rows of the next update while the device computes this one."""
        if self._ahead is None and self.state.step + 1 < self.run.schedule.total:
            self._ahead = next(self._stream, None)

    def _update(self, update: Update) -> bool:
        """Computes one update; returns False where it trained nothing and so was none."""
        run, state = self.run, self.state
        step = state.step + 1
        started = time.monotonic()
        try:
            result = self._compute(update, step)
        except NonFinite as error:
            raise self._looked_into(error, update, step) from None
        if result is None:
            state.skipped += 1
            self._idle_rows += update.rows
            self._move_to(update)
            run.progress.say(f"update skipped: no trained token before row {update.position}")
            return False
        state.step = step
        state.trained_tokens += result.trained_tokens
        self._idle_rows = 0
        self._move_to(update)
        self.window.add(result, time.monotonic() - started)
        self._log(step)
        self._ask_hooks(update, step, self._rate)
        return True

    def _compute(self, update: Update, step: int) -> UpdateResult | None:
        """Gradients, then the optimiser's move; None where nothing was trained."""
        run, world = self.run, self.run.world
        hooks = run.every_hook
        for hook in hooks:
            hook.before_update(step)
        # Ranks that share an update stop between two of them, all at the same one.
        watched = (*hooks, SignalHook(self.watch)) if world.size == 1 else hooks
        launched = launch_update(
            run.adapted, run.terms, update.micro_batches, step, update.epoch, watched,
            counting=run.audit, world=world, forwards=update.forwards,
        )  # fmt: skip
        if launched is None:
            return None
        totals, sizes = world.reduce_update(
            list(run.parameters.values()), launched.per_term(), launched.sizes
        )
        for hook in hooks:
            hook.after_backward(step, run.adapted.model, run.optimizer)
        norm = gradient_norm(run.parameters).to(launched.sums)
        both = torch.cat([launched.sums, totals, norm.reshape(1)])
        self._prepare_next()
        *sums, total = both.tolist()  # the update's one wait for the device
        result = self._read(launched, sums, sizes)
        self._moving = True
        result.grad_norm, self._rate = move(
            run.parameters, run.optimizer, run.config.training, step, run.schedule.total,
            (norm, total),
        )  # fmt: skip
        self._moving = False
        return result

    def _read(
        self, launched: Launched, sums: Sequence[float], sizes: Sequence[float]
    ) -> UpdateResult:
        world, count = self.run.world, len(launched.parts)
        if world.size == 1:
            return launched.read(sums[:count])
        totals = sums[count:]
        if all(map(math.isfinite, totals)):
            return launched.read(sums[:count], check=False, all_ranks=(totals, sizes))
        error: NonFinite | None = None
        try:
            launched.read(sums[:count], check=not self.run.adapted.sharded)
        except NonFinite as found:
            error = found
        raise of_all_ranks(world, error, f"a loss term is not finite at step {launched.step}")

    def _looked_into(self, error: NonFinite, update: Update, step: int) -> NonFinite:
        """Finds the rows of a bad update; every rank looks at its own."""
        world = self.run.world
        if self.run.adapted.sharded:
            error.message += "; rows are not looked for while ranks hold parts of the base (fsdp2)"
            return error
        found = self._looked_into_mine(error, update, step)
        return found if world.size == 1 else of_all_ranks(world, found, error.message)

    def _looked_into_mine(self, error: NonFinite, update: Update, step: int) -> NonFinite:
        run, audit = self.run, self.run.audit
        batches, epoch = update.micro_batches, update.epoch
        if run.adapted.speed is not None:
            error.message += "; looked at again without compiled blocks and joined products"
        with plain(run.adapted.model):
            return looked_into(
                error,
                step=step,
                find_rows=lambda: guilty_of_gradient(
                    run.adapted, run.terms, batches, run.parameters, step, epoch
                ),
                audit=audit,
                replay=lambda: self._replay(update, step),
                forget=lambda: run.optimizer.zero_grad(set_to_none=True),
            )

    def _replay(self, update: Update, step: int) -> None:
        """Computes an update again with the audit as its only hook."""
        run, audit = self.run, self.run.audit
        compute_update(
            run.adapted, run.terms, update.micro_batches, step, update.epoch,
            () if audit is None else (audit,), counting=audit, check=False,
        )  # fmt: skip

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

    def _ask_hooks(self, update: Update, step: int, rate: float) -> None:
        for hook in self.run.every_hook:
            found = list(hook.after_update(step, self.run.adapted.model, rate))
            self.findings.extend(found)
            dead = [item for item in found if item.severity == "error"]
            for item in found:
                if item.severity == "warning":
                    self.run.progress.say(f"warning: {item.message}")
            if dead:
                names = ", ".join(item.where for item in dead[:6])
                more = f" and {len(dead) - 6} more" if len(dead) > 6 else ""
                why = self._why(update, step, [item.where for item in dead])
                raise RunError(
                    "first_step_gate",
                    f"{len(dead)} trained tensors do not learn: {names}{more}. "
                    f"First: {dead[0].message}{why}",
                    where=f"step {step}",
                    fix="audit.first_step_gate: warn goes on anyway; audit.gate_allow takes globs "
                    "of tensors that may stay dead",
                )

    def _why(self, update: Update, step: int, names: Sequence[str]) -> str:
        """The audit's evidence, for the first tensor that it can explain."""
        run, audit = self.run, self.run.audit
        if audit is None:
            return ""
        # A compiled graph hides it: the update is computed once more without, where each rank can.
        if run.adapted.compiled and not run.adapted.sharded:
            try:
                with plain(run.adapted.model):
                    audit.examine(
                        step, lambda: self._replay(update, step), rows=(), error="first_step_gate"
                    )
            except Exception as error:  # the gate's verdict is the one to be seen
                return f": looking into it failed: {type(error).__name__}: {error}"
            finally:
                run.optimizer.zero_grad(set_to_none=True)
        known = audit.explain(step, names)
        for name, text in known.items():
            return f": {text}" if name == names[0] else f"; {name}: {text}"
        return ""

    def _log(self, step: int) -> None:
        window = self.window
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
            self.watch.check if run.world.size == 1 else lambda: None, run.world,
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
        return at_epoch_end or self._time_to_save or state.step == schedule.total

    def _save(self, force: bool = False) -> None:
        run, state = self.run, self.state
        exists = state.step == self._saved
        if state.step == 0 or (force and exists) or not (force or self._save_due()):
            return
        state.seconds = time.monotonic() - self._started
        run.world.check_equal(run.parameters, state.step)
        self._saved, self._last_save = state.step, time.monotonic()
        if not run.world.writes:
            return
        self.metrics.sync()
        if run.audit is not None:
            run.audit.sync()
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
