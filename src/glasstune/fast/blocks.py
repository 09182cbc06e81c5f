"""Finding the repeated blocks of a model, whatever its family calls them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def find_blocks(model: nn.Module, adapted: Iterable[str]) -> dict[str, nn.Module]:
    """Returns the elements of every outermost `nn.ModuleList` that holds adapted layers.

    Lists within blocks (experts) are left to their blocks, and a list of bare adapted layers has
    no blocks.

    Args:
        model: Any model.
        adapted: Paths of the adapted layers.
    """
    paths = list(adapted)
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or _within(path, found):
            continue
        inside = [other for other in paths if other.startswith(f"{path}.")]
        blocks = {f"{path}.{name}": block for name, block in module.named_children()}
        if inside and not any(other in blocks for other in inside):
            found.update(blocks)
    return found


def find_norms(model: nn.Module, blocks: Iterable[str]) -> dict[str, nn.Module]:
    """Returns the normalisations beside the blocks that torch has no kernel of its own for."""
    parents = {path.rsplit(".", 2)[0] if path.count(".") > 1 else "" for path in blocks}
    found = {}
    for parent in sorted(parents):
        for name, module in model.get_submodule(parent).named_children():
            kind = type(module).__name__.lower()
            if "norm" in kind and not isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                found[f"{parent}.{name}" if parent else name] = module
    return found


def _within(path: str, blocks: Iterable[str]) -> bool:
    return any(path == block or path.startswith(f"{block}.") for block in blocks)
