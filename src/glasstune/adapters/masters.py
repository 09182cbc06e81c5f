"""Whatever is trained is float32, whatever type the base has.

Small updates round to nothing in a 16-bit tensor. PEFT makes its own tensors float32; copies of
whole modules (`modules_to_save`) and trained biases follow here, with their module taught to take
and give the base's type.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional

from glasstune.models.classes import Conv1D

_HALF = (torch.float16, torch.bfloat16)


def make_masters_float32(model: nn.Module) -> None:
    """Casts every trained 16-bit tensor to float32 in place.

    Args:
        model: A PEFT model, before any optimiser holds its parameters.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for copy in wrapper.modules_to_save.values():
                _float32_module(copy)
    for module in model.modules():
        bias = module._parameters.get("bias")
        if bias is not None and bias.requires_grad and bias.dtype in _HALF:
            bias.data = bias.data.float()
            _add_bias_apart(module)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in _HALF:
            parameter.data = parameter.data.float()


def _float32_module(module: nn.Module) -> None:
    halves = [p for p in module.parameters() if p.dtype in _HALF]
    if not halves:
        return
    outer = halves[0].dtype
    for parameter in halves:
        parameter.data = parameter.data.float()

    def take(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_cast(value, torch.float32) for value in inputs)

    def give(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, outer)

    if not isinstance(module, nn.Linear):  # under autocast a linear layer casts by itself
        module.register_forward_pre_hook(take)
    else:
        module.register_forward_pre_hook(
            lambda owner, inputs: inputs if _autocasting(inputs) else take(owner, inputs)
        )
    module.register_forward_hook(give)


def _autocasting(inputs: tuple[Any, ...]) -> bool:
    return any(
        isinstance(value, Tensor) and torch.is_autocast_enabled(value.device.type)
        for value in inputs
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype:
        return value.to(dtype)
    return value


def _add_bias_apart(module: nn.Module) -> None:
    """Gives a module a forward that adds its float32 bias in the output's type.

    bitsandbytes would cast the bias itself to 16 bit, torch refuses mixed types.
    """
    kind = type(module)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        bias = module._parameters["bias"]
        assert bias is not None
        if isinstance(module, nn.LayerNorm):
            weight = None if module.weight is None else module.weight.float()
            normed = functional.layer_norm(
                x.float(), module.normalized_shape, weight, bias, module.eps
            )
            return normed.to(x.dtype)
        if isinstance(module, Conv1D):
            y = x @ module.weight.to(x.dtype)
            return y + bias.to(y.dtype)
        module._parameters["bias"] = None
        try:
            y = kind.forward(module, x, *args, **kwargs)
        finally:
            module._parameters["bias"] = bias
        return y + bias.to(y.dtype)

    module.forward = forward
