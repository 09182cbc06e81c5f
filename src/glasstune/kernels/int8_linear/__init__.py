"""A linear layer with int8 weights and row scales, multiplied at 16 bit (W8A16)."""

from glasstune.kernels.int8_linear.op import Int8Linear

__all__ = ["Int8Linear"]
