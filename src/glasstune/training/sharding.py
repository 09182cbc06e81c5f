"""FSDP2 of the frozen base: each rank holds a part of every decoder layer's weights.

Weights are sharded as they are stored (int8 rows, 4-bit bytes, 16-bit floats) and gathered for a
layer's own pass. What is small stays whole on every rank: adapters with their gradients and
optimiser states, embeddings, head and last norm, int8 scales and the 4-bit states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from glasstune.core.errors import InputError
from glasstune.kernels.int8_linear import Int8Linear
from glasstune.models.head import causal_model
from glasstune.models.packed import is_four_bit
from glasstune.training.recompute import decoder_layers

_REFUSED = {
    "Linear8bitLt": (
        "bitsandbytes' Linear8bitLt",
        "model.int8_compute",
        "set model.int8_compute: w8a16 (without llm_int8_threshold and llm_int8_has_fp16_weight)",
    ),
    "Fp8Linear": (
        "a float8 layer with a copy of its weight for the backward",
        "training.compute",
        "set training.compute: bf16",
    ),
}
"""Layers by class: what they are, the key that makes them, what to do."""


def check_shardable(model: nn.Module) -> None:
    """Refuses what cannot be sharded.

    Raises:
        InputError: `cannot_shard`: LLM.int8 or float8 layers, or a family without separate layers.
    """
    for path, module in model.named_modules():
        if (refused := _REFUSED.get(type(module).__name__)) is not None:
            what, where, fix = refused
            raise InputError(
                "cannot_shard",
                f"{path} is {what}, which fsdp2 cannot shard",
                where=where,
                fix=f"{fix}, or training.distributed.strategy: ddp",
            )
    if not decoder_layers(model):
        raise InputError(
            "cannot_shard",
            f"{type(causal_model(model)).__name__} has no separate decoder layers to shard",
            where="training.distributed.strategy",
            fix="set training.distributed.strategy: ddp",
        )


def shard_base(model: nn.Module, device: torch.device, ranks: int) -> int:
    """Shards the frozen weights of every decoder layer over all ranks, in place.

    Layers are moved to the device one at a time, so a base that lies in the host's memory never is
    on the device as a whole.

    Args:
        model: A model with or without adapters, the same on every rank.
        device: Of this rank.
        ranks: All of them.

    Returns:
        Bytes of this rank's parts.

    Raises:
        InputError: `cannot_shard`.
    """
    check_shardable(model)
    mesh = init_device_mesh(device.type, (ranks,))
    for layer in decoder_layers(model):
        _move(layer, device)
        for module in layer.modules():
            if is_four_bit(module):
                _make_plain(module)
            elif isinstance(module, Int8Linear):
                module.weight = _as_floats(module.weight)
        trained = {value for value in layer.parameters() if value.requires_grad}
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    _move(model, device)
    whole = {value for value in model.parameters() if not isinstance(value, DTensor)}
    # The layers' common root: with it, a layer's weights come while the one before is computed.
    fully_shard(causal_model(model).base_model, mesh=mesh, ignored_params=whole)
    parts = [value.to_local() for value in model.parameters() if isinstance(value, DTensor)]
    return sum(part.numel() * part.element_size() for part in parts)


def _make_plain(linear: Any) -> None:
    """Leaves the packed bytes as a plain parameter; bitsandbytes finds the state in the module."""
    weight = linear.weight
    linear.quant_state = getattr(weight, "quant_state", None) or linear.quant_state
    linear.weight = _as_floats(weight)


def _as_floats(weight: Tensor) -> nn.Parameter:
    """Calls packed bytes float32, four a number: until torch 2.12 FSDP2 shards nothing else.

    Bytes are copied, never computed with; bitsandbytes and `Int8Linear.rows` read them as bytes.
    It is float32 since PEFT makes adapters in the type of a floating weight.
    """
    stored = weight.data.contiguous()
    if not stored.is_floating_point() and stored.numel() % 4 == 0:
        if stored.shape[-1] % 4:  # bitsandbytes: one column of bytes
            stored = stored.view(-1).view(torch.float32).view(-1, 1)
        else:
            stored = stored.view(torch.float32)
    return nn.Parameter(stored, requires_grad=False)


def _move(model: nn.Module, device: torch.device) -> None:
    """Moves what is not sharded yet: `Module.to` refuses quantised models."""
    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None and not isinstance(tensor, DTensor) and tensor.device != device:
                tensor.data = tensor.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
