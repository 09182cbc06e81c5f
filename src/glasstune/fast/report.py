"""What was sped up, how, and why not; and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from glasstune.core.choices import Choices
from glasstune.core.speed import ModuleSpeed, SpeedRecord
from glasstune.fast.compile import entry_of, free_regions
from glasstune.fast.group import Group
from glasstune.fast.members import detach, members_out

_SHOWN = 6


class SpeedReport:
    """The result of `speed_up`; prints as a table.

    Attributes:
        record: The record; see `core.speed`.
        groups: The groups of adapted layers.
    """

    def __init__(
        self,
        modules: list[ModuleSpeed],
        groups: list[Group],
        hooks: Sequence[RemovableHandle],
        regions: dict[str, nn.Module],
        choices: Choices,
        restore: Sequence[Callable[[], object]],
    ) -> None:
        self.record = SpeedRecord(modules, list(regions), choices.to_list())
        self.groups = groups
        self._hooks = hooks
        self._regions = regions
        self._restore: Sequence[Callable[[], object]] | None = restore

    def undo(self) -> None:
        """Puts the model back: PEFT's forwards, contiguous weights, nothing compiled."""
        if self._restore is None:
            return
        free_regions(self._regions)
        detach(self.groups, self._hooks)
        for step in self._restore:
            step()
        self._restore = None

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Runs the model inside as PEFT alone would, for example to audit its structure."""
        held = [entry for module in self._regions.values() if (entry := entry_of(module))]
        for entry in held:
            entry.take_out()
        try:
            with members_out(self.groups):
                yield
        finally:
            for entry in held:
                entry.put_in()

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the record."""
        return self.record.to_dict()

    def __str__(self) -> str:
        lines = [f"speed: {len(self.record.modules)} adapted modules"]
        told: dict[tuple[str, str], list[ModuleSpeed]] = {}
        for module in self.record.modules:
            told.setdefault((module.way, module.reason), []).append(module)
        for (way, reason), modules in told.items():
            names = dict.fromkeys(module.path.rsplit(".", 1)[-1] for module in modules)
            shown = ", ".join(list(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            lines.append(f"  {way:13} {len(modules):4}  {shown}: {reason}")
        compiled = self.record.compiled
        lines.append(f"  compiled      {len(compiled):4}  regions")
        lines += [f"  {c['name']} = {c['value']}: {c['reason']}" for c in self.record.choices]
        return "\n".join(lines)
