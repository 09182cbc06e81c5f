"""From the bytes of each block to the peak of a run: a maximum over its moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from glasstune.core.plan import PARTS, Moment
from glasstune.core.recompute import Recompute
from glasstune.planner.watch import BlockBytes


@dataclass(frozen=True)
class Static:
    """What stays the whole run.

    Args:
        base: Frozen weights as they are stored.
        wide: What the fast path adds to them: columns and rows of the adapters beside the base's.
        adapters: Trained tensors (float32).
        gradients: Of all trained tensors.
        optimizer: Their moments.
        load: Most bytes beside the base while it is loaded.
        largest: The largest trained tensor, for buffers of the optimiser's step.
    """

    base: int
    wide: int
    adapters: int
    gradients: int
    optimizer: int
    load: int = 0
    largest: int = 0


@dataclass(frozen=True)
class Activations:
    """What a batch does to memory.

    Args:
        before: Alive when the first block begins.
        plain: Of each block, kept.
        again: Of each block, computed again.
        entering: Bytes of a block's input.
        head: Most above what the blocks keep, from the last block's end to its backward.
        head_kept: Kept between the last block and the loss.
        evaluation: The most while a batch is evaluated.
        flops: Floating point operations outside the blocks.
        notes: How the numbers were found.
        beside: What lives through the whole backward beside what the blocks keep; see `StepBytes`.
        held: Kept after the last block once every loss is there, before any backward.
        split_head: Most above what the blocks keep, while a backward that lets nothing go runs
            through the losses.
        light: Budget below 1 -> `plain` and `again` of layers that keep that share of theirs.
    """

    before: int
    plain: Sequence[BlockBytes]
    again: Sequence[BlockBytes]
    entering: int
    head: int
    head_kept: int
    evaluation: int
    flops: int = 0
    notes: list[str] = field(default_factory=list)
    beside: int = 0
    held: int = 0
    split_head: int = 0
    light: Mapping[float, tuple[Sequence[BlockBytes], Sequence[BlockBytes]]] = field(
        default_factory=dict
    )

    def blocks(self, recompute: Recompute) -> list[BlockBytes]:
        """Returns each layer as a policy runs it."""
        whole = (self.plain, self.again)
        plain, again = whole if recompute.budget == 1 else self.light[recompute.budget]
        return [*again[: recompute.layers], *plain[recompute.layers :]]


_IN_FLIGHT = 2
"""Offloaded inputs that are on the device at a time: one is copied while another is used."""


def moments(
    static: Static,
    batch: Activations,
    recompute: Recompute,
    *,
    context: int,
    workspace: int = 0,
    holes: float = 0.0,
    split: int = 0,
    accumulates: bool = False,
) -> list[Moment]:
    """Returns the peak of each phase of a run.

    Args:
        static: What stays.
        batch: The largest batch.
        recompute: Which blocks are computed again.
        context: What the process itself takes.
        workspace: What libraries keep on the device (products' workspaces).
        holes: Free pieces that an allocator cannot give again, as a share of the activations.
        split: Loss terms that have a backward of their own in an audited update.
        accumulates: Whether an update has several forwards: gradients of one wait for the next.

    Returns:
        One entry a phase, in the order of a run.
    """
    blocks = batch.blocks(recompute)
    kept = [block.kept for block in blocks]
    flying = 0
    if recompute.offload:
        kept = [0 if index < recompute.layers else block.kept for index, block in enumerate(blocks)]
        flying = min(_IN_FLIGHT, recompute.layers) * batch.entering
    stays = {"base": static.base + static.wide, "adapters": static.adapters, "context": context}
    # An audited update holds each term's gradient, and what is left of the step's beside them.
    audited = (split + 1) * static.gradients if split else 0
    waiting = static.gradients if accumulates else 0
    run = {**stays, "optimizer": static.optimizer}
    step = {**run, "gradients": waiting + (audited if accumulates else 0)}

    def moment(phase: str, where: str, parts: dict[str, int]) -> Moment:
        lost = round(holes * parts.get("activations", 0))
        full = {name: parts.get(name, 0) for name in PARTS}
        full["workspace"] += workspace + lost
        return Moment(phase, where, sum(full.values()), full)

    load = {"base": static.base, "context": context, "workspace": static.load - workspace}
    found = [moment("load", "weights are read", load)]
    alive = batch.before + flying
    forward = []
    for index, block in enumerate(blocks):
        parts = {**step, "activations": alive, "workspace": block.forward}
        forward.append(moment("forward", f"layer {index}", parts))
        alive += kept[index]
    if recompute.offload and recompute.layers:
        # Embeddings are the first layer's input; the model's forward has let go of them now.
        alive -= min(batch.before, batch.entering)
    loss = {**step, "activations": alive, "workspace": batch.head}
    found += [_highest(forward)] if blocks else []
    found.append(moment("loss", "head and loss", loss))
    if split and blocks:
        # A term's own gradient is among those held, but where an earlier forward's is there too.
        held = {**run, "gradients": audited + 2 * waiting}
        passes = [("losses by themselves", alive, batch.split_head)] + [
            (f"layer {index}, a term by itself", alive + batch.held, block.split - block.gradients)
            for index, block in enumerate(blocks)
        ]
        found.append(
            _highest(
                [
                    moment("audit", where, {**held, "activations": stay, "workspace": more})
                    for where, stay, more in passes
                ]
            )
        )
    backward = [
        moment("backward", where, {**run, **parts, "gradients": parts["gradients"] + audited})
        for where, parts in _backward(blocks, kept, alive, batch.beside, waiting)
    ]
    found += [_highest(backward)] if blocks else []
    optimizer = {**run, "gradients": static.gradients + audited, "workspace": static.largest}
    found.append(moment("optimizer", "adapters move", optimizer))
    evaluation = {**run, "activations": 0, "workspace": batch.evaluation}
    found.append(moment("evaluation", "held-out rows", evaluation))
    return found


def _backward(
    blocks: Sequence[BlockBytes], kept: Sequence[int], alive: int, beside: int, waiting: int
) -> Iterator[tuple[str, dict[str, int]]]:
    """Returns (where, parts) of each block's backward; gradients are added up as they come."""
    gradients = waiting
    for index in reversed(range(len(blocks))):
        block = blocks[index]
        alive -= kept[index]
        own = min(kept[index], block.backward)
        fresh = min(block.gradients, block.backward - own)
        parts = {
            "activations": alive + beside + own,
            "workspace": block.backward - own - fresh,
            "gradients": gradients + fresh,
        }
        yield f"layer {index}", parts
        gradients += 0 if waiting else block.gradients


def _highest(found: list[Moment]) -> Moment:
    return max(found, key=lambda moment: moment.bytes)


def peak(found: Sequence[Moment]) -> Moment:
    """Returns the highest moment."""
    return max(found, key=lambda moment: moment.bytes)


def owner(moment: Moment) -> str:
    """Returns the largest part of a moment."""
    return max(moment.parts, key=lambda name: moment.parts[name])


def step_flops(batch: Activations, recompute: Recompute) -> int:
    """Returns the operations of a forward and a backward, recomputation included."""
    return batch.flops + sum(block.flops for block in batch.blocks(recompute))


def step_traffic(batch: Activations, recompute: Recompute) -> int:
    """Returns the bytes that cross the memory's wires because cheap results are made again."""
    return 2 * sum(block.again for block in batch.blocks(recompute))
