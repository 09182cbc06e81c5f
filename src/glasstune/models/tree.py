"""A model's tree of modules as text, with equal neighbours folded into one line."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def tree_text(model: nn.Module) -> str:
    """Returns the tree as `print(model)` shows it, runs of equal children folded.

    Two children are equal when their own texts are: same classes, same shapes. A run is written
    as `(0-29): 30 x LlamaDecoderLayer(...)`.

    Args:
        model: Any module, with adapters or without.
    """
    return "\n".join(_lines(model))


def _lines(module: nn.Module) -> list[str]:
    """Returns the text of one module as lines, its first without a name."""
    adapted = _lora(module)
    if adapted is not None:
        return [adapted]
    own = module.extra_repr().splitlines()
    children = [(name, _lines(child)) for name, child in module.named_children()]
    title = type(module).__name__
    if not children:
        if len(own) > 1:
            return [f"{title}(", *(f"  {line}" for line in own), ")"]
        return [f"{title}({own[0] if own else ''})"]
    lines = [f"{title}(", *(f"  {line}" for line in own)]
    start = 0
    while start < len(children):
        end = start
        while end + 1 < len(children) and children[end + 1][1] == children[start][1]:
            end += 1
        names, body = children[start][0], children[start][1]
        first = f"({names}): {body[0]}"
        # Only numbered children fold: q_proj and o_proj may be equal and are two names.
        if end > start and all(name.isdigit() for name, _ in children[start : end + 1]):
            first = f"({names}-{children[end][0]}): {end - start + 1} x {body[0]}"
        else:
            end = start
        lines += [f"  {first}", *(f"  {line}" for line in body[1:])]
        start = end + 1
    return [*lines, ")"]


def _lora(module: nn.Module) -> str | None:
    """Returns one line for a layer with LoRA around it, read by PEFT's attribute names."""
    base, ups = getattr(module, "base_layer", None), getattr(module, "lora_A", None)
    if not isinstance(base, nn.Module) or not isinstance(ups, nn.ModuleDict) or not ups:
        return None
    ranks: Mapping[str, int] = getattr(module, "r", {})
    names = ", ".join(
        f"r={ranks[name]}" if name == "default" else f"{name} r={ranks[name]}" for name in ups
    )
    return f"{type(base).__name__}({base.extra_repr()}) + LoRA({names})"
