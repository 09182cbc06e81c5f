"""A quantised group's wide weight, expanded for one product and freed after it."""

from glasstune.kernels.expand.fp8 import Fp8Packed, weight_scales
from glasstune.kernels.expand.op import Packed4bit, PackedInt8

__all__ = ["Fp8Packed", "Packed4bit", "PackedInt8", "weight_scales"]
