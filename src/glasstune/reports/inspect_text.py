"""A module tree as lines of text in the look of `print(model)`, from a record."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from glasstune.reports.folding import Child, fold_tree

Json = Mapping[str, Any]

_KINDS = {"lora": "LoRA", "dora": "DoRA", "modules_to_save": "trained copy", "bias": "trained bias"}


def tree_lines(precision: Any, depth: int | None = None) -> list[str]:
    """Returns the tree of one precision as `print(model)` shows it, equal blocks folded.

    Args:
        precision: A `PrecisionRecord`, or its JSON object.
        depth: Modules at this depth (the model has 0) show `(...)` instead of what they hold.
    """
    json: Json = precision if isinstance(precision, Mapping) else precision.to_dict()
    tree = fold_tree({"": json["modules"]})
    return list(_lines(Child("", "", 1, tree), "", depth))


def _lines(child: Child, indent: str, depth: int | None) -> Iterator[str]:
    node = child.node
    row = node.row
    head = f"{indent}{prefix(child)}"
    lora = f" + {lora_text(node.lora)}" if node.lora else ""
    own = row["detail"].split("\n") if row["detail"] else []
    if not node.children and len(own) <= 1:
        yield f"{head}{row['class']}({''.join(own)}){lora}"
        return
    if depth == 0:
        yield f"{head}{row['class']}(...){lora}"
        return
    yield f"{head}{row['class']}("
    for line in own:
        yield f"{indent}  {line}"
    for below in node.children:
        yield from _lines(below, indent + "  ", None if depth is None else depth - 1)
    yield f"{indent}){lora}"


def prefix(child: Child) -> str:
    """Returns what stands before a class: `(dense): `, `(0-29): 30 x `; nothing for the model."""
    if not child.name:
        return ""
    times = f"{child.count} x " if child.count > 1 else ""
    return f"({child.label}): {times}"


def lora_text(lora: Json) -> str:
    """Names what an adapter adds: `LoRA(r=16)`, `trained copy`."""
    name = _KINDS.get(lora["kind"], str(lora["kind"]).replace("_", " "))
    return name if lora["r"] is None else f"{name}(r={lora['r']})"


def short_detail(detail: str) -> str:
    """Shortens what stands in the brackets to its sizes: `in_features=64, bias=True` to `64`."""
    parts = re.split(r", (?![^(]*\))", detail.replace("\n", ", "))
    kept = [re.sub(r"^(in_features|out_features|nx|nf)=", "", part) for part in parts]
    return ", ".join(part for part in kept if "=" not in part)
