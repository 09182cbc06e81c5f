"""The record of what was sped up, how, and why not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from glasstune.core.records import Record

SpeedWay = Literal["wide", "grouped", "compiled only", "plain"]


@dataclass(slots=True)
class ModuleSpeed:
    """One adapted module.

    Args:
        path: Its name in the model.
        way: `wide`: LoRA inside the base's product. `grouped`: base products of one input as one,
            LoRA beside it. `compiled only`: PEFT's forward inside a compiled block. `plain`:
            PEFT's forward as it is.
        reason: Why.
        bits: Of the stored base weight.
        group: Members of its group, itself included; empty where it has none.
    """

    path: str
    way: SpeedWay
    reason: str
    bits: int
    group: list[str] = field(default_factory=list)


@dataclass(slots=True)
class SpeedRecord(Record):
    """Result of `speed_up`.

    Args:
        modules: Every adapted module, in the model's order.
        compiled: Paths of what torch.compile runs.
        choices: Automatic choices with their reasons.
    """

    modules: list[ModuleSpeed]
    compiled: list[str]
    choices: list[dict[str, Any]]
