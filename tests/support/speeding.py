"""Tiny adapted models at 16, 8 and 4 bit, their gradients, and an exact truth beside them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from families import SPECS, family_model
from torch import nn

IDS = torch.arange(3, 35).view(2, 16)


def wide_enough(family: str) -> dict[str, int]:
    """Returns sizes at which bitsandbytes expands 4-bit weights rightly on a CPU.

    0.50.2 does not where a row is 32 values or fewer and divides a block of 64: values are off by
    as much as the weight itself.
    """
    names = {"hidden_size", "n_embd", "d_model"} & {"hidden_size", *SPECS[family]}
    sizes = dict.fromkeys(names, 64)
    if SPECS[family].get("head_dim", 0) is not None:
        sizes["head_dim"] = 16
    if family == "opt":
        sizes["word_embed_proj_dim"] = 64
    return sizes


def quantize(model: Any, bits: int, kind: str = "nf4", nested: bool = True) -> None:
    """Packs the linear layers of a model in place, all but its head."""
    if bits == 8:
        from glasstune.models.int8 import convert_to_int8

        convert_to_int8(model, None)
    if bits != 4:
        return
    import bitsandbytes as bnb

    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer is model.get_output_embeddings():
            continue
        packed = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None,
            compute_dtype=layer.weight.dtype, quant_type=kind, compress_statistics=nested,
        )  # fmt: skip
        packed.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type=kind, compress_statistics=nested
        )
        packed.bias = layer.bias
        packed.support_avx512bf16_for_cpu = False
        model.set_submodule(path, packed.to("cpu"))
    model.is_loaded_in_4bit = True


def widened(model: Any) -> Any:
    """Returns a float64-ready copy: packed layers as `nn.Linear` of the weight they stand for."""
    other = copy.deepcopy(model)
    for path, layer in list(other.named_modules()):
        name = type(layer).__name__
        if name == "Linear4bit":
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif name in ("Int8Linear", "Fp8Linear"):
            weight = layer.dequantize()
        else:
            continue
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
        plain.bias = layer.bias
        other.set_submodule(path, plain)
    other.is_loaded_in_4bit = False
    return other.float()


def adapted(model: Any, **options: Any) -> Any:
    """Adds a LoRA adapter whose B is not zero."""
    from glasstune.adapters.inject import add_adapter

    torch.manual_seed(1)
    wrapped = add_adapter(model, **{"r": 4, "lora_alpha": 8, **options})
    fill(wrapped)
    return wrapped.eval()


def fill(model: Any, seed: int = 2) -> None:
    """Gives every B values of its own, and every A others."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = 0.05 if "lora_B" in name else parameter.shape[-1] ** -0.5
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.copy_(drawn)


def tiny(family: str, bits: int = 32, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """An adapted model of a family; 32 and 16 bits are not packed."""
    model = family_model(family, **wide_enough(family)).to(dtype)
    if bits in (8, 4):
        quantize(model, bits)
    return adapted(model, **options)


def gradients(model: Any, autocast: bool = False, ids: torch.Tensor = IDS) -> dict[str, Any]:
    """Returns the loss and the gradient of all that is trained, by name."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def furthest(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Returns the largest relative distance of one tensor."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name].double() - right.double()).norm() / (right.double().norm() + 1e-30))
        for name, right in theirs.items()
    )


def distance(ours: dict[str, Any], truth: dict[str, Any]) -> float:
    """Returns the root of the mean squared relative distance, every tensor counting alike."""
    assert ours.keys() == truth.keys()
    squares = [
        float((ours[name].double() - right.double()).norm() / (right.double().norm() + 1e-30)) ** 2
        for name, right in truth.items()
    ]
    return (sum(squares) / len(squares)) ** 0.5
