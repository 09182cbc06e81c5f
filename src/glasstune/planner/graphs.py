"""What a compiled block keeps and needs, from the very graphs that torch's compiler makes of it.

A block is traced under tensors without data, and the compiler's own passes decide what the forward
saves for the backward and what the backward computes again. The two graphs are then walked as the
generated code runs: products and other kernels of their own write buffers, what lies between them
is fused into their readers and writes none, and a buffer is free after its last reader.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor, fx
from torch.utils._pytree import tree_iter, tree_map_only

from glasstune.planner.buffers import Buffers
from glasstune.planner.buffers import rounded as _size
from glasstune.planner.live import operations
from glasstune.planner.shadow import Shadow
from glasstune.planner.walk import Walk, walk
from glasstune.planner.watch import BlockBytes


@dataclass
class Compiled:
    """The graphs of one block.

    Args:
        forward: Made for training.
        backward: Its counterpart.
        outside: Indices of inputs that live outside the block: weights, positions, masks.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    outside: set[int]


BOXED_GRADIENTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
"""Whether a compiled backward may free the gradient that it is given."""


def compiled_bytes(
    shadow: Shadow, path: str, call: tuple[tuple[Any, ...], dict[str, Any]], *,
    round_to: int = 512, budget: float = 1.0, donated: bool = True,
) -> tuple[BlockBytes, BlockBytes]:  # fmt: skip
    """Returns the bytes of a compiled block, plain and computed again in the backward.

    Their operations are those that the graphs have: of one forward and one backward.

    Args:
        shadow: The model.
        path: Of the block.
        call: Its arguments.
        round_to: Bytes to which each tensor is rounded up.
        budget: Share of its activations that the block keeps; see `Recompute`.
        donated: Whether a backward may write into what the forward saved; not where another one
            may follow.

    Raises:
        RuntimeError: The compiler does not take the block as one graph with a backward.
    """
    block = shadow.model.get_submodule(path)
    with functorch.patch(activation_memory_budget=budget):
        graphs = compile_block(shadow, path, call)
    entering = sum(_size(value, round_to) for value in _distinct(_tensors(call[0][:1])))
    ahead, saved, keeps_input, leaving = _forward(graphs, round_to)
    outside = {f"primals_{index + 1}" for index in graphs.outside}
    tangents = [
        node for node in graphs.backward.graph.nodes
        if node.op == "placeholder" and node.name.startswith("tangents")
    ]  # fmt: skip
    # Until torch 2.12 the incoming gradient is held until the block's backward returns.
    stays = [] if BOXED_GRADIENTS else [node.name for node in tangents]
    back = walk(graphs.backward, outside, round_to, takes=True, stays=stays, donated=donated)
    # Where nothing is let go only what the backward makes comes on top, and its gradient waits.
    alone = walk(graphs.backward, outside, round_to)
    held = sum(_size(node.meta["val"], round_to) for node in tangents)
    gradients = sum(p.numel() * p.element_size() for p in block.parameters() if p.requires_grad)
    kept = saved + leaving - (0 if keeps_input else entering)
    # The input is among those kept by the blocks before.
    backward = back.peak - (entering if keeps_input else 0)
    flops = graph_flops(graphs.forward) + graph_flops(graphs.backward)
    plain = BlockBytes(
        kept, max(ahead.peak, saved + leaving), backward, gradients, flops, split=held + alone.peak
    )
    # The input is kept from outside, and the incoming gradient waits while the forward runs again.
    deep = max(backward, held + max(ahead.peak, saved + leaving))
    again = BlockBytes(
        leaving, plain.forward, deep, gradients, flops + graph_flops(graphs.forward), split=deep
    )  # fmt: skip
    return plain, again


def _forward(graphs: Compiled, round_to: int) -> tuple[Walk, int, bool, int]:
    """Returns the walk, bytes saved, whether the input is among them, and bytes returned."""
    outside = {f"primals_{index + 1}" for index in graphs.outside}
    plan = Buffers(graphs.forward, round_to)
    output = next(iter(tree_iter(plan.nodes[-1].args[0])))
    result = plan.key.get(output)
    keys = plan.outputs - {result}
    inputs = {key for key in keys if key in plan.inputs}
    entering = {key for key in inputs if key.name not in outside}
    saved = sum(plan.size[key] for key in keys - inputs)
    leaving = plan.size[result] if result not in plan.inputs else 0
    return walk(graphs.forward, outside, round_to), saved, bool(entering), leaving


def compile_block(
    shadow: Shadow, path: str, call: tuple[tuple[Any, ...], dict[str, Any]]
) -> Compiled:
    """Has torch's compiler make the graphs of a block; no code is generated and nothing runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own parts
        return _compile_block(shadow, path, call)


def _compile_block(
    shadow: Shadow, path: str, call: tuple[tuple[Any, ...], dict[str, Any]]
) -> Compiled:
    from torch._inductor.compile_fx import compile_fx

    found: list[fx.GraphModule] = []

    def inner(graph: fx.GraphModule, _: Sequence[Any], **__: Any) -> Callable[..., Any]:
        found.append(graph)

        def run(args: list[Any]) -> Any:
            values = list(args)
            args.clear()
            return fx.Interpreter(graph).boxed_run(values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    outside: set[int] = set()
    entering: set[int] = set()

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        outside.update(
            index
            for index, value in enumerate(inputs)
            if not isinstance(value, Tensor) or _storage(value) not in entering
        )
        return compile_fx(graph, inputs, inner_compile=inner)  # type: ignore[arg-type]

    block = shadow.model.get_submodule(path)
    inside = [group for group in shadow.groups if group.paths[0].startswith(f"{path}.")]
    args, kwargs = call
    args = (_leaf(args[0]), *args[1:])
    entering.add(_storage(args[0]))
    import torch._dynamo as dynamo

    dynamo.reset()
    try:
        with shadow.mode, shadow.precision():
            for group in inside:
                group.open = True
            compiled: Callable[..., Any] = torch.compile(
                block._call_impl, backend=backend, dynamic=False, fullgraph=True
            )
            out = compiled(*args, **kwargs)
        with shadow.mode:
            first = out if isinstance(out, Tensor) else out[0]
            first.sum().backward()
    finally:
        for group in inside:
            group.open = False
            group.leave()
        for parameter in block.parameters():
            parameter.grad = None
        dynamo.reset()
    if len(found) != 2:
        raise RuntimeError(f"the compiler made {len(found)} graphs of {path}, not two")
    return Compiled(found[0], found[1], outside)


def graph_flops(graph: fx.GraphModule) -> int:
    """Returns the floating point operations of a graph's products and attention."""
    total = 0
    for node in graph.graph.nodes:
        if node.op == "call_function":
            args, kwargs = tree_map_only(
                fx.Node, lambda argument: argument.meta.get("val"), (node.args, node.kwargs)
            )
            total += operations(node.target, args, kwargs, node.meta.get("val"))
    return total


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _tensors(tree: Any) -> list[Tensor]:
    return [value for value in tree_iter(tree) if isinstance(value, Tensor)]


def _distinct(values: Iterable[Tensor]) -> list[Tensor]:
    return list({_storage(value): value for value in values}.values())


def _leaf(value: Any) -> Any:
    """Gives a block's input the place of a gradient."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_(True)
    return value
