"""Mixtures of experts on tensors without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def grouped_of_any_type() -> Iterator[None]:
    """Lets a trace without data go through grouped products of any type.

    PyTorch knows the shapes of its grouped product in bfloat16 only, though it computes others;
    transformers' own operation, which keeps the same tensors, takes their place meanwhile.
    """
    from transformers.integrations import moe

    module: Any = moe
    before = getattr(module, "_can_use_grouped_mm", None)
    if before is None:
        yield
        return

    def usable(input: Any, weight: Any, offs: Any) -> bool:
        return weight.dtype == torch.bfloat16 and bool(before(input, weight, offs))

    module._can_use_grouped_mm = usable
    try:
        yield
    finally:
        module._can_use_grouped_mm = before
