"""Between a checkpoint's keys and the names of the model's weights, both ways.

transformers renames, merges and splits tensors while it loads (a mixture's experts are stored one
by one and held as one). The names go through its own mapping in the order of its loader, and back
through its own reverse operations, which are tried on shapes before anything is trusted to them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from glasstune.core.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(slots=True)
class Group:
    """Tensors of a checkpoint that become weights together.

    Args:
        first: The weight, or the first of several.
        keys: Of the checkpoint.
        sources: Each key's name after renaming, before it is merged or split.
        patterns: What each key matched in the converter; the key itself without one.
        weights: Names in the model that they become.
        converter: What merges or splits them; None where one tensor is one weight.
    """

    first: str
    keys: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    converter: WeightConverter | None = None


class KeyMap:
    """What every key of a checkpoint becomes in a model.

    Args:
        model: A transformers model; its weights may be on the meta device.
        shapes: The checkpoint's keys and shapes.

    Raises:
        InputError: `two_for_one`: two keys are one weight.
    """

    def __init__(self, model: Any, shapes: Shapes) -> None:
        self._model = model
        self.unused: list[str] = []
        groups: dict[str, Group] = {}
        meta = model.state_dict()
        prefix = model.base_model_prefix
        transforms = get_model_conversion_mapping(model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        for key in sorted(shapes, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, meta)
            source, _ = rename_source_key(key, renamings, [])
            if name not in meta and key in meta:
                name, pattern = rename_source_key(key, [], [], prefix, meta)
                source = key
            if name not in meta:
                self.unused.append(key)
                continue
            group = groups.setdefault(name, Group(name))
            if pattern is None and group.keys:
                raise _two_for_one(name, group.keys[0], key)
            group.keys.append(key)
            group.sources.append(source)
            group.patterns.append(pattern or key)
            if pattern is not None:
                group.converter = by_pattern[pattern]
        self.groups = list(groups.values())
        for group in self.groups:
            group.weights = (
                [group.first] if group.converter is None else self._made_of(group, shapes)
            )
        self.by_weight = {name: group for group in self.groups for name in group.weights}

    def forward(self, group: Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Returns the weights of a group, by name.

        Args:
            group: One of `groups`.
            read: Gives the tensor of a key.
        """
        if group.converter is None:
            return {group.first: read(group.keys[0])}
        transform = copy.deepcopy(group.converter)
        for key, pattern in zip(group.keys, group.patterns, strict=True):
            transform.add_tensor(group.first, key, pattern, lambda key=key: read(key))
        made = transform.convert(group.first, model=self._model, config=self._model.config)
        return {name: _single(value) for name, value in made.items()}

    def backward(self, group: Group, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a group's tensors as the checkpoint stores them, by key.

        Args:
            group: One of `groups`.
            weights: Its weights, all of them.

        Raises:
            InputError: `no_way_back`: transformers' reverse operation does not give these keys.
        """
        if group.converter is None:
            return {group.keys[0]: weights[group.first]}
        try:
            reverse = group.converter.reverse_transform()
            for name in group.weights:
                source, pattern = reverse.rename_source_key(name)
                reverse_first = source
                if pattern is None:
                    raise ValueError(f"{name} matches no pattern of the reverse operation")
                reverse.add_tensor(source, name, pattern, lambda name=name: weights[name])
            made = reverse.convert(reverse_first, model=self._model, config=self._model.config)
        except (NotImplementedError, ValueError, AttributeError, RuntimeError, KeyError) as error:
            raise _no_way_back(group, str(error)) from error
        prefix = f"{self._model.base_model_prefix}."
        by_source = {
            name.removeprefix(prefix): key
            for key, name in zip(group.keys, group.sources, strict=True)
        }
        found: dict[str, Tensor] = {}
        for name, value in made.items():
            key = by_source.get(re.sub(r"\\\.", ".", name).removeprefix(prefix))
            if key is not None:
                found[key] = _single(value)
        if len(found) != len(group.keys) or len(made) != len(group.keys):
            raise _no_way_back(group, f"it gives {sorted(made)[:3]}")
        return found

    def check_way_back(self, group: Group, read: Callable[[str], Tensor]) -> None:
        """Converts a group forth and back and compares every value.

        Raises:
            InputError: `no_way_back`.
        """
        back = self.backward(group, self.forward(group, read))
        for key in group.keys:
            if not torch.equal(back[key], read(key)):
                raise _no_way_back(group, f"{key} comes back with other values")

    def _made_of(self, group: Group, shapes: Shapes) -> list[str]:
        return list(self.forward(group, lambda key: torch.empty(shapes[key], device="meta")))


def missing_weights(model: Any, mapped: KeyMap) -> list[str]:
    """Returns the names of weights for which a checkpoint has nothing, tied ones left out."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    lacks = [name for name in model.state_dict() if name not in mapped.by_weight]
    return [name for name in lacks if tied.get(name) not in mapped.by_weight]


def tied_sources(model: Any) -> dict[str, str]:
    """Returns each tied weight's name with the name whose value it takes."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _single(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, (list, tuple)) else value
    return tensor


def _two_for_one(name: str, first: str, second: str) -> InputError:
    return InputError(
        "two_for_one",
        f"the checkpoint has two tensors for {name}: {first} and {second}",
        where="base",
        fix="save the base again with save_pretrained, and merge into that",
    )


def _no_way_back(group: Group, says: str) -> InputError:
    keys: Iterable[str] = group.keys[:3]
    return InputError(
        "no_way_back",
        f"transformers cannot turn {group.first} back into the checkpoint's {', '.join(keys)} "
        f"({len(group.keys)} keys): {says}",
        where=group.first,
        fix="leave this weight out of the adapter, or merge with PEFT's merge_and_unload",
    )
