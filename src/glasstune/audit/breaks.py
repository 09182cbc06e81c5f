"""Where a parameter's gradient is lost between its module and the loss.

A call's outputs carry a parameter's gradient where their graph leads to it. The last call that
still does is the end of its road; the first call after it that got the same values, or new ones,
without a gradient is where the road was cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from glasstune.audit.calls import Event


@dataclass(frozen=True, slots=True)
class Break:
    """The end of a parameter's road.

    Args:
        last: Last call whose output carries the gradient; None where none does.
        cut: First call after it whose input does not; None where no such call was found.
        same: Whether that call got the very memory of an output that had the gradient.
    """

    last: Event | None
    cut: Event | None = None
    same: bool = False


def find_breaks(
    events: Sequence[Event], dead: Sequence[Tensor], loss_nodes: set[Any] | None
) -> dict[int, Break]:
    """Finds where each dead parameter's road ends.

    Args:
        events: Calls in the order in which they began.
        dead: Parameters that no loss reaches.
        loss_nodes: Nodes of the losses' graphs; None where they are not known.

    Returns:
        id of each parameter to its break.
    """
    if not dead:
        return {}
    bits = {id(tensor): 1 << index for index, tensor in enumerate(dead)}
    nodes = {tensor.grad_fn: 1 << index for index, tensor in enumerate(dead) if tensor.grad_fn}
    memo: dict[Any, int] = {}
    masks = [_carried(event.nodes, bits, nodes, memo) for event in events]
    found: dict[int, Break] = {}
    by_road: dict[tuple[int, ...], Break] = {}
    for index, tensor in enumerate(dead):
        road = tuple(
            place for place, mask in enumerate(masks) if mask >> index & 1 and events[place].end > 0
        )
        if road not in by_road:
            by_road[road] = _break(events, road, loss_nodes)
        found[id(tensor)] = by_road[road]
    return found


def _carried(
    roots: Sequence[Any], bits: Mapping[int, int], nodes: Mapping[Any, int], memo: dict[Any, int]
) -> int:
    """Which dead parameters the graphs of these nodes lead to, as bits."""
    total = 0
    for root in roots:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in memo:
                stack.pop()
                continue
            children = [child for child, _ in node.next_functions if child is not None]
            missing = [child for child in children if child not in memo]
            if missing:
                stack.extend(missing)
                continue
            mask = nodes.get(node, 0)
            if not children:
                mask |= bits.get(id(getattr(node, "variable", None)), 0)
            for child in children:
                mask |= memo[child]
            memo[node] = mask
            stack.pop()
        total |= memo[root]
    return total


def _break(events: Sequence[Event], road: Sequence[int], loss_nodes: set[Any] | None) -> Break:
    if not road:
        return Break(None)
    on_road = set(road)
    last = max((events[place] for place in road), key=lambda event: event.end)
    carried = {memory.cdata for place in road for memory in events[place].out}
    # What was there before cannot be a copy of the lost output.
    known = {
        memory.cdata
        for place, event in enumerate(events)
        if event.start < last.end
        for memory in (*event.plain_in, *(event.out if place not in on_road else ()))
    } - carried
    guess: Event | None = None
    for event in events:
        if event.start < last.end or not event.plain_in:
            continue
        if any(memory.cdata in carried for memory in event.plain_in):
            return Break(last, event, same=True)
        fresh = any(memory.cdata not in known for memory in event.plain_in)
        leads = (
            bool(event.nodes)
            if loss_nodes is None
            else any(node in loss_nodes for node in event.nodes)
        )
        if guess is None and not event.grad_in and fresh and leads:
            guess = event
    return Break(last, guess)
