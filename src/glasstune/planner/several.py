"""Bytes of one device where several share a run: by formula, until it can be measured.

DDP holds everything on each device and adds gradients up in a flat copy of them. FSDP2 splits the
frozen weights of the decoder layers as they are stored: a layer's are gathered for its pass, and
the next layer's while it runs. Adapters with their gradients and moments, embeddings, head, int8
scales and 4-bit states are on every device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from glasstune.planner.peak import Static

if TYPE_CHECKING:
    from glasstune.planner.model import MemoryModel

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
        workspace: Gathered layers, the flat gradients, buffers of the communication.
    """

    strategy: Literal["ddp", "fsdp2"]
    devices: int
    static: Static
    workspace: int


def ddp(static: Static, devices: int) -> Share:
    """Everything on each device, and the gradients once more while they are added up."""
    return Share("ddp", devices, static, static.gradients + NCCL_BYTES)


def fsdp2(static: Static, devices: int, *, sharded: int, layer: int) -> Share:
    """The layers' frozen weights are split.

    Args:
        static: Of one device alone.
        devices: How many.
        sharded: Bytes of the weights that are split, as they are stored (`layer_weights`).
        layer: Of the largest layer among them.
    """
    base = static.base - sharded + -(-sharded // devices)
    split = replace(static, base=base, wide=0)
    return Share("fsdp2", devices, split, _AHEAD * layer + static.gradients + NCCL_BYTES)


def layer_weights(model: MemoryModel) -> tuple[int, int]:
    """Returns the bytes of the frozen weights that FSDP2 splits, and of the largest layer's."""
    shadow = model.shadow
    sizes = [0] * len(shadow.blocks)
    for name, value in shadow.model.named_parameters():
        for index, path in enumerate(shadow.blocks):
            if name.startswith(f"{path}.") and not value.requires_grad:
                sizes[index] += value.numel() * value.element_size()
    return sum(sizes[kind] for kind in shadow.stands_for), max(sizes, default=0)
