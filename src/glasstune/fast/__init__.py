"""Puts kernels, grouping and compile onto a PEFT model, and says what it did.

Import `fast.speed_up`; this package must stay light.
"""
