"""Which tensors of a checkpoint become the weight of which module.

Names differ: a checkpoint of the bare model lacks the head's prefix, old files carry old names,
and transformers merges or splits some tensors while it loads. So the names are put through
transformers' own renaming, in the order of its loader, and nothing is guessed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.models.inspect.live import shared_view
from glasstune.models.inspect.weights import Checkpoint, Place, Rows
from glasstune.models.quantization import is_packed_weight

_FLOATS = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class LeafWeight:
    """The 16-bit weight of one module, not read yet.

    Args:
        path: Of the module.
        name: Key(s) in the checkpoint, for messages.
        shape: (out, in), as the quantised layer has it.
        dtype: torch's name of the type as stored.
        size: Bytes to read.
        held: Bytes that must be in memory while any row of it is read.
        order: File and place, so that a disk is read from front to back.
        open: Gives rows of the weight [out, in]; what it holds goes when the result does.
    """

    path: str
    name: str
    shape: tuple[int, int]
    dtype: str
    size: int
    held: int
    order: tuple[str, int]
    open: Callable[[], Rows]


@dataclass(slots=True)
class _Origin:
    """What a parameter is made of.

    Args:
        first: The parameter, or the first of those that the same tensors become.
        keys: Of the checkpoint, each with the pattern that it matched.
        converter: What merges or splits them; None where one tensor is the parameter.
    """

    first: str
    keys: list[tuple[str, str]]
    converter: WeightConverter | None


def match_leaves(
    model: nn.Module, checkpoint: Checkpoint, leaves: Sequence[tuple[str, list[int]]]
) -> tuple[list[LeafWeight], list[Finding]]:
    """Finds the weight of every leaf.

    Args:
        model: The model at 16 bit on the meta device, a transformers class.
        checkpoint: Its files.
        leaves: Module path and (out, in).

    Returns:
        What was found, and a finding for each leaf whose weight was not.

    Raises:
        InputError: `already_quantized`: a weight is stored in no 16- or 32-bit type.
    """
    origins = _origins(model, checkpoint.places)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    found, findings = [], []
    for path, (out, width) in leaves:
        target = f"{path}.weight"
        origin = origins.get(target) or origins.get(tied.get(target, ""))
        if origin is None:
            findings.append(_not_found(path, str(checkpoint.folder)))
            continue
        places = [checkpoint.places[key] for key, _ in origin.keys]
        _check_types(places)
        turned = isinstance(model.get_submodule(path), Conv1D)
        if origin.converter is None:
            stored = (width, out) if turned else (out, width)
            if places[0].shape != stored:
                findings.append(_other_shape(path, places[0], stored))
                continue
            opener = partial(_whole_turned, places[0]) if turned else places[0].open
            held = places[0].held + (places[0].size if turned else 0)
        else:
            opener = partial(_converted, origin, places, model, target, (out, width), turned)
            # The parts, and what is made of them.
            held = max(place.held for place in places) + 2 * sum(place.size for place in places)
        found.append(
            LeafWeight(
                path=path,
                name=", ".join(place.name for place in places),
                shape=(out, width),
                dtype=places[0].dtype,
                size=sum(place.size for place in places),
                held=held,
                order=(str(places[0].file), places[0].offset),
                open=opener,
            )
        )
    return found, findings


def live_leaves(
    model: nn.Module, leaves: Sequence[tuple[str, list[int]]]
) -> tuple[list[LeafWeight], list[Finding]]:
    """The same for a module in memory: its own parameters, adapters of PEFT left aside.

    Raises:
        InputError: `no_weights`: it is on the meta device. `already_quantized`.
    """
    model = shared_view(model)
    found, findings = [], []
    for position, (path, (out, width)) in enumerate(leaves):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            findings.append(_not_found(path, type(model).__name__))
            continue
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            findings.append(_not_found(path, type(model).__name__))
            continue
        dtype = str(weight.dtype).removeprefix("torch.")
        if weight.is_meta:
            says = "the module is on the meta device: it has shapes but no weights"
            raise InputError("no_weights", says, where=path, fix="load it, or leave out --error")
        if is_packed_weight(weight) or dtype not in _FLOATS:
            raise _already(f"{path}.weight", dtype)
        value = weight.detach()
        value = value.T if isinstance(module, Conv1D) else value
        if tuple(value.shape) != (out, width):
            says = f"the weight has shape {list(value.shape)}, not {[out, width]}"
            findings.append(Finding("weight_shape", "error", path, says))
            continue
        order = (type(model).__name__, position)
        rows = partial(_memory_rows, value)
        found.append(
            LeafWeight(path, f"{path}.weight", (out, width), dtype, value.nbytes, 0, order, rows)
        )
    return found, findings


def _origins(model: Any, keys: Iterable[str]) -> dict[str, _Origin]:
    """Repeats the first half of transformers' loader: parameter name to what it is made of."""
    meta = model.state_dict()
    prefix = model.base_model_prefix
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    origins: dict[str, _Origin] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, meta)
        if name not in meta and key in meta:
            name, pattern = rename_source_key(key, [], [], prefix, meta)
        if name not in meta:
            continue
        if pattern is None:
            origins.setdefault(name, _Origin(name, [(key, key)], None))
            continue
        converter = by_pattern[pattern]
        first = converter.target_patterns[0]
        origin = origins.setdefault(name, _Origin(name, [], converter))
        origin.keys.append((key, pattern))
        for other in converter.target_patterns[1:]:  # one tensor that becomes several
            origins.setdefault(name.replace(first, other), origin)
    return origins


def _whole_turned(place: Place) -> Rows:
    """A Conv1D's weight is stored [in, out]; both loaders turn it before they quantise."""
    whole = place.open()(0, place.shape[0]).T
    return lambda start, stop: whole[start:stop]


def _converted(
    origin: _Origin,
    places: Sequence[Place],
    model: Any,
    target: str,
    shape: tuple[int, int],
    turned: bool,
) -> Rows:
    """Lets transformers itself merge or split the stored tensors."""
    transform = copy.deepcopy(origin.converter)
    assert transform is not None
    for (key, pattern), place in zip(origin.keys, places, strict=True):
        transform.add_tensor(origin.first, key, pattern, partial(_all_rows, place))
    made = transform.convert(origin.first, model=model, config=model.config)
    value = made[target]
    whole: Tensor = value[0] if isinstance(value, list) else value
    whole = whole.T if turned else whole
    if tuple(whole.shape) != shape:
        raise InputError(
            "weight_shape",
            f"the stored tensors make a weight of shape {list(whole.shape)}, not {list(shape)}",
            where=target,
            fix="download the checkpoint again; its config.json and its weights do not fit",
        )
    return lambda start, stop: whole[start:stop]


def _all_rows(place: Place) -> Tensor:
    return place.open()(0, place.shape[0])


def _memory_rows(value: Tensor) -> Rows:
    return lambda start, stop: value[start:stop].cpu()


def _check_types(places: Sequence[Place]) -> None:
    for place in places:
        if place.dtype not in _FLOATS:
            raise _already(place.name, place.dtype)


def _already(name: str, dtype: str) -> InputError:
    return InputError(
        "already_quantized",
        f"the weight is stored as {dtype}: without its 16-bit original there is no error to take",
        where=name,
        fix="give the original checkpoint, or leave out --error",
    )


def _not_found(path: str, where: str) -> Finding:
    says = f"no weight of {path} was found: its error is not in this report"
    fix = "download the checkpoint again; its config.json and its weights do not fit"
    return Finding("weight_not_found", "error", f"{where}: {path}", says, fix)


def _other_shape(path: str, place: Place, expected: tuple[int, int]) -> Finding:
    says = f"{place.name} has shape {list(place.shape)}, {path} needs {list(expected)}"
    fix = "download the checkpoint again; its config.json and its weights do not fit"
    return Finding("weight_shape", "error", str(place.file), says, fix)
