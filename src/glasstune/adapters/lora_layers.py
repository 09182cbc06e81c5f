"""What PEFT's LoRA layers would compute at their next call, read from their switches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn import Parameter

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Way = Literal["wide", "grouped", "plain"]


@dataclass(frozen=True, slots=True)
class LoraState:
    """What a layer would do now.

    Args:
        way: `wide`: base + scale * B A x with one adapter, nothing else. `grouped`: the base's
            output plus what the adapter's own modules make of x. `plain`: PEFT's forward only.
        reason: Why it is not `wide`; empty where it is.
        down: A of the one adapter, [r, i]; None unless `wide`.
        up: B, [n, r]; likewise.
        scale: s; likewise.
    """

    way: Way
    reason: str = ""
    down: Parameter | None = None
    up: Parameter | None = None
    scale: float = 0.0


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns every module that PEFT wrapped, by path: layers with adapters and saved copies."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, kinds) and not _is_tuner(module)
    }


def why_no_linear_lora(layer: nn.Module) -> str | None:
    """Returns why a module is no LoRA layer on a linear one that can share a product, or None."""
    kind = type(layer)
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return "a whole copy of the module is trained (modules_to_save or trained tokens)"
    if kind is not LoraLinear and kind.__name__ != "Linear4bit":
        if kind.__name__ == "Linear8bitLt":
            return "LLM.int8 rounds activations and splits outliers by a rule of its own"
        if kind.__name__ == "ParamWrapper":
            return "LoRA on a bare parameter (target_parameters), for example of experts"
        return f"a layer of class {kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__}"
    own = layer.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is not kind.forward:
        return "its forward was replaced before"
    if getattr(layer, "tp_layer", None) is not None:
        return "it is split over devices (tensor parallel)"
    return None


def lora_state(layer: Any, in_training: bool = False) -> LoraState:
    """Reads the switches of a LoRA layer.

    Args:
        layer: One that `why_no_linear_lora` has nothing against.
        in_training: Takes it for a training one whatever its mode is.
    """
    if layer._disable_adapters:
        return LoraState("plain", "adapters are switched off")
    if layer.merged_adapters:
        return LoraState("plain", "merged into the base")
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return LoraState("plain", "no active adapter on it")
    for name in names:
        if name in layer.lora_variant:
            kind = type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
            return LoraState("plain", f"a variant of LoRA: {kind}")
    if any(map(_hooked, _all_modules(layer.get_base_layer()))):
        return LoraState("plain", "a hook on its base layer")
    if len(names) > 1:
        return LoraState("grouped", f"several active adapters: {', '.join(names)}")
    return _one_adapter(layer, names[0], in_training)


def add_adapters(layer: Any, x: Tensor, base_output: Tensor) -> Tensor:
    """Adds what the layer's adapters make of x, in PEFT's own order and types.

    Args:
        layer: A LoRA layer whose way is `grouped`.
        x: The layer's input [..., i].
        base_output: What its base layer gives [..., n].
    """
    result = base_output
    four_bit = type(layer).__name__ == "Linear4bit"
    cast = not (four_bit and torch.is_autocast_enabled(x.device.type))
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        down, up = layer.lora_A[name], layer.lora_B[name]
        if cast:
            x = layer._cast_input_dtype(x, down.weight.dtype)
        output = up(down(layer.lora_dropout[name](x))) * layer.scaling[name]
        result = result + (output.to(base_output.dtype) if four_bit and cast else output)
    return result if four_bit else result.to(base_output.dtype)


def _one_adapter(layer: Any, name: str, in_training: bool) -> LoraState:
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(dropout) is nn.Dropout:
        if dropout.p > 0 and (dropout.training or in_training):
            return LoraState("grouped", f"dropout {dropout.p:g} in training (wide in evaluation)")
    elif type(dropout) is not nn.Identity:
        # The trainer's seeded dropout too, and in evaluation as well: a base that goes into M for
        # an evaluation and out again for a checkpoint would be compiled anew each time.
        share = getattr(dropout, "p", None)
        named = f"{type(dropout).__name__} on the adapter's input"
        return LoraState(
            "grouped", f"dropout {share:g}" if isinstance(share, (int, float)) else named
        )
    if not all(type(part) is nn.Linear for part in (down, up)):
        return LoraState("grouped", "A or B is no plain linear layer")
    if up.bias is not None:
        return LoraState("grouped", "a bias of the adapter is trained (lora_bias)")
    if _hooked(down) or _hooked(up) or _hooked(dropout):
        return LoraState("grouped", "a hook on its adapter")
    return LoraState("wide", "", down.weight, up.weight, float(layer.scaling[name]))


def _all_modules(module: nn.Module) -> list[nn.Module]:
    return [module] if not module._modules else list(module.modules())


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def _is_tuner(module: nn.Module) -> bool:
    """Whether it is PEFT's model around a model, not a layer."""
    return hasattr(module, "peft_config")
