"""`glasstune plan`: bytes, seconds and disk of a run, before it starts."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from glasstune.core.choices import WARNING, Choices
from glasstune.core.config import Config
from glasstune.core.config_load import load_config
from glasstune.core.errors import InputError
from glasstune.core.memory import is_out_of_memory
from glasstune.core.plan import PlanRecord
from glasstune.core.protocols import Progress
from glasstune.core.recompute import Recompute
from glasstune.core.units import format_bytes
from glasstune.workflows.prepare_run import Prepared, prepare

if TYPE_CHECKING:
    from glasstune.planner.choose import Option
    from glasstune.workflows.plan_work import Work


def plan(config: Config, *, measure: bool = False, progress: Progress | None = None) -> PlanRecord:
    """Foretells a run; no weight is read unless it is measured.

    Args:
        config: The whole configuration; resolved in place.
        measure: Whether the model is loaded and one step of the longest batch is run.
        progress: Bars and log; None draws them on a terminal.

    Raises:
        InputError: Config, data or model are wrong, or the run does not fit (with the numbers).
    """
    if progress is None:
        from glasstune.reports.terminal import RichProgress

        progress = RichProgress()
    choices = Choices()
    prepared = prepare(config, choices, progress)
    planned = plan_run(prepared, progress)
    record = planned.record
    if measure:
        from glasstune.workflows.plan_measure import measured

        record = measured(planned, progress)
    record.choices = [item for item in choices.to_list() if item["name"] != "plan.peak"]
    return record


@dataclass(frozen=True)
class Planned:
    """A plan, and the run that it is of.

    Args:
        record: What is foretold.
        prepared: The run before its weights; the rows of a forward are those of the plan.
        recompute: Layers computed again.
    """

    record: PlanRecord
    prepared: Prepared
    recompute: Recompute


def plan_run(
    prepared: Prepared,
    progress: Progress,
    *,
    updates: int | None = None,
    fixed: bool = False,
    least: int | None = None,
) -> Planned:
    """Plans a prepared run; refuses one that does not fit.

    Args:
        prepared: The run before its weights.
        progress: Log.
        updates: How many will be made by this start; None for all.
        fixed: Whether the rows of a forward are those of the schedule, whatever fits.
        least: Free bytes of the rank that has least, where there are several.

    Raises:
        InputError: `does_not_fit`: names the bytes and three ways out.
    """
    progress.say("planning memory and time")
    from glasstune.workflows.plan_work import Work

    def chosen(ready: Prepared) -> tuple[Work, Option, int]:
        work = Work(ready, updates, least)
        work.asked_rows |= fixed
        return (work, *work.choose())

    try:
        work, option, rows = chosen(prepared)
        why = "the base fits each device"
    except InputError as error:
        if error.code != "does_not_fit" or not prepared.may_shard:
            raise
        why = f"with the whole base on each device {error.message}"
        prepared = replace(prepared, strategy="fsdp2")
        work, option, rows = chosen(prepared)
    if prepared.schedule.ranks > 1:
        asked = prepared.config.training.distributed.strategy
        why = why if asked == "auto" else "asked for"
        prepared.choices.record("training.distributed.strategy", prepared.strategy, why)
    if rows != prepared.schedule.micro:
        why_rows = f"{prepared.schedule.micro} would not be the fastest that fits"
        prepared.choices.record("training.per_device_train_batch_size", rows, why_rows)
    schedule = replace(prepared.schedule, micro=rows)
    prepared.config.training.per_device_train_batch_size = rows
    record = work.record(option, rows)
    prepared.choices.record("plan.peak", format_bytes(record.peak_bytes), record.reason)
    ready = replace(prepared, schedule=schedule, recompute=option.recompute)
    return Planned(record, ready, option.recompute)


def plan_start(
    prepared: Prepared,
    progress: Progress,
    updates: int,
    *,
    always: bool = False,
    fixed: bool = False,
    least: int | None = None,
) -> Planned | None:
    """Plans the start of a training run.

    Args:
        prepared: The run before its weights.
        progress: Log.
        updates: How many this start will make.
        always: Whether small runs are planned too.
        fixed: As in `plan_run`.
        least: As in `plan_run`.

    Returns:
        The plan; None where the run is so small that nothing is to be planned, or where the plan
        could not be made (which is said: training then decides by a rule of thumb).

    Raises:
        InputError: `does_not_fit`.
    """
    if not always and small(prepared):
        return None
    try:
        planned = plan_run(prepared, progress, updates=updates, fixed=fixed, least=least)
    except InputError:
        raise
    except Exception as error:  # a plan that cannot be made must not stop a run that can
        _not_made(error, prepared, progress)
        return None
    training, layers = prepared.config.training, planned.record.layers
    chosen = planned.recompute
    for finding in planned.record.findings:
        if finding.code == "offload_is_full":
            prepared.choices.record(finding.where, "full", finding.message)
    if chosen.budget < 1:
        prepared.choices.record("training.memory_budget", chosen.budget, planned.record.reason)
    elif chosen.layers in (0, layers):
        training.recompute = "offload" if chosen.offload else "full" if chosen.layers else "none"
    prepared.choices.record("recompute_layers", chosen.layers, planned.record.reason)
    return planned


def _not_made(error: Exception, prepared: Prepared, progress: Progress) -> None:
    """Says why there is no plan: with its traceback, since that is our fault, and what it costs."""
    short = is_out_of_memory(error)
    if not short:
        for line in traceback.format_exception(error):
            progress.say(line.rstrip())
        progress.say(
            "the plan could not be made, which is a bug of Glasstune: please report it with the "
            "lines above; the run goes on without a plan"
        )
    says = (str(error).splitlines() or [""])[0]
    limit = prepared.config.training.max_memory
    unkept = "" if limit is None else f", and nothing keeps the run within {limit}"
    why = f"{type(error).__name__}: {says}; a rule of thumb decides which layers are computed again"
    prepared.choices.record("plan", "not made", f"{WARNING}{why}{unkept}")


def rows_of_run(prepared: Prepared, folder: Path) -> Prepared:
    """Returns a run that goes on with the rows of a forward that it began with.

    They are chosen by what was free then, and a checkpoint belongs to them.

    Args:
        prepared: The run.
        folder: Its folder.
    """
    key, file = "training.per_device_train_batch_size", folder / "config.yaml"
    if prepared.choices.get(key) is None or not file.is_file():
        return prepared  # the user says it, or nothing is there to go on from
    rows = load_config(file).config.training.per_device_train_batch_size
    if not isinstance(rows, int) or rows == prepared.schedule.micro:
        return prepared
    training = prepared.config.training
    training.per_device_train_batch_size = prepared.choices.record(key, rows, "as the run began")
    return replace(prepared, schedule=replace(prepared.schedule, micro=rows))


def small(prepared: Prepared) -> bool:
    """Whether a CPU run's activations are far below anything that a machine has."""
    from glasstune.models.load import choose_device

    config = prepared.config
    on_cpu = choose_device(config.model.device, Choices()).type == "cpu"
    if config.training.max_memory is not None or not on_cpu:
        return False
    text = prepared.resolved.config.get_text_config(decoder=True)
    tokens = prepared.schedule.micro * config.data.max_length
    width = int(text.hidden_size) + int(getattr(text, "intermediate_size", None) or 0)
    needed = tokens * (int(text.num_hidden_layers) * 40 * width + 8 * int(text.vocab_size))
    return needed < SMALL


SMALL = 2**30
"""Bytes; below, a rough upper bound of the activations asks for no plan."""
