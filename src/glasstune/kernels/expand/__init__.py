"""A quantised group's wide weight, expanded for one product and freed after it."""

from glasstune.kernels.expand.op import Packed4bit, PackedInt8

__all__ = ["Packed4bit", "PackedInt8"]
