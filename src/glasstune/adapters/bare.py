"""A PEFT model's base as if no adapter were there, for whoever only looks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn import Parameter


@contextmanager
def bare_base(model: PeftModel) -> Iterator[nn.Module]:
    """Gives the base model with PEFT's wrappers taken out of its tree, and puts them back after.

    Inside, the model must only be looked at.
    """
    base = model.get_base_model()
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parent in list(base.modules()):
            for name, child in list(parent.named_children()):
                inner = _unwrapped(child)
                if inner is not child:
                    swapped.append((parent, name, child))
                    parent._modules[name] = inner
        yield base
    finally:
        for parent, name, child in swapped:
            parent._modules[name] = child


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_submodule("base_layer")
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def bare_modules(model: PeftModel) -> list[tuple[str, nn.Module]]:
    """Returns path and module of the base's own tree, PEFT's wrappers left out."""
    with bare_base(model) as base:
        return list(base.named_modules())


def logical_count(parameter: Parameter) -> int:
    """Returns how many weights a parameter stands for, whatever it is packed into."""
    state = getattr(parameter, "quant_state", None)
    shape = getattr(state, "shape", None)
    return math.prod(shape) if shape is not None else parameter.numel()
