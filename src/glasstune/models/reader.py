"""Weights of a checkpoint by the model's names, read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.models.conversion import KeyMap, missing_weights, tied_sources
from glasstune.models.inspect.weights import Checkpoint, Place, open_checkpoint

_UNLIMITED = 2**62
Expand = Callable[[str, Tensor], Tensor]
"""What a weight of this name has become where it was trained on: 4 bit and back, for example."""


class WeightReader:
    """A checkpoint seen through a model's names.

    Args:
        folder: With safetensors files (`.bin` files are read whole).
        model: The plain model, on the meta device.
        expand: Applied to every weight that is read; None leaves them as stored.

    Raises:
        InputError: `weights_missing`, and what `open_checkpoint` refuses.
    """

    def __init__(self, folder: Path, model: Any, expand: Expand | None = None) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(folder, _UNLIMITED)
        self.places: dict[str, Place] = self.checkpoint.places
        self.findings: list[Finding] = self.checkpoint.findings
        self.map = KeyMap(model, {key: place.shape for key, place in self.places.items()})
        self.expand = expand
        self._tied = tied_sources(model)
        buffers = {name for name, _ in model.named_buffers()}
        missing = [name for name in missing_weights(model, self.map) if name not in buffers]
        if missing:
            raise InputError(
                "weights_missing",
                f"the checkpoint has no value for {len(missing)} weights of its model: "
                f"{', '.join(missing[:5])}; it has {len(self.places)} tensors, for example "
                f"{', '.join(list(self.places)[:3])}",
                where=str(folder),
                fix="download the checkpoint again; its config.json and its weights do not fit",
            )

    def tensor(self, key: str) -> Tensor:
        """Reads one tensor of the checkpoint, as it is stored, into memory of its own."""
        place = self.places[key]
        value = place.open()(0, place.shape[0] if place.shape else 1)
        # A .bin file stays in memory: what is done to its tensors would be read again.
        return value.clone() if place.held else value

    def origin(self, name: str) -> str:
        """Returns the name under which a weight is stored; a tied one has another's."""
        return name if name in self.map.by_weight else self._tied.get(name, name)

    def fetch(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Reads weights by the model's names; those that are not stored are left out.

        Tensors of one group are read once for all names that ask for it.
        """
        asked = {name: self.origin(name) for name in names}
        found: dict[str, Tensor] = {}
        wanted = set(asked.values())
        while wanted:
            group = self.map.by_weight.get(wanted.pop())
            if group is None:
                continue
            made = self.map.forward(group, self.tensor)
            for name in group.weights:
                if name in asked.values():
                    found[name] = self._expanded(name, made[name])
            wanted -= set(group.weights)
        return {name: found[origin] for name, origin in asked.items() if origin in found}

    def _expanded(self, name: str, value: Tensor) -> Tensor:
        return value if self.expand is None else self.expand(name, value)


def torch_dtype(name: str) -> torch.dtype:
    """Returns torch's type of a name such as `bfloat16`."""
    found: torch.dtype = getattr(torch, name)
    return found
