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

from glasstune.planner.live import attention_workspace, operations
from glasstune.planner.shadow import Shadow
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
    back = walk(graphs.backward, outside, round_to, takes=True, donated=donated)
    # Where nothing is let go only what the backward makes comes on top, and its gradient waits.
    alone = walk(graphs.backward, outside, round_to)
    held = sum(
        _size(node.meta["val"], round_to)
        for node in graphs.backward.graph.nodes
        if node.op == "placeholder" and node.name.startswith("tangents")
    )
    # Until torch 2.12 the incoming gradient is held until the block's backward returns.
    late = 0 if BOXED_GRADIENTS else held
    gradients = sum(p.numel() * p.element_size() for p in block.parameters() if p.requires_grad)
    kept = saved + leaving - (0 if keeps_input else entering)
    # The input is among those kept by the blocks before.
    backward = back.peak + late - (entering if keeps_input else 0)
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
    plan = _Buffers(graphs.forward, round_to)
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
    graph: fx.GraphModule, outside: set[str], round_to: int, *,
    takes: bool = False, donated: bool = True,
) -> Walk:  # fmt: skip
    """Walks a graph as its generated code allocates and frees.

    Args:
        graph: Forward or backward.
        outside: Names of inputs that live elsewhere anyway.
        round_to: Bytes to which each buffer is rounded up.
        takes: Whether inputs are freed after their last use, as saved tensors are.
        donated: Whether results may be written into such an input.
    """
    plan = _Buffers(graph, round_to)
    now = peak = 0
    mine = {key for key in plan.inputs if takes and key.name not in outside}
    now = peak = sum(plan.size[key] for key in mine)
    for index, node in enumerate(plan.order):
        freed = [key for key in plan.last.get(index, ()) if key in mine or key not in plan.inputs]
        made = plan.made.get(node)
        if made is not None:
            # A fused kernel may write into an input that it is the last to read.
            same = [
                key for key in freed
                if plan.size[key] == plan.size[made] and (donated or key not in plan.inputs)
            ]  # fmt: skip
            if same and not plan.own_kernel(node):
                freed.remove(same[0])
                now -= plan.size[same[0]]
            now += plan.size[made]
            peak = max(peak, now + _inside(node))
        now -= sum(plan.size[key] for key in freed)
    out = sum(plan.size[key] for key in plan.outputs - plan.inputs)
    return Walk(peak, out)


def _inside(node: fx.Node) -> int:
    """Bytes that a kernel allocates within itself."""
    values = [a.meta.get("val") if isinstance(a, fx.Node) else a for a in node.args]
    return attention_workspace(str(node.target), values)


class _Buffers:
    """Which nodes of a graph write a buffer, and when each is read for the last time."""

    def __init__(self, graph: fx.GraphModule, round_to: int) -> None:
        self.nodes = list(graph.graph.nodes)
        self.order = [node for node in self.nodes if node.op != "output"]
        self.size: dict[Any, int] = {}
        self.made: dict[fx.Node, Any] = {}
        self.inputs: set[Any] = set()
        self.key: dict[fx.Node, Any] = {}
        output = self.nodes[-1]
        returned = {node for node in tree_iter(output.args) if isinstance(node, fx.Node)}
        for node in self.order:
            self._place(node, returned, round_to)
        self.outputs = {self.key[node] for node in returned if self.key.get(node) is not None}
        self.last: dict[int, list[Any]] = {}
        self._ends()

    def _place(self, node: fx.Node, returned: set[fx.Node], round_to: int) -> None:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if isinstance(value, Tensor):
                self._own(node, value, round_to)
                self.inputs.add(self.key[node])
            return
        base = _alias(node)
        if base is not None:
            self.key[node] = self.key.get(base)
            if base in self.made or self.key[node] is not None or not self._writes(node, returned):
                return
        if isinstance(value, Tensor) and self._writes(node, returned):
            self._own(node, value, round_to)
            self.made[node] = self.key[node]
        elif isinstance(value, (tuple, list)):
            self._many(node, value, round_to)

    def _own(self, node: fx.Node, value: Tensor, round_to: int) -> None:
        self.key[node] = node
        self.size[node] = _size(value, round_to)

    def _many(self, node: fx.Node, values: Iterable[Any], round_to: int) -> None:
        """A kernel with several results: one buffer for all of them."""
        total = sum(_size(value, round_to) for value in values if isinstance(value, Tensor))
        self.key[node] = node
        self.size[node] = total
        self.made[node] = node

    def own_kernel(self, node: fx.Node) -> bool:
        """Whether a node is a kernel of its own, not one that is fused with its neighbours."""
        return _is_kernel(node)

    def _writes(self, node: fx.Node, returned: set[fx.Node]) -> bool:
        """Whether a node's result lies in memory; all else is fused into its readers.

        That is what a kernel makes, what a kernel reads, and what is returned, directly or through
        views.
        """
        if _is_kernel(node) or node in returned or _is_reduction(node):
            return True
        waiting = list(node.users)
        while waiting:
            user = waiting.pop()
            if _is_kernel(user) or user in returned:
                return True
            if _alias(user) is not None:
                waiting.extend(user.users)
        return False

    def _ends(self) -> None:
        """Finds the last reader of each buffer, through views and what is fused."""
        place = {node: index for index, node in enumerate(self.order)}
        last: dict[Any, int] = {}
        reads: dict[fx.Node, set[Any]] = {}
        for index, node in enumerate(self.order):
            found: set[Any] = set()
            for argument in node.all_input_nodes:
                key = self.key.get(argument)
                if key is not None:
                    found.add(key)
                else:
                    found |= reads.get(argument, set())
            reads[node] = found
            if self.key.get(node) is None or node in self.made:
                for key in found:
                    last[key] = index
        del place
        for key, index in last.items():
            if key not in self.outputs:
                self.last.setdefault(index, []).append(key)


_VIEWS = {
    "view", "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "slice",
    "select", "split", "split_with_sizes", "unbind", "alias", "detach", "as_strided",
    "_unsafe_view", "getitem",
}  # fmt: skip
_KERNELS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_grouped_mm",
    "sort",
    "topk",
    "index_put",
}


def _name(node: fx.Node) -> str:
    target = node.target
    if node.op == "call_function" and getattr(target, "__name__", "") == "getitem":
        return "getitem"
    packet = getattr(target, "overloadpacket", None)
    return str(getattr(packet, "__name__", getattr(target, "__name__", target)))


def _alias(node: fx.Node) -> fx.Node | None:
    """Returns the node whose memory this one is a view of."""
    if node.op == "call_function" and _name(node) in _VIEWS:
        first = node.args[0]
        return first if isinstance(first, fx.Node) else None
    return None


def _is_kernel(node: fx.Node) -> bool:
    if node.op != "call_function" or _name(node) == "getitem":
        return False
    target: Any = node.target
    space = str(getattr(target, "namespace", ""))
    name = _name(node)
    return space not in ("aten", "prims", "") or name in _KERNELS or "attention" in name


def _is_reduction(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor):
        return False
    sizes = [
        argument.meta["val"].numel()
        for argument in node.all_input_nodes
        if isinstance(argument.meta.get("val"), Tensor)
    ]
    return _name(node) in ("sum", "mean", "amax", "amin", "var", "prod") and bool(sizes)


def _size(value: Tensor, round_to: int) -> int:
    size = value.numel() * value.element_size()
    return -(-size // round_to) * round_to


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
