"""`glasstune train`: config in, run folder and record out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.core.errors import RunError, StoppedBySignal
from glasstune.core.findings import Finding
from glasstune.core.protocols import Progress, StepAudit
from glasstune.core.ranks import this_rank
from glasstune.core.records import DryRunRecord, TrainRecord
from glasstune.workflows import run_folder
from glasstune.workflows.fp8_keep import Fp8Keep
from glasstune.workflows.open_model import complete_steps
from glasstune.workflows.plan import Planned, plan_start, rows_of_run
from glasstune.workflows.plan_measure import ended, left_behind, measured_start, memory_named
from glasstune.workflows.prepare_run import Prepared, prepare
from glasstune.workflows.ranks import Decided, alone, least_free, meet, same_rows

if TYPE_CHECKING:
    from glasstune.training.checkpoint import Identity, LoopState
    from glasstune.training.distributed import World
    from glasstune.training.run import Outcome, Run
    from glasstune.training.step import AdaptedModel


def train(
    config: Config,
    *,
    resume: str | bool | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
) -> TrainRecord | DryRunRecord:
    """Trains an adapter.

    Args:
        config: The whole configuration; resolved in place.
        resume: True for the newest complete checkpoint, or `step-N`.
        overwrite: Whether a run in the output folder is replaced.
        dry_run: Only checks data and resolves the config; no weights are read.
        progress: Bars and log; None draws them on a terminal, on the first rank.
        notes: Translations of foreign names, recorded in `run.json`.

    Returns:
        The train record, or the dry run's.

    Raises:
        InputError: Config, data, model or folder are wrong; nothing was trained.
        RunError: A gate refused, a number was not finite, the disk was full.
        StoppedBySignal: SIGINT or SIGTERM; a checkpoint was saved.
    """
    if progress is None:
        from glasstune.reports.ranks import progress_of

        rank = this_rank()
        progress = progress_of(rank.index, rank.logs)
    world = meet(config, resume=resume, overwrite=overwrite, dry_run=dry_run)
    try:
        record = _train(config, world, resume, overwrite, dry_run, progress, notes)
    except BaseException as error:
        world.leave(error)
        raise
    world.leave()
    return record


def _train(
    config: Config,
    world: World,
    resume: str | bool | None,
    overwrite: bool,
    dry_run: bool,
    progress: Progress,
    notes: Sequence[str],
) -> TrainRecord | DryRunRecord:
    started = time.monotonic()
    choices = Choices()
    folder = run_folder.output_folder(config, choices)
    writing = world.writes and not dry_run
    made: list[Path] = []
    if writing:
        resume, overwrite = run_folder.resumed_by_torchrun(
            folder, this_rank().restart, resume, overwrite, choices
        )
        made = run_folder.claim_folder(folder, bool(resume), overwrite)
    resume, overwrite = world.broadcast((resume, overwrite))
    with run_folder.sole_writer(folder, choices, made) if writing else nullcontext():
        with world.leader_first("prepare"):
            prepared = prepare(config, choices, progress, rank=world.rank, ranks=world.size)
        same_rows(world, prepared)
        session = _Session(
            config, folder, choices, prepared, progress, list(notes), overwrite, world
        )
        session.plan(bool(resume), always=dry_run)
        if dry_run:
            return session.dry_run_record()
        try:
            with memory_named(lambda: session.planned, session.left_behind):
                run, session.state = session.open(resume)
                return session.close(run, _loop(run, session.state), started)
        finally:
            session.slow_down()


def _loop(run: Run, state: LoopState) -> Outcome:
    from glasstune.training.loop import Loop

    return Loop(run, state).execute()


@dataclass
class _Session:
    """One start of a run: builds the parts, restores them, writes what came of it."""

    config: Config
    folder: Path
    choices: Choices
    prepared: Prepared
    progress: Progress
    notes: list[str]
    overwrite: bool = False
    world: World = field(default_factory=alone)
    findings: list[Finding] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    planned: Planned | None = None
    state: LoopState | None = None
    _adapted: AdaptedModel | None = None
    _left: int = 0

    def plan(self, resume: bool, *, always: bool = False) -> None:
        """Plans memory and time before anything is loaded.

        Raises:
            InputError: `does_not_fit`.
        """
        decided = None
        least = least_free(self.world, self.config)
        if self.world.writes:
            if resume:
                self.prepared = rows_of_run(self.prepared, self.folder)
            self._left = self._updates_left(resume)
            self.planned = plan_start(
                self.prepared, self.progress, self._left, always=always, fixed=resume, least=least
            )
            if self.planned is not None:
                self.prepared = self.planned.prepared
            elif self.world.size > 1:
                asked = self.config.training.distributed.strategy
                why = "nothing had to be planned" if asked == "auto" else "asked for"
                self.choices.record("training.distributed.strategy", self.prepared.strategy, why)
            decided = Decided.of(self.prepared, self.planned, self._left)
        decided = self.world.broadcast(decided)
        if not self.world.writes:
            self._left = decided.updates
            self.prepared, self.planned = decided.follow(self.prepared)

    def dry_run_record(self) -> DryRunRecord:
        """What would be trained, with its plan."""
        record = self.prepared.dry_run_record()
        record.plan = None if self.planned is None else self.planned.record.to_dict()
        return record

    def open(self, resume: str | bool | None) -> tuple[Run, LoopState]:
        """Loads the model, builds optimiser and hooks, restores a checkpoint where asked."""
        from glasstune.training.checkpoint import LoopState, share_state
        from glasstune.training.run import Run
        from glasstune.workflows.ranks import joined
        from glasstune.workflows.trained_model import first_step_gate, open_trained
        from glasstune.workflows.trained_speed import speed_line

        keep = Fp8Keep(self.folder if resume else None, self.world)
        adapted, parameters, optimizer = open_trained(
            self.prepared, self._note, updates=self._left, keep=keep
        )
        self._adapted = adapted
        self.extra["ranks"] = joined(self.world, adapted, self._note)
        if self.overwrite and self.world.writes:
            run_folder.clear_run(self.folder)
        run = Run(
            config=self.config,
            folder=self.folder,
            adapted=adapted,
            parameters=parameters,
            optimizer=optimizer,
            terms=self.prepared.terms,
            train=self.prepared.data.train,
            validation=self.prepared.data.validation,
            schedule=self.prepared.schedule,
            pad_id=self.prepared.pad_id,
            identity=self._identity(adapted, parameters),
            write_adapter=self._adapter_writer(adapted),
            progress=self.progress,
            hooks=first_step_gate(self.config, adapted, self.prepared.terms, self.world),
            writers=self._writers() if self.world.writes else (),
            world=self.world,
        )
        state = self._restore(run, resume) if self.world.writes else LoopState()
        state = share_state(self.world, state, parameters, optimizer)
        if self.planned is not None and adapted.device.type == "cuda":
            self.planned = measured_start(self.planned, adapted, optimizer, self.progress)
        run.audit = self._audit(run, state.attempt)
        assert adapted.speed_record is not None
        record = adapted.speed_record.to_dict()
        self.extra.update(
            device=str(adapted.device),
            environment=run.identity.environment,
            notes=self.notes,
            base=self.prepared.resolved.fingerprint,
            data=self.prepared.data.record.to_dict(),
            data_fingerprint=self.prepared.data.fingerprint,
            updates=run.schedule.total,
            attempt=state.attempt,
            adapter_checkpoint=None,
            plan=None if self.planned is None else self.planned.record.to_dict(),
            speed={"modules": record["modules"], "compiled": record["compiled"]},
        )
        if self.world.writes:
            run_folder.write_start(self.folder, self.config, self.choices, self.extra)
            keep.write(self.folder)
        for choice in self.choices:
            self.progress.say(f"{choice.name}: {choice.value} ({choice.reason})")
        self.progress.say(speed_line(adapted.speed_record))
        for line in keep.lines():
            self.progress.say(line)
        for finding in self.prepared.data.record.findings:  # before hours are spent on them
            self.progress.say(f"{finding.severity}: {finding.where}: {finding.message}")
        return run, state

    def _updates_left(self, resume: bool) -> int:
        """Updates of this start; of the whole run where every start must compute the same bits."""
        total = self.prepared.schedule.total
        if not resume or self.config.training.deterministic:
            return total
        steps = complete_steps(self.folder / "checkpoints")
        return total - steps[-1] if steps else total

    def left_behind(self) -> tuple[str, str]:
        """Where the run is and what of it is on the disk, for the message of an early end."""
        done = None if self.state is None else self.state.step
        return left_behind(self.folder, done, self.prepared.schedule.total)

    def slow_down(self) -> None:
        """Takes back what was sped up, and torch's settings with it."""
        if self._adapted is not None:
            self._adapted.slow_down()

    def _note(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings.append(finding)
            self.progress.say(f"{finding.severity}: {finding.where}: {finding.message}")

    def _identity(self, adapted: AdaptedModel, parameters: Any) -> Identity:
        import torch

        from glasstune.training.checkpoint import Identity

        return Identity(
            config={
                **run_folder.binding_config(self.config),
                **{f"losses.{term.name}.code": term.fingerprint for term in self.prepared.terms},
            },
            data=self.prepared.data.fingerprint,
            base=self.prepared.resolved.fingerprint,
            parameters={name: list(value.shape) for name, value in parameters.items()},
            environment={
                **run_folder.versions(),
                "device": torch.cuda.get_device_name(adapted.device)
                if adapted.device.type == "cuda"
                else "cpu",
                "threads": torch.get_num_threads(),
                "instruction_set": torch.backends.cpu.get_cpu_capability(),
                "ranks": self.world.size,
            },
        )

    def _adapter_writer(self, adapted: AdaptedModel) -> Any:
        from glasstune.adapters.saving import save_adapter, verify_saved

        def write(target: Path) -> None:
            resolved = self.prepared.resolved
            save_adapter(adapted.model, target, resolved.path, resolved.fingerprint)
            verify_saved(adapted.model, target)
            self.prepared.data.template.save(target)

        return write

    def _audit(self, run: Run, attempt: int) -> StepAudit:
        from glasstune.audit.live import LiveAudit

        audit = self.config.audit
        return LiveAudit(
            run.adapted.model,
            run.optimizer,
            self.folder,
            every=audit.every_n_steps,
            structure=audit.first_step_gate != "off",
            log_every=self.config.training.logging_steps,
            total=run.schedule.total,
            attempt=attempt,
            exchange=self.world,
        )

    def _writers(self) -> list[Any]:
        from glasstune.reports.metrics import make_writers

        training = self.config.training
        return make_writers(training.report_to, self.folder, training.run_name)

    def _restore(self, run: Run, resume: str | bool | None) -> LoopState:
        from glasstune.training import checkpoint
        from glasstune.training.metrics import supersede

        checkpoint.clean_aside(run.checkpoints)
        if not resume:
            return checkpoint.LoopState(total=run.schedule.total)
        which = resume if isinstance(resume, str) else None
        folder = checkpoint.find_checkpoint(run.checkpoints, which, self.progress.say)
        if folder is None:
            supersede(self.folder, -1)
            self.choices.record(
                "resume", "start", "the run was stopped before its first complete checkpoint"
            )
            return checkpoint.LoopState(
                total=run.schedule.total, attempt=run_folder.attempts(self.folder) + 1
            )
        state, saved = checkpoint.read_state(folder)
        for difference in checkpoint.check_identity(saved, run.identity, folder):
            text = f"the machine differs ({difference}): weights agree closely, not bit for bit"
            self._note(Finding("resume_environment", "warning", str(folder), text))
        checkpoint.restore(folder, run.adapted.model, run.optimizer)
        checkpoint.set_aside_newer(run.checkpoints, state.step, self.progress.say)
        supersede(self.folder, state.step)
        if forgotten := checkpoint.forget_lost_best(run.checkpoints, state):
            self._note(Finding("best_lost", "warning", str(folder), forgotten))
        state.attempt = run_folder.attempts(self.folder) + 1
        self.choices.record("resume", folder.name, f"goes on after update {state.step}")
        if state.total != run.schedule.total:
            self.choices.record(
                "schedule",
                run.schedule.total,
                f"planned for {state.total} updates before; the learning rate follows the new "
                "schedule from here on",
            )
            state.total = run.schedule.total
        return state

    def close(self, run: Run, outcome: Outcome, started: float) -> TrainRecord:
        """Publishes the adapter and builds the record.

        Raises:
            StoppedBySignal: The loop was interrupted; its checkpoint is the place to go on from.
        """
        from glasstune.training.metrics import peak_memory_bytes

        state = outcome.state
        if outcome.stopped_by == "signal":
            raise StoppedBySignal(
                "stopped_by_signal",
                f"stopped after update {state.step} of {run.schedule.total}",
                where=str(self.folder),
                fix="the same command with --resume goes on from here",
            )
        if state.step == 0:
            raise RunError(
                "nothing_trained",
                f"no update had a trained token ({state.skipped} were skipped)",
                fix="look at the data with glasstune data",
            )
        peak = max(self.world.gather(peak_memory_bytes(run.adapted.device)))
        record = self._publish(run, outcome, started, peak) if self.world.writes else None
        published: TrainRecord = self.world.broadcast(record)
        return published

    def _publish(self, run: Run, outcome: Outcome, started: float, peak: int) -> TrainRecord:
        from glasstune.adapters.saving import verify_saved
        from glasstune.training.checkpoint import publish_adapter
        from glasstune.training.loop import load_best

        state = outcome.state
        step, source = load_best(run, state)
        adapter = self.folder / "adapter"
        publish_adapter(source, adapter)
        verify_saved(run.adapted.model, adapter)
        reason = "lowest held-out loss" if step == state.best_step else "the last update"
        self.extra["adapter_checkpoint"] = self.choices.record(
            "adapter_checkpoint", f"step-{step}", reason
        )
        if self.planned is not None:
            self.planned = ended(self.planned, run.adapted.device, peak, self.progress)
            self.extra["plan"] = self.planned.record.to_dict()
        run_folder.write_run(self.folder, self.choices, self.extra)
        return TrainRecord(
            ok=True,
            stopped_by=outcome.stopped_by,
            updates=state.step,
            eval_loss_before=state.loss_before,
            eval_loss_after=state.best_loss if step == state.best_step else state.last_loss,
            best_step=state.best_step,
            seconds=round(time.monotonic() - started, 3),
            trained_tokens=state.trained_tokens,
            peak_memory_bytes=peak,
            adapter=str(adapter),
            resumable=True,
            findings=[*self.prepared.data.record.findings, *self.findings, *outcome.findings],
        )
