"""Which parameters a loss leads to, read from its graph before any backward.

A node that runs a graph of its own inside its backward is opaque: what lies behind it is "unknown",
neither reached nor not. There are two kinds: reentrant checkpointing, whose region is not in the
graph at all, and a compiled region, which is one node whatever happens inside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from glasstune.core.gradients import Reached

Node = Any  # torch.autograd.graph.Node; C++ nodes are no subclass of it


@dataclass(slots=True)
class Reach:
    """What a loss leads to.

    Args:
        surely: Ids of leaf tensors reached without passing an opaque node.
        perhaps: Ids of leaf tensors reached only through one.
        nodes: Nodes visited without passing an opaque node (they keep each other's ids alive).
        leaves: Every leaf tensor found.
        reentrant: Whether there is reentrant checkpointing.
        compiled: Whether there is a compiled region.
    """

    surely: set[int] = field(default_factory=set)
    perhaps: set[int] = field(default_factory=set)
    nodes: set[Node] = field(default_factory=set)
    leaves: list[Tensor] = field(default_factory=list)
    reentrant: bool = False
    compiled: bool = False

    def reaches(self, parameter: Tensor) -> Reached:
        """Whether the loss leads to a parameter.

        Under reentrant checkpointing a parameter that the walk does not find may still be inside.
        """
        if parameter.grad_fn is not None:
            if parameter.grad_fn in self.nodes:
                return True
        elif id(parameter) in self.surely:
            return True
        return "unknown" if self.reentrant or id(parameter) in self.perhaps else False


def is_reentrant(node: Node) -> bool:
    """Whether a node is a checkpoint that runs its own backward (torch's or one made like it)."""
    name = node.name()
    return "checkpoint" in name.lower() and name.endswith("Backward")


def is_compiled(node: Node) -> bool:
    """Whether a node is a region that torch.compile made one node of."""
    return bool(node.name().startswith("CompiledFunction"))


def walk(roots: Iterable[Tensor]) -> Reach:
    """Walks `next_functions` from scalar losses down to the leaves.

    Args:
        roots: Tensors; those without a graph lead nowhere.
    """
    found = Reach()
    behind: list[Node] = []
    todo: list[Node] = []
    for root in roots:
        if root.grad_fn is not None:
            todo.append(root.grad_fn)
        elif root.requires_grad:
            found.surely.add(id(root))
            found.leaves.append(root)
    while todo:
        node = todo.pop()
        if node in found.nodes:
            continue
        found.nodes.add(node)
        leaf = getattr(node, "variable", None) if not node.next_functions else None
        if leaf is not None:
            found.surely.add(id(leaf))
            found.leaves.append(leaf)
        opaque = is_reentrant(node), is_compiled(node)
        found.reentrant |= opaque[0]
        found.compiled |= opaque[1]
        children = [child for child, _ in node.next_functions if child is not None]
        (behind if any(opaque) else todo).extend(children)
    seen: set[Node] = set()
    while behind:
        node = behind.pop()
        if node in seen or node in found.nodes:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None) if not node.next_functions else None
        if leaf is not None:
            found.perhaps.add(id(leaf))
            found.leaves.append(leaf)
        found.reentrant |= is_reentrant(node)
        found.compiled |= is_compiled(node)
        behind.extend(child for child, _ in node.next_functions if child is not None)
    return found
