"""Writes base plus adapter, one group of tensors at a time: summed in float32, rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from glasstune.adapters.changes import Change, Replace
from glasstune.core.errors import RunError
from glasstune.core.protocols import Progress
from glasstune.export.merge_plan import MergePlan, with_rows
from glasstune.export.read_bar import ReadBar
from glasstune.export.shards import ShardWriter
from glasstune.models.conversion import Group

CHUNK = 2**24
"""Values that are float32 at a time: 64 MB."""

_TASK = "merge"


@torch.no_grad()
def write_weights(plan: MergePlan, folder: Path, progress: Progress | None = None) -> int:
    """Writes the merged weights and their index.

    Args:
        plan: From `make_plan`.
        folder: Where they go; it exists.
        progress: Shows the megabytes read.

    Returns:
        How many tensors of the checkpoint were changed by the adapter.

    Raises:
        InputError: A merged tensor cannot be written as the checkpoint stores it.
        RunError: `not_finite`: a sum overflows or the base holds NaN or Inf.
    """
    reader = plan.reader
    bar = ReadBar(progress, _TASK, sum(place.size for place in reader.places.values()))
    writer = ShardWriter(folder, plan.slots)
    changed = 0
    checked: set[int] = set()
    try:
        for group in sorted(reader.map.groups, key=lambda group: _first_place(plan, group)):
            if group.converter is not None and id(group.converter) not in checked:
                checked.add(id(group.converter))  # one group of each kind tells of all
                if any(name in plan.changes for name in group.weights):
                    reader.map.check_way_back(group, reader.tensor)
            changed += _write_group(plan, group, writer)
            bar.advance(sum(reader.places[key].size for key in group.keys))
        for key in reader.map.unused:
            writer.write(key, reader.tensor(key))
            bar.advance(reader.places[key].size)
        for target, source in plan.untied.items():
            if target not in reader.map.by_weight:
                group = reader.map.by_weight[source]
                value = reader.map.forward(group, reader.tensor)[source]
                writer.write(target, _merged(plan, target, source, value))
                changed += bool(plan.changes.get(target))
        writer.finish()
    finally:
        writer.abandon()
        bar.finish()
    return changed


def _write_group(plan: MergePlan, group: Group, writer: ShardWriter) -> int:
    """Writes the tensors of one group; returns how many were changed."""
    reader = plan.reader
    touched = any(name in plan.changes for name in group.weights)
    if group.converter is not None and not touched and plan.base_value is None:
        for key in group.keys:  # nothing to convert: each tensor as it is
            writer.write(key, _rounded(plan, key, reader.tensor(key)))
        return 0
    weights = reader.map.forward(group, reader.tensor)
    merged = {}
    for name in group.weights:
        merged[name] = _merged(plan, name, name, weights.pop(name))
    for key, value in reader.map.backward(group, merged).items():
        writer.write(key, value)
    return len(group.keys) if touched else 0


def _merged(plan: MergePlan, name: str, stored_as: str, value: Tensor) -> Tensor:
    """Returns a weight with its changes, in the output's type.

    Args:
        plan: The merge.
        name: The weight.
        stored_as: Name under which the base has it (another's for a tied one).
        value: As it is stored; its memory may be used.
    """
    if not value.is_floating_point():
        return value
    if plan.base_value is not None:
        value = plan.base_value(stored_as, value)
    dtype = torch.float32 if name in plan.float32 else getattr(torch, plan.job.dtype)
    changes = plan.changes.get(name, [])
    if not changes:
        return _checked(value.to(dtype), name)
    return _checked(add_changes(with_rows(value, plan.shapes[name]), changes, dtype), name)


def add_changes(value: Tensor, changes: Sequence[Change], dtype: torch.dtype) -> Tensor:
    """Applies changes in float32 and rounds once, a few rows at a time.

    Args:
        value: The weight as stored; its memory is used where the type stays.
        changes: In order.
        dtype: Of the result.
    """
    start_over = [at for at, change in enumerate(changes) if isinstance(change, Replace)]
    if start_over:
        last = changes[start_over[-1]]
        assert isinstance(last, Replace)
        value, changes = last.value.clone(), changes[start_over[-1] + 1 :]
    rows = value.shape[0] if value.dim() else 1
    step = max(1, CHUNK // max(1, value.numel() // rows))
    if value.dim() == 0 or any(change.rows(0, 1) is None for change in changes):
        step = rows
    out = value if value.dtype == dtype else torch.empty_like(value, dtype=dtype)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        whole = step >= rows
        part = (value if whole else value[start:stop]).float()
        for change in changes:
            some = change if whole else change.rows(start, stop)
            assert some is not None
            part = some.apply(part)
        (out if whole else out[start:stop]).copy_(part)
    return out


def _rounded(plan: MergePlan, key: str, value: Tensor) -> Tensor:
    return _checked(value.to(getattr(torch, plan.slots[key].dtype)), key)


def _checked(value: Tensor, name: str) -> Tensor:
    """Refuses NaN and Inf: float16 ends at 65,504."""
    if value.is_floating_point() and value.numel():
        low, high = torch.aminmax(value)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            dtype = str(value.dtype).removeprefix("torch.")
            raise RunError(
                "not_finite",
                f"the merged {name} holds NaN or Inf as {dtype}",
                where=name,
                fix="use --dtype bfloat16 or float32"
                if value.dtype == torch.float16
                else "look at base and adapter: one of them holds NaN, Inf or huge numbers",
            )
    return value


def _first_place(plan: MergePlan, group: Group) -> tuple[str, int]:
    places = [plan.reader.places[key] for key in group.keys]
    return min((str(place.file), place.offset) for place in places)
