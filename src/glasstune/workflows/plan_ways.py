"""Other ways to run the same rows, and the ways out where none fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glasstune.core.errors import InputError
from glasstune.core.plan import Alternative
from glasstune.core.recompute import Recompute
from glasstune.core.units import format_bytes

if TYPE_CHECKING:
    from glasstune.planner.choose import Option
    from glasstune.workflows.plan_work import Work

_SHORTEST = 64
"""Tokens; shorter rows are no advice."""


def alternatives(work: Work, chosen: Option, rows: int) -> list[Alternative]:
    """Returns other policies, rows of a forward and lengths, those that fit first."""
    from glasstune.planner.choose import policy_name

    schedule, longest = work.prepared.schedule, work.batch.length
    found: list[Alternative] = []

    def add(change: dict[str, Any], recompute: Recompute, count: int, length: int) -> None:
        peak = work.peak(count, recompute, length).bytes
        seconds = work.seconds(count, recompute, length)
        total = seconds * work.total + work.evaluation_seconds(count)
        found.append(Alternative(change, peak, total, peak <= work.limit, seconds))

    layers = work.model.layers
    for policy in (Recompute(0), Recompute(layers), Recompute(layers, offload=True)):
        cuda = work.device.kind == "cuda"
        if policy != chosen.recompute and layers and (cuda or not policy.offload):
            name = policy_name(policy, layers)
            add({"training.recompute": name}, policy, rows, longest)
    for count in sorted({rows * 2, rows // 2, 1} - {rows, 0}):
        if count <= schedule.batch:
            key = "training.per_device_train_batch_size"
            add({key: count}, chosen.recompute, count, longest)
    for length in _lengths(work):
        add({"data.max_length": length}, chosen.recompute, rows, length)
    return sorted(found, key=lambda item: (not item.fits, item.total_seconds))


def _lengths(work: Work) -> list[int]:
    """Returns other values of `data.max_length` that make the longest row another.

    Longer rows come only where the limit makes them what they are and the model has positions.
    """
    from glasstune.models.facts import model_facts

    longest = work.batch.length
    found = [longest // 2] if longest // 2 >= _SHORTEST else []
    positions = model_facts(work.prepared.resolved.config).max_positions
    if longest >= work.config.data.max_length and (positions is None or longest * 2 <= positions):
        found.append(longest * 2)
    return found


def refusal(work: Work) -> InputError:
    """Returns the error of a run that does not fit: its bytes, and three ways out."""
    smallest = min(work.row_numbers())
    least = min(work.options(smallest), key=lambda option: option.peak)
    moment = work.peak(smallest, least.recompute)
    parts = ", ".join(
        f"{name} {format_bytes(size)}"
        for name, size in sorted(moment.parts.items(), key=lambda item: -item[1])[:3]
    )
    return InputError(
        "does_not_fit",
        f"the run needs {format_bytes(least.peak)} at its {moment.phase} ({parts}), and "
        f"{format_bytes(work.limit)} may be used ({work.limit_reason})",
        where="training.max_memory" if work.config.training.max_memory else "model.path",
        fix="; or ".join(_ways_out(work, least, smallest)),
    )


def _ways_out(work: Work, least: Option, rows: int) -> list[str]:
    """Three ways, each with its number."""
    found: list[str] = []
    config = work.config

    def way(change: str, peak: int) -> None:
        still = "" if peak <= work.limit else ", still too much alone"
        found.append(f"{change} ({format_bytes(peak)}{still})")

    if config.model.bits > 4:
        fewer = _base_at(work, 4)
        peak = least.peak - work.model.static.base - work.model.static.wide + fewer
        way("model.bits: 4", peak)
    if config.training.recompute in ("none", "full") and work.device.kind == "cuda":
        policy = Recompute(work.model.layers, offload=True)
        peak = work.peak(rows, policy).bytes
        way("training.recompute: auto or offload", peak)
    elif config.training.recompute == "none":
        peak = work.peak(rows, Recompute(work.model.layers)).bytes
        way("training.recompute: auto", peak)
    if rows > 1:
        peak = work.peak(1, least.recompute).bytes
        way("training.per_device_train_batch_size: 1", peak)
    length = work.batch.length // 2
    if length >= _SHORTEST:
        shorter = work.peak(rows, least.recompute, length).bytes
        way(f"data.max_length: {length}", shorter)
    # Those that are enough come first; a larger limit always is.
    found.sort(key=lambda text: "still" in text)
    found += ["a smaller base model", "a smaller adapter.r"][: max(0, 2 - len(found))]
    return [*found[:2], f"a device or max_memory of {format_bytes(least.peak)} and more"]


def _base_at(work: Work, bits: int) -> int:
    from glasstune.models.inspect.precision import precision_record

    setup = work.model.setup
    record = precision_record(
        setup.source, bits, {"bnb_4bit_use_double_quant": True}, dtype=setup.dtype
    )
    return record.total_bytes
