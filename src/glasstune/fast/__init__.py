"""Puts kernels, grouping and compile onto a PEFT model. Not built yet."""
