"""Bytes of one device where several share a run: by formula, until it can be measured.

DDP holds everything on each device and joins gradients in buckets of their own. FSDP2 splits
weights, gradients and optimiser states; a layer's weights are gathered for its pass, and the next
layer's while it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glasstune.planner.peak import Static

NCCL_BYTES = 2**29
"""Buffers of the communication library on each device: rough, by its documentation's channels."""

_AHEAD = 2


@dataclass(frozen=True)
class Share:
    """What one of several devices holds.

    Args:
        strategy: `ddp` or `fsdp2`.
        devices: How many.
        static: Of one device.
        workspace: Gathered layers, buckets, buffers of the communication.
    """

    strategy: Literal["ddp", "fsdp2"]
    devices: int
    static: Static
    workspace: int


def ddp(static: Static, devices: int) -> Share:
    """Everything on each device; buckets as large as the gradients."""
    return Share("ddp", devices, static, static.gradients + NCCL_BYTES)


def fsdp2(static: Static, devices: int, layer: int) -> Share:
    """All that stays is split.

    Args:
        static: Of one device alone.
        devices: How many.
        layer: Bytes of the largest block's weights, as they are stored.
    """

    def part(size: int) -> int:
        return -(-size // devices)

    split = Static(
        base=part(static.base), wide=0, adapters=part(static.adapters),
        gradients=part(static.gradients), optimizer=part(static.optimizer),
        load=static.load, largest=part(static.largest),
    )  # fmt: skip
    return Share("fsdp2", devices, split, _AHEAD * layer + NCCL_BYTES)
