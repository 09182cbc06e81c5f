"""Finding the adapted layers that share an input, by watching one forward."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from glasstune.adapters.lora_layers import adapted_modules, why_no_linear_lora
from glasstune.fast.bases import BaseKey, base_key, shared_weights
from glasstune.fast.group import Group
from glasstune.kernels.lora_group import MAX_MEMBERS

_PROBE_TOKENS = 8

WATCHED = "layers that were called with one tensor in a trial forward"


def make_groups(
    model: nn.Module, example: Mapping[str, Any] | None
) -> tuple[list[Group], dict[str, str], str]:
    """Groups the adapted layers of a model.

    Args:
        model: Any model with LoRA layers.
        example: Keyword arguments of a forward; None makes a few tokens.

    Returns:
        The groups, the reason of each adapted module that is in none, and how inputs were found.
    """
    keys: dict[str, BaseKey] = {}
    refused: dict[str, str] = {}
    shared = shared_weights(model)
    modules = adapted_modules(model)
    for path, layer in modules.items():
        reason = why_no_linear_lora(layer)
        key = reason or base_key(layer.get_base_layer(), shared)  # type: ignore[operator]
        if isinstance(key, str):
            refused[path] = key
        else:
            keys[path] = key
    layers = {path: modules[path] for path in keys}
    together, how = _watched(model, layers, example) if layers else ([], "nothing to group")
    groups = []
    for paths in together:
        by_key: dict[BaseKey, list[str]] = {}
        for path in paths:
            by_key.setdefault(keys[path], []).append(path)
        for key, members in by_key.items():
            for start in range(0, len(members), MAX_MEMBERS):
                part = members[start : start + MAX_MEMBERS]
                groups.append(Group(part, [layers[path] for path in part], key.kind))
    return groups, refused, how


def _watched(
    model: nn.Module, layers: Mapping[str, nn.Module], example: Mapping[str, Any] | None
) -> tuple[list[list[str]], str]:
    alone = [[path] for path in layers]
    inputs = _example(model) if example is None else dict(example)
    if inputs is None:
        return alone, "the model has no token embeddings to try and no example was given"
    try:
        calls = _calls(model, layers, inputs)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return alone, f"a forward on a few tokens failed ({text})"
    return shared_inputs(calls, list(layers)), WATCHED


def shared_inputs(calls: list[tuple[str, Tensor | None]], paths: list[str]) -> list[list[str]]:
    """Groups paths by the identity of what they were called with.

    Args:
        calls: Path and first input of each call, in order; the tensors are alive.
        paths: All layers; one that was not called once exactly stays alone.

    Returns:
        Every path once.
    """
    times: dict[str, int] = {}
    for path, _ in calls:
        times[path] = times.get(path, 0) + 1
    groups: list[tuple[Tensor, list[str]]] = []
    placed: set[str] = set()
    for path, tensor in calls:
        if tensor is None or times[path] != 1:
            continue
        placed.add(path)
        for other, members in reversed(groups):
            if other is tensor:
                members.append(path)
                break
        else:
            groups.append((tensor, [path]))
    return [members for _, members in groups] + [[path] for path in paths if path not in placed]


def _calls(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Mapping[str, Any]
) -> list[tuple[str, Tensor | None]]:
    """Runs one forward in eval mode and returns who was called with what."""
    seen: list[tuple[str, Tensor | None]] = []

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append((path, args[0] if len(args) == 1 and isinstance(args[0], Tensor) else None))

        return hook

    handles = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    training = [module for module in model.modules() if module.training]
    parameter = next(model.parameters())
    half = next((p.dtype for p in model.parameters() if p.dtype in _HALF), None)
    kind = parameter.device.type
    try:
        model.eval()
        with torch.no_grad(), torch.autocast(kind, half) if half else nullcontext():
            model(**inputs)
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    return seen


_HALF = (torch.bfloat16, torch.float16)


def _example(model: Any) -> dict[str, Any] | None:
    if not hasattr(model, "get_input_embeddings"):
        return None
    embeddings = model.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    ids = (torch.arange(_PROBE_TOKENS, device=weight.device) * 7919 % weight.shape[0]).unsqueeze(0)
    inputs: dict[str, Any] = {"input_ids": ids}
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    return inputs
