"""A real step of the longest batch beside the plan: what is foretold, and by how much it is off."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from glasstune.core.batch import IGNORED, MicroBatch
from glasstune.core.errors import GlasstuneError, RunError
from glasstune.core.findings import Finding
from glasstune.core.memory import is_out_of_memory, peak_resident_bytes
from glasstune.core.protocols import Progress
from glasstune.core.units import format_bytes, format_seconds
from glasstune.workflows.plan_batch import largest_batch

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from glasstune.core.plan import PlanRecord
    from glasstune.training.step import AdaptedModel
    from glasstune.workflows.plan import Planned


def measured(planned: Planned, progress: Progress) -> PlanRecord:
    """Loads the model, runs a step of the longest batch and an evaluation batch, and compares.

    Raises:
        RunError: `out_of_memory`: the device had less than was planned.
    """
    from glasstune.workflows.trained_model import open_trained

    prepared = planned.prepared

    def note(finding: Finding) -> None:
        progress.say(f"{finding.severity}: {finding.where}: {finding.message}")

    with memory_named(lambda: planned, None):
        opened = open_trained(prepared, note)
        adapted: AdaptedModel = opened[0]
        try:
            seconds = dry_step(planned, adapted, opened[2])
        finally:
            adapted.slow_down()
    return compared(planned, adapted.device, seconds)


def measured_start(
    planned: Planned, adapted: AdaptedModel, optimizer: Optimizer, progress: Progress
) -> Planned:
    """Runs the longest batch before the first update of a run, and says how far the plan is off.

    Weights, gradients, random states and the order of rows are what they were.

    Raises:
        torch.OutOfMemoryError: The device had less than was planned.
    """
    seconds = dry_step(planned, adapted, optimizer)
    record = compared(planned, adapted.device, seconds)
    assert record.measured_peak_bytes is not None
    assert record.error is not None
    progress.say(
        f"plan: a step of the longest batch took {format_bytes(record.measured_peak_bytes)}, "
        f"{format_bytes(record.peak_bytes)} were planned ({record.error:+.1%}); "
        f"{format_seconds(record.seconds_per_update)} an update, "
        f"{format_seconds(record.total_seconds)} in all"
    )
    return replace(planned, record=record)


def dry_step(planned: Planned, adapted: AdaptedModel, optimizer: Optimizer) -> float:
    """Runs an update of the longest batch without moving anything, and an evaluation batch.

    Where an update has several forwards there are two, since the gradients of one wait for the
    next. Where updates are audited by term, one is. Random states, gradients and the model's mode
    are left as they were.

    Args:
        planned: The plan.
        adapted: The model.
        optimizer: Over its trained tensors; it does not move.

    Returns:
        Seconds of a forward with its backward, not of the first update (that may compile).
    """
    import torch

    from glasstune.audit.update import UpdateAudit
    from glasstune.training.step import compute_update
    from glasstune.workflows.plan_terms import split_terms

    prepared = planned.prepared
    schedule = prepared.schedule
    batch = largest_batch(prepared.data.train, schedule.forward, prepared.pad_id)
    batches = [batch] * min(2, len(schedule.micro_sizes(schedule.share)))
    cuda = adapted.device.type == "cuda"
    was_training = adapted.model.training
    audit = UpdateAudit(adapted.model, optimizer) if split_terms(prepared) else None
    taken = 0.0
    with torch.random.fork_rng(devices=[adapted.device] if cuda else []):
        try:
            adapted.model.train()
            for watching in (audit, None):
                if watching is not None:
                    watching.before_update(1)
                started = time.monotonic()
                compute_update(
                    adapted, prepared.terms, batches, 1, 0, () if watching is None else (watching,),
                    counting=watching, check=False,
                )  # fmt: skip
                if watching is not None:
                    watching.after_backward(1, adapted.model, optimizer)
                _forget(adapted)
                if cuda:
                    torch.cuda.synchronize(adapted.device)
                taken = (time.monotonic() - started) / len(batches)
            if prepared.data.validation is not None:
                held_out = largest_batch(prepared.data.validation, schedule.micro, prepared.pad_id)
                _evaluate(adapted, held_out)
        finally:
            if audit is not None:
                audit.drop()
            adapted.model.train(was_training)
            _forget(adapted)
    return taken


def _forget(adapted: AdaptedModel) -> None:
    for parameter in adapted.model.parameters():
        parameter.grad = None


def _evaluate(adapted: AdaptedModel, batch: MicroBatch) -> None:
    """Computes the losses of a batch as an evaluation does."""
    import torch

    from glasstune.kernels.linear_cross_entropy import token_losses

    adapted.model.eval()
    flat = torch.from_numpy(batch.targets.reshape(-1))
    targets = flat[flat != IGNORED].to(adapted.device)
    with torch.no_grad(), adapted.precision():
        hidden = adapted.trained_hidden(batch, 0)
        token_losses(hidden, adapted.head, targets, adapted.vocabulary)


def ended(planned: Planned, device: torch.device, peak: int, progress: Progress) -> Planned:
    """Puts the peak of a whole run beside its plan, and says by how much it was off.

    Args:
        planned: The plan.
        device: Where the run was.
        peak: Of the rank that took most, as the train record has it.
        progress: Is told.
    """
    record = planned.record
    if device.type == "cuda":
        peak += record.parts["context"]
    error = record.peak_bytes / peak - 1
    progress.say(
        f"plan: the run took {format_bytes(peak)} at its peak, {format_bytes(record.peak_bytes)} "
        f"were planned ({error:+.1%})"
    )
    return replace(planned, record=replace(record, measured_peak_bytes=peak, error=error))


def compared(planned: Planned, device: torch.device, seconds: float) -> PlanRecord:
    """Returns the record with what was measured: the step's peak, and the states still to come."""
    from glasstune.training.metrics import peak_memory_bytes

    record = planned.record
    # The peak may be one without an optimiser (loading): its states are still to come then too.
    states = max(moment.parts["optimizer"] for moment in record.moments)
    peak = peak_memory_bytes(device) + states
    if device.type == "cuda":
        peak += record.parts["context"]
    schedule = planned.prepared.schedule
    update = seconds * schedule.share / schedule.forward
    scale = update / record.seconds_per_update if record.seconds_per_update else 1.0
    return replace(
        record,
        measured_peak_bytes=peak,
        error=record.peak_bytes / peak - 1,
        seconds_per_update=update,
        total_seconds=update * record.updates + record.evaluation_seconds * scale,
        evaluation_seconds=record.evaluation_seconds * scale,
        tokens_per_second=record.tokens_per_second / scale,
        # They are compared with the plan: by the same rate as it.
        alternatives=[
            replace(
                other,
                seconds_per_update=other.seconds_per_update * scale,
                total_seconds=other.total_seconds * scale,
            )
            for other in record.alternatives
        ],
        basis="measured",
    )


class memory_named:
    """Turns an error of the allocator into one that stands beside the plan.

    Args:
        planned: Returns the plan as it is then.
        kept: Returns where the run was and what is not lost, for the message.
    """

    def __init__(
        self, planned: Callable[[], Planned | None], kept: Callable[[], tuple[str, str]] | None
    ) -> None:
        self.planned = planned
        self.kept = kept

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is None or not is_out_of_memory(error):
            return
        # A load takes what torch's CPU says for the checkpoint's fault.
        if isinstance(error, GlasstuneError) and error.code != "cannot_load":
            return
        where, kept = ("", "") if self.kept is None else self.kept()
        raise out_of_memory(error, self.planned(), where, kept) from error


def left_behind(folder: Path, done: int | None, total: int) -> tuple[str, str]:
    """Returns where a run is, and how it goes on from what it has saved.

    Args:
        folder: Of the run.
        done: Its updates so far; None where it has not begun.
        total: All of them.
    """
    from glasstune.workflows.open_model import complete_steps

    steps = complete_steps(folder / "checkpoints")
    kept = f"--resume goes on from step-{steps[-1]}, which is complete" if steps else ""
    if done is None:
        return "while the model is opened", kept
    return f"after update {done} of {total}", kept or "nothing was saved yet: --resume begins again"


def out_of_memory(
    error: BaseException, planned: Planned | None, where: str = "", kept: str = ""
) -> RunError:
    """Returns the one clear error: the plan beside the allocator's numbers."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else "out of memory"
    plan = ""
    fix = "set training.recompute: full, or a smaller data.max_length"
    if planned is not None:
        record = planned.record
        measured = (
            f", a step of the longest batch took {format_bytes(record.measured_peak_bytes)}"
            if record.measured_peak_bytes
            else ""
        )
        plan = (
            f"; planned were {format_bytes(record.peak_bytes)} of "
            f"{format_bytes(record.limit_bytes)} ({record.recompute_layers} of {record.layers} "
            f"layers computed again, {record.rows} x {record.length} tokens){measured}"
        )
        less = format_bytes(_LESS * record.peak_bytes)
        fix = f"training.max_memory: {less} has a way planned that takes a tenth less"
    return RunError(
        "out_of_memory",
        f"memory is short: {first}; {_numbers(planned)}{plan}",
        where=where or "training",
        fix=fix + (f"; {kept}" if kept else ""),
    )


_LESS = 0.9


def _numbers(planned: Planned | None) -> str:
    """What the allocator says, or on a CPU the system."""
    import torch

    if torch.cuda.is_available() and (planned is None or planned.record.device != "CPU"):
        free, total = torch.cuda.mem_get_info()
        used, held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        most = torch.cuda.max_memory_allocated()
        return (
            f"allocated {format_bytes(used)}, at most {format_bytes(most)}, reserved "
            f"{format_bytes(held)}, free {format_bytes(free)} of {format_bytes(total)}"
        )
    from glasstune.planner.host import available_bytes

    return (
        f"this process held at most {format_bytes(peak_resident_bytes())}, free are "
        f"{format_bytes(available_bytes())}"
    )
