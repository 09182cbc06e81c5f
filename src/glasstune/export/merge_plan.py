"""What a merge will do, known in full before a weight is read: names, shapes, types, ties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glasstune.adapters.attach import Attached, attach, embedding_rows, refuse_unmergeable
from glasstune.adapters.changes import Changes, Replace, Rows, read_changes, same_effect
from glasstune.adapters.inject import read_lora_config
from glasstune.adapters.reading import read_adapter_file
from glasstune.core.certificate import Onto
from glasstune.core.config import ModelConfig
from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.export.shards import Slot
from glasstune.models.conversion import Group, KeyMap, missing_weights, tied_sources
from glasstune.models.empty import empty_model, float32_names, refuse_quantized
from glasstune.models.reader import WeightReader
from glasstune.models.resolve import ResolvedModel
from glasstune.models.streaming import module_paths
from glasstune.models.training_base import TrainingBase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class MergeJob:
    """What is merged into what.

    Args:
        adapter: Folder in PEFT's format.
        resolved: The base.
        folder: Local folder with the base's weights.
        trained: The run's model section, where a run tells it.
        onto: The original weights, or what training's precision made of them.
        dtype: Type of the output.
        fp8_keep: Where the run's products were float8, its `training.fp8_keep`; else None.
    """

    adapter: Path
    resolved: ResolvedModel
    folder: Path
    trained: ModelConfig | None
    onto: Onto = "original"
    dtype: str = "bfloat16"
    fp8_keep: Sequence[str] | None = None


@dataclass
class MergePlan:
    """A merge, ready to be written.

    Args:
        job: What was asked.
        model: The plain empty base; PEFT stands around some of its modules.
        paths: Its modules' paths before PEFT came.
        shapes: Of its weights, by name.
        attached: The adapter on it.
        changes: What changes, by weight.
        reader: The base's weights as they are stored.
        training: What training made of them; None where no run tells.
        float32: Weights that stay float32.
        untied: Weights that shared another's and get their own, to that other's name.
        slots: The output's tensors, in the order of its files.
        rows: Rows of the embedding, where training had more than the base; else None.
        tied: `kept`, `untied` or `no`.
        findings: What should be known.
    """

    job: MergeJob
    model: PreTrainedModel
    paths: dict[int, str]
    shapes: dict[str, tuple[int, ...]]
    attached: Attached
    changes: Changes
    reader: WeightReader
    training: TrainingBase | None
    float32: set[str]
    untied: dict[str, str]
    slots: dict[str, Slot]
    rows: int | None
    tied: str
    findings: list[Finding]

    @property
    def bytes(self) -> int:
        """Bytes of the output's weights."""
        return sum(slot.bytes for slot in self.slots.values())

    @property
    def base_value(self) -> TrainingBase | None:
        """What is done to a stored weight before the adapter is added."""
        return self.training if self.job.onto == "training" else None

    def fetch(self, names: list[str], expand: TrainingBase | None) -> dict[str, Tensor]:
        """Reads weights of the base for a forward, with the rows that training added.

        Args:
            names: In the plain base.
            expand: What training made of them, or None for the original.
        """
        found = self.reader.fetch(names)
        values = {}
        for name, value in found.items():
            value = value if expand is None else expand(self.reader.origin(name), value)
            values[name] = with_rows(value, self.shapes[name])
        return values


def make_plan(job: MergeJob) -> MergePlan:
    """Lays adapter, base and output onto each other; reads headers and the adapter, no weight.

    Raises:
        InputError: Base, adapter or options do not fit each other; says which tensors.
    """
    config = job.resolved.config
    refuse_quantized(config, f"base={job.resolved.path}")
    findings: list[Finding] = []
    adapter = read_lora_config(job.adapter)
    refuse_unmergeable(adapter, job.adapter)
    tensors = read_adapter_file(job.adapter)
    model = _empty(job, False)
    reader = WeightReader(job.folder, model)
    if _stored_apart(model, reader):
        model = _empty(job, True)
        reader = WeightReader(job.folder, model)
        says = "the config ties head and embedding, the checkpoint stores two different ones"
        findings.append(Finding("tied_by_name_only", "info", str(job.folder), says))
    findings += reader.findings
    rows = _grow(model, tensors, adapter)
    paths = module_paths(model)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    attached = attach(model, job.adapter, paths, tensors)
    changes = read_changes(attached, paths)
    training = (
        None
        if job.trained is None
        else TrainingBase(_empty(job, False), job.trained, job.fp8_keep, adapted=set(changes))
    )
    names = [name for group in reader.map.groups for name in group.weights]
    dtype: torch.dtype = getattr(torch, job.dtype)
    float32 = float32_names(_empty(job, False), names, dtype)
    untied = _untied(model, changes)
    ties = bool(tied_sources(model))
    plan = MergePlan(
        job=job, model=model, paths=paths, shapes=shapes, attached=attached, changes=changes,
        reader=reader, training=training, float32=float32, untied=untied, slots={}, rows=rows,
        tied="untied" if untied else "kept" if ties else "no", findings=findings,
    )  # fmt: skip
    _check_targets(plan)
    _check_new_rows(plan)
    plan.slots = _slots(plan)
    if untied:
        _check_untied(plan)
    return plan


def _empty(job: MergeJob, untied: bool) -> PreTrainedModel:
    trust = job.resolved.trust_remote_code
    return empty_model(job.resolved.config, trust_remote_code=trust, untied=untied)


def _stored_apart(model: Any, reader: WeightReader) -> bool:
    """Whether a tied weight lies in the checkpoint with other values than the one it is tied to."""
    for target, source in tied_sources(model).items():
        groups = [reader.map.by_weight.get(name) for name in (target, source)]
        if groups[0] is None or groups[1] is None:
            continue
        one, other = (reader.map.forward(group, reader.tensor) for group in groups if group)
        if not torch.equal(one[target], other[source]):
            return True
    return False


def _grow(model: Any, tensors: Mapping[str, Tensor], adapter: Any) -> int | None:
    """Gives the embedding as many rows as training had; the head follows."""
    own = int(model.get_input_embeddings().weight.shape[0])
    rows = embedding_rows(tensors, model, module_paths(model))
    indices = getattr(adapter, "trainable_token_indices", None) or ()
    listed = indices.values() if isinstance(indices, Mapping) else [indices]
    rows = max([rows, *(int(index) + 1 for part in listed for index in part)])
    if rows <= own:
        return None
    with torch.device("meta"):
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.requires_grad_(False)
    return rows


def _untied(model: Any, changes: Changes) -> dict[str, str]:
    """Returns the tied weights that the adapter makes different from the one they share."""
    return {
        target: source
        for target, source in tied_sources(model).items()
        if not same_effect(changes.get(target, []), changes.get(source, []))
    }


def _check_targets(plan: MergePlan) -> None:
    """Refuses a change of a weight that the checkpoint does not have."""
    lost = [name for name in plan.changes if plan.reader.origin(name) not in _stored(plan)]
    if lost:
        raise InputError(
            "adapter_keys",
            f"the adapter changes {len(lost)} weights that the base's files do not hold, for "
            f"example {lost[:3]}; they hold {list(plan.reader.places)[:3]} and others",
            where=str(plan.job.adapter),
            fix="give the adapter's own base with --base",
        )


def _stored(plan: MergePlan) -> Mapping[str, Group]:
    return plan.reader.map.by_weight


def _check_new_rows(plan: MergePlan) -> None:
    """Refuses rows that training added and that no tensor of the adapter holds."""
    if plan.rows is None:
        return
    for part in (plan.model.get_input_embeddings(), plan.model.get_output_embeddings()):
        name = _weight_name(plan, part)
        if name is None:
            continue
        group = plan.reader.map.by_weight[plan.reader.origin(name)]
        have = int(plan.reader.places[group.keys[0]].shape[0])
        changes = plan.changes.get(name, [])
        if have >= plan.rows or any(isinstance(change, Replace) for change in changes):
            continue
        known = {i for change in changes if isinstance(change, Rows) for i in change.indices}
        missing = [index for index in range(have, plan.rows) if index not in known]
        if missing:
            raise InputError(
                "rows_not_saved",
                f"training had {plan.rows:,} rows in {name}, the base has {have:,}, and the "
                f"adapter does not hold the values of {len(missing)} new ones (row {missing[0]} "
                "and on)",
                where=str(plan.job.adapter),
                fix="save the adapter with save_embedding_layers=True, or train with "
                "trainable_token_indices or modules_to_save for the new tokens",
            )


def _weight_name(plan: MergePlan, part: Any) -> str | None:
    """The plain name of an embedding's or head's weight, whatever PEFT put around it."""
    seen = {id(part): part}
    if hasattr(part, "modules"):
        seen |= {id(inner): inner for inner in part.modules()}
    found = [plan.paths[key] for key in seen if key in plan.paths]
    return f"{found[0]}.weight" if found else None


def _slots(plan: MergePlan) -> dict[str, Slot]:
    reader, job = plan.reader, plan.job
    files = sorted({str(place.file) for place in reader.places.values()})
    name_of = {
        key: group.first
        for group in reader.map.groups
        if group.converter is None
        for key in group.keys
    }
    kept = {key for g in reader.map.groups if set(g.weights) & plan.float32 for key in g.keys}
    slots: dict[str, Slot] = {}
    for key, place in sorted(reader.places.items(), key=lambda item: _order(item[1])):
        shape = place.shape
        if key in name_of:
            shape = _new_shape(plan, name_of[key], shape)
        dtype = _dtype(place.dtype, job.dtype, key in kept, key in reader.map.unused)
        slots[key] = Slot(shape, dtype, files.index(str(place.file)))
    for target, source in plan.untied.items():
        if target in reader.map.by_weight:
            continue
        group = reader.map.by_weight[source]
        shape = _new_shape(plan, target, slots[group.keys[0]].shape)
        slots[target] = Slot(shape, slots[group.keys[0]].dtype, len(files) - 1)
    return slots


def _new_shape(plan: MergePlan, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    for change in plan.changes.get(name, []):
        if isinstance(change, Replace):
            shape = tuple(change.value.shape)
        if isinstance(change, Rows) and plan.rows is not None:
            shape = (max(plan.rows, shape[0]), *shape[1:])
    return shape


def _order(place: Any) -> tuple[str, int]:
    return str(place.file), place.offset


def _dtype(stored: str, asked: str, kept: bool, unused: bool) -> str:
    """Returns the output's type of a tensor: integers and what no weight is made of stay."""
    if stored not in ("float64", "float32", "bfloat16", "float16"):
        if not stored.startswith(("int", "uint", "bool")):
            raise InputError(
                "base_quantized",
                f"the base stores weights as {stored}: there is no 16-bit original to merge into",
                where="base",
                fix="give the original checkpoint with --base",
            )
        return stored
    if unused:
        return stored
    return "float32" if kept else asked


def with_rows(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Adds empty rows up to a shape: what fills them was checked before."""
    if value.dim() == 0 or value.shape[0] >= shape[0]:
        return value
    return torch.cat([value, value.new_zeros(shape[0] - value.shape[0], *value.shape[1:])])


def _check_untied(plan: MergePlan) -> None:
    """Refuses an untied head under a name that transformers would not read."""
    model = _empty(plan.job, True)
    mapped = KeyMap(model, {key: slot.shape for key, slot in plan.slots.items()})
    lacks = [name for name in plan.untied if name not in mapped.by_weight]
    if tied_sources(model) or lacks or missing_weights(model, mapped):
        raise InputError(
            "cannot_untie",
            f"the adapter changes {', '.join(plan.untied)} apart from what it is tied to, and "
            f"{type(model).__name__} cannot hold them as two weights",
            where=str(plan.job.adapter),
            fix="train with ensure_weight_tying=true, or leave head and embedding out",
        )
