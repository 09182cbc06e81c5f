"""A live module, looked at without touching it: structure copied, tensors shared or made empty.

`copy.deepcopy` would copy what hangs beside the parameters too (quantisation states, hooks, locks),
so modules are cloned one by one: new module objects, the same everything else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from glasstune.kernels.int8_linear import Int8Linear

TensorMap = Callable[[nn.Module, Tensor], Tensor]

_FOREIGN = ("gptq", "awq", "hqq", "aqlm", "quanto", "eetq", "higgs", "fp8", "torchao", "marlin")


def live_bits(module: nn.Module) -> int:
    """Returns the precision that a module already has: 4 or 8 where it is quantised, else 16."""
    import bitsandbytes as bnb

    found = 16
    for part in module.modules():
        if isinstance(part, bnb.nn.Linear4bit):
            return 4
        if isinstance(part, (bnb.nn.Linear8bitLt, Int8Linear)):
            found = 8
    return found


def foreign_quantization(module: nn.Module) -> str:
    """Returns the class of a layer that another library has quantised; "" where there is none."""
    for part in module.modules():
        kind = type(part)
        place = f"{kind.__module__}.{kind.__name__}".lower()
        if any(name in place for name in _FOREIGN) and isinstance(part, nn.Module):
            packed = any(
                tensor is not None and not tensor.is_floating_point()
                for tensor in (*part._parameters.values(), *part._buffers.values())
            )
            if packed or "linear" in kind.__name__.lower():
                return kind.__name__
    return ""


def shared_view(module: nn.Module) -> nn.Module:
    """Returns the base model's structure with the very tensors of the given module.

    Adapters of PEFT are left out: a wrapped layer stands for itself under its own name, and the
    wrapper's prefix (`base_model.model.`) is gone.
    """
    return _unwrapped(_clone(module, lambda _, tensor: tensor, {}, {}))


def meta_view(module: nn.Module) -> nn.Module:
    """Returns the base model's structure on the meta device; 4-bit weights get logical shapes."""
    made: dict[int, Tensor] = {}
    return _unwrapped(_clone(module, lambda part, tensor: _to_meta(part, tensor, made), {}, {}))


def _clone(
    module: nn.Module, tensors: TensorMap, made: dict[int, nn.Module], other: dict[int, Any]
) -> nn.Module:
    """Clones a module and its children; a module that is registered twice is cloned once."""
    if id(module) in made:
        return made[id(module)]
    clone: nn.Module = module.__class__.__new__(module.__class__)
    made[id(module)] = clone
    for name, value in module.__dict__.items():
        # One level deep: what a conversion adds to a dictionary must not reach the original.
        clone.__dict__[name] = _loose(value, other)
    clone.__dict__["_parameters"] = {
        name: None if value is None else tensors(module, value)
        for name, value in module._parameters.items()
    }
    clone.__dict__["_buffers"] = {
        name: None if value is None else tensors(module, value)
        for name, value in module._buffers.items()
    }
    clone.__dict__["_modules"] = {
        name: None if child is None else _clone(child, tensors, made, other)
        for name, child in module._modules.items()
    }
    return clone


def _loose(value: Any, other: dict[int, Any]) -> Any:
    if isinstance(value, PreTrainedConfig):
        if id(value) not in other:
            other[id(value)] = copy.deepcopy(value)
        return other[id(value)]
    return copy.copy(value) if type(value) in (dict, list, set) else value


def _to_meta(module: nn.Module, tensor: Tensor, made: dict[int, Tensor]) -> Tensor:
    if id(tensor) in made:
        return made[id(tensor)]
    empty = torch.empty(_logical_shape(module, tensor), dtype=tensor.dtype, device="meta")
    if not isinstance(tensor, nn.Parameter):
        made[id(tensor)] = empty
        return empty
    kind = type(tensor).__name__
    parameter = nn.Parameter(empty, requires_grad=False)
    if kind in ("Params4bit", "Int8Params"):
        parameter = torch.Tensor._make_subclass(type(tensor), empty, False)
        kept = {
            name: value
            for name, value in tensor.__dict__.items()
            if name not in ("quant_state", "CB", "SCB", "module")
        }
        parameter.__dict__.update(kept, **({"SCB": None, "CB": None} if kind[0] == "I" else {}))
    elif tensor.requires_grad:
        parameter.requires_grad_(True)
    made[id(tensor)] = parameter
    return parameter


def _logical_shape(module: nn.Module, tensor: Tensor) -> tuple[int, ...]:
    if type(tensor).__name__ != "Params4bit":
        return tuple(tensor.shape)
    state = getattr(tensor, "quant_state", None)
    if state is not None and state.shape is not None:
        return tuple(state.shape)
    return (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]


def _unwrapped(clone: nn.Module) -> nn.Module:
    """Takes PEFT's wrappers off a clone: the model's own, then those around its layers."""
    while True:
        inner = _inner_model(clone)
        if inner is None:
            break
        clone = inner
    # Children first: a wrapper may hold a wrapped layer.
    for path, module in reversed(list(clone.named_modules())):
        base = _wrapped_layer(module)
        if base is not None and path:
            parent, _, name = path.rpartition(".")
            clone.get_submodule(parent)._modules[name] = base
    return clone


def _inner_model(module: nn.Module) -> nn.Module | None:
    """Returns the model inside a PeftModel, or inside its tuner (`base_model.model`)."""
    if hasattr(type(module), "get_base_model") and hasattr(module, "peft_config"):
        inner = module._modules.get("base_model")
        # A prompt encoder stands beside the model itself: no tuner holds that.
        if inner is not None and not type(inner).__module__.startswith("peft."):
            return inner
        if inner is not None:
            return inner._modules.get("model") or inner
    return None


def _wrapped_layer(module: nn.Module) -> nn.Module | None:
    """Returns the layer that a PEFT layer wraps, by PEFT's attribute names."""
    if not type(module).__module__.startswith("peft."):
        return None
    for name in ("base_layer", "original_module"):
        base = module._modules.get(name)
        if base is not None:
            return base
    return None
