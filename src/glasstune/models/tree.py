"""A model's tree of modules as text, with equal neighbours folded into one line."""

from __future__ import annotations

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
