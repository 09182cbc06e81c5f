"""PEFT's own attributes, read by name: the audit works with PEFT but does not need it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from glasstune.audit.gate import PARTNERS


@dataclass(frozen=True, slots=True)
class AdapterState:
    """The switches of an adapted layer.

    Args:
        disabled: `disable_adapters`.
        active: `active_adapters`.
        merged: `merged`: the adapter is added into the base weight, so it is not called.
    """

    disabled: bool
    active: tuple[str, ...]
    merged: bool


def has_adapter(module: nn.Module) -> bool:
    """Whether a module is an adapted layer (or PEFT's wrapper of a saved module)."""
    kind = type(module)
    # transformers' models have methods of these names; PEFT's layers have properties.
    names = ("disable_adapters", "active_adapters")
    return all(isinstance(getattr(kind, name, None), property) for name in names)


def adapter_state(module: Any) -> AdapterState | None:
    """Reads the switches; None where the module has none."""
    if not has_adapter(module):
        return None
    active = module.active_adapters
    names = (active,) if isinstance(active, str) else tuple(active)
    merged = getattr(module, "merged", False)
    return AdapterState(bool(module.disable_adapters), names, bool(merged))


def adapter_of(model: nn.Module, name: str) -> tuple[str, str] | None:
    """(path of the adapted layer, name of the adapter) of a parameter that belongs to one.

    `x.q_proj.lora_A.default.weight` gives (`x.q_proj`, `default`).
    """
    parts = name.split(".")
    module: nn.Module = model
    for index, part in enumerate(parts[:-1]):
        child = module._modules.get(part)
        if child is None:
            return None
        if isinstance(child, (nn.ModuleDict, nn.ParameterDict)) and has_adapter(module):
            return ".".join(parts[:index]), parts[index + 1]
        module = child
    return None


def partner_of(name: str) -> tuple[str, str] | None:
    """The other factor of a low-rank product, and the parameter's name: `lora_B` for `lora_A`."""
    for mine, other in PARTNERS:
        if f".{mine}." in name:
            return other, name.replace(f".{mine}.", f".{other}.")
    return None


@lru_cache(maxsize=1 << 16)
def layer_of(name: str) -> str:
    """Layer that a parameter is counted to: up to its first index, else its module.

    `model.layers.3.self_attn.q_proj.lora_A.default.weight` gives `model.layers.3`, `lm_head.weight`
    gives `lm_head`, and `lm_head.lora_A.default.weight` too.
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    for index, part in enumerate(parts):
        if index and part.startswith("lora_"):
            return ".".join(parts[:index])
    return ".".join(parts[:-1]) or name
