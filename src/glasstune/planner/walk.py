"""A compiler's graph walked as its generated code allocates and frees.

What lies between products is fused: kernels that read the same memory become one (Inductor's rule,
`Scheduler.fuse_nodes`), so that all its results are there beside all that it reads. A result takes
the place of an input only where nothing else still reads that (`decide_inplace_update`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from glasstune.planner.buffers import Buffers, is_kernel, is_reduction, numel
from glasstune.planner.live import attention_workspace


@dataclass
class Walk:
    """Bytes while a graph runs.

    Args:
        peak: The most that lived, above what lies outside.
        out: Bytes of what it returns, inputs left out.
    """

    peak: int
    out: int


def walk(
    graph: fx.GraphModule, outside: Collection[str], round_to: int, *,
    takes: bool = False, stays: Collection[str] = (), donated: bool = True,
) -> Walk:  # fmt: skip
    """Walks a graph as its generated code allocates and frees.

    Args:
        graph: Forward or backward.
        outside: Names of inputs that live elsewhere anyway.
        round_to: Bytes to which each buffer is rounded up.
        takes: Whether inputs are freed after their last use, as saved tensors are.
        stays: Names of inputs that are not even then.
        donated: Whether results may be written into what the forward saved.
    """
    plan = Buffers(graph, round_to)
    kernels = _kernels(plan)
    mine = {key for key in plan.inputs if takes and key.name not in outside}
    held = plan.inputs - mine | plan.outputs | {key for key in mine if key.name in stays}
    last = {key: place for place, kernel in enumerate(kernels) for key in kernel.reads}
    ready = {node: place for place, kernel in enumerate(kernels) for node in kernel.nodes}
    alive = set(mine)
    now = peak = sum(plan.size[key] for key in mine)
    for place, kernel in enumerate(kernels):
        freed = {key for key in kernel.reads if key not in held and last[key] == place}
        made = [node for node in kernel.nodes if plan.made[node] not in alive]
        for node in made:
            key = plan.made[node]
            alive.add(key)
            now += plan.size[key]
            if kernel.own:
                continue
            for taken in sorted(freed & alive, key=str):
                fits = _alike(taken, node) and (donated or taken not in plan.inputs)
                if fits and _last_to_read(plan, taken, node, ready, place):
                    freed.remove(taken)
                    alive.remove(taken)
                    now -= plan.size[taken]
                    break
        peak = max(peak, now + sum(map(_inside, kernel.nodes)))
        unread = {plan.made[node] for node in made} - held - last.keys()
        for key in (freed & alive) | unread:
            alive.remove(key)
            now -= plan.size[key]
    return Walk(peak, sum(plan.size[key] for key in plan.outputs - plan.inputs))


def _alike(taken: fx.Node, node: fx.Node) -> bool:
    """Whether a result has the shape and type of an input; weights and gradients are no one's."""
    before, value = taken.meta.get("val"), node.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(value, Tensor)):
        return False
    given = taken.op == "placeholder" and taken.name.startswith(("primals", "tangents"))
    return before.dtype == value.dtype and before.numel() == value.numel() and not given


def _last_to_read(
    plan: Buffers, key: Any, node: fx.Node, ready: dict[fx.Node, int], place: int
) -> bool:
    """Whether all others that read a buffer have done so before a node of one kernel writes."""
    before = _ancestors(plan, node)
    return all(
        reader is node or ready[reader] < place or reader in before
        for reader in plan.made
        if key in plan.reads[reader]
    )


def _ancestors(plan: Buffers, node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for writer in plan.after[waiting.pop()] - found:
            found.add(writer)
            waiting.append(writer)
    return found


def _inside(node: fx.Node) -> int:
    """Bytes that a kernel allocates within itself."""
    values = [a.meta.get("val") if isinstance(a, fx.Node) else a for a in node.args]
    return attention_workspace(str(node.target), values)


@dataclass(eq=False)
class _Kernel:
    """Nodes whose results one kernel writes."""

    nodes: list[fx.Node]
    own: bool
    reads: set[Any]
    extents: set[int]
    touches: set[Any]
    after: set[fx.Node] = field(default_factory=set)
    first: int = 0


def _kernels(plan: Buffers) -> list[_Kernel]:
    """Returns the kernels of a graph in the order in which they run."""
    found = []
    for index, node in enumerate(plan.order):
        if node in plan.made:
            extents = {numel(node)}
            if is_reduction(node):
                extents.add(max(map(numel, node.all_input_nodes)))
            reads = set(plan.reads[node])
            touches = reads | {plan.made[node]}
            kernel = _Kernel([node], is_kernel(node), reads, extents, touches, first=index)
            kernel.after = set(plan.after[node])
            found.append(kernel)
    return _ordered(_fused(found, plan.size))


def _fused(kernels: list[_Kernel], size: dict[Any, int]) -> list[_Kernel]:
    """Fuses kernels that share memory, those that share most first."""
    pairs = sorted(
        
            (-sum(size[key] for key in one.touches & two.touches), one.first, two.first)
            for one in kernels for two in kernels
            if one.first < two.first and not one.own and not two.own
            and one.extents & two.extents and one.touches & two.touches
        
    )  # fmt: skip
    of = {kernel.first: kernel for kernel in kernels}
    for _, left, right in pairs:
        one, two = of[left], of[right]
        present = set(of.values())
        if one is two or not one.extents & two.extents or _apart(one, two, present):
            continue
        joined = _Kernel(
            one.nodes + two.nodes, False, one.reads | two.reads, one.extents | two.extents,
            one.touches | two.touches, one.after | two.after, min(one.first, two.first),
        )  # fmt: skip
        of.update((first, joined) for first, kernel in list(of.items()) if kernel in (one, two))
    return sorted(set(of.values()), key=lambda kernel: kernel.first)


def _apart(one: _Kernel, two: _Kernel, kernels: Iterable[_Kernel]) -> bool:
    """Whether something must run after one of two kernels and before the other."""
    owner = {node: kernel for kernel in kernels for node in kernel.nodes}
    for start, end in ((one, two), (two, one)):
        seen: set[_Kernel] = set()
        waiting = [owner[node] for node in end.after if owner[node] not in (start, end)]
        while waiting:
            kernel = waiting.pop()
            if kernel is start:
                return True
            if kernel not in seen:
                seen.add(kernel)
                waiting += [owner[node] for node in kernel.after if owner[node] is not kernel]
    return False


def _ordered(kernels: list[_Kernel]) -> list[_Kernel]:
    """Sorts kernels by their first node, what each waits for before it."""
    owner = {node: kernel for kernel in kernels for node in kernel.nodes}
    done: dict[_Kernel, None] = {}

    def visit(kernel: _Kernel) -> None:
        if kernel in done:
            return
        for other in sorted({owner[node] for node in kernel.after}, key=lambda k: k.first):
            if other is not kernel:
                visit(other)
        done[kernel] = None

    for kernel in kernels:
        visit(kernel)
    return list(done)
