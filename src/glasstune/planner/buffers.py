"""Which nodes of a compiler's graph write memory, and which are fused into their readers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_iter


class Buffers:
    """Which nodes of a graph write a buffer, and which buffers each node reads.

    Args:
        graph: Of a forward or a backward.
        round_to: Bytes to which each buffer is rounded up.

    Attributes:
        order: All nodes but the output, as the graph has them.
        size: Buffer -> bytes. A buffer is named by the node that it belongs to.
        made: Node that writes memory -> its buffer; all others are fused into their readers.
        key: Node -> the buffer that its result lies in, None where it lies in none.
        inputs: Buffers that are handed in.
        outputs: Buffers that are returned.
        reads: Node -> buffers that it reads, itself or through what is fused into it.
        after: Node -> writers that must be done before it.
    """

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
        self._join()
        self.reads: dict[fx.Node, set[Any]] = {}
        self.after: dict[fx.Node, set[fx.Node]] = {}
        self._read()

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
        self.size[node] = rounded(value, round_to)

    def _many(self, node: fx.Node, values: Iterable[Any], round_to: int) -> None:
        """A kernel with several results: one buffer for all of them."""
        total = sum(rounded(value, round_to) for value in values if isinstance(value, Tensor))
        self.key[node] = node
        self.size[node] = total
        self.made[node] = node

    def _writes(self, node: fx.Node, returned: set[fx.Node]) -> bool:
        """Whether a node's result lies in memory; all else is fused into its readers.

        That is what a kernel makes, what a kernel reads, and what is returned, directly or through
        views.
        """
        if is_kernel(node) or node in returned or is_reduction(node):
            return True
        waiting = list(node.users)
        while waiting:
            user = waiting.pop()
            if is_kernel(user) or user in returned:
                return True
            if _alias(user) is not None:
                waiting.extend(user.users)
        return False

    def _join(self) -> None:
        """Lets products be written into the joined tensor that they are a part of.

        Inductor's `ConcatKernel` does so with a product that is nothing else's result; whatever
        reads the part later keeps the whole.
        """
        for node in self.order:
            if _name(node) != "cat" or node not in self.made:
                continue
            for part in _parts(node):
                own = self.made.get(part) is part and part not in self.outputs
                if own and _name(part) in _PRODUCTS:
                    self.key[part] = self.made[part] = self.key[node]
                    self._through_views(part, self.key[node])

    def _through_views(self, part: fx.Node, key: fx.Node) -> None:
        for user in part.users:
            if self.key.get(user) is part:
                self.key[user] = key
                self._through_views(user, key)

    def _read(self) -> None:
        """Finds which buffers each node reads and which writers it waits for, through views."""
        for node in self.order:
            keys: set[Any] = set()
            writers: set[fx.Node] = set()
            for argument in node.all_input_nodes:
                key = self.key.get(argument)
                keys |= self.reads.get(argument, set()) if key is None else {key}
                writers |= {argument} if argument in self.made else self.after[argument]
            self.reads[node], self.after[node] = keys, writers


_VIEWS = {
    "view", "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "slice",
    "select", "split", "split_with_sizes", "unbind", "alias", "detach", "as_strided",
    "_unsafe_view", "getitem",
}  # fmt: skip
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_KERNELS = _PRODUCTS | {"convolution", "_grouped_mm", "sort", "topk", "index_put"}


def _parts(cat: fx.Node) -> list[fx.Node]:
    """Returns what a joined tensor is made of, seen through views of all of a part."""
    found = []
    for part in cat.all_input_nodes:
        whole = _alias(part)
        while whole is not None and numel(whole) == numel(part):
            part, whole = whole, _alias(whole)
        found.append(part)
    return found


def numel(node: fx.Node) -> int:
    """Returns the entries of a node's result; 0 where it is no tensor."""
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


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


def is_kernel(node: fx.Node) -> bool:
    """Whether a node is a kernel of its own, not one that is fused with its neighbours."""
    if node.op != "call_function" or _name(node) == "getitem":
        return False
    target: Any = node.target
    space = str(getattr(target, "namespace", ""))
    name = _name(node)
    return space not in ("aten", "prims", "") or name in _KERNELS or "attention" in name


def is_reduction(node: fx.Node) -> bool:
    """Whether a node sums its input up or the like."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor):
        return False
    sizes = [
        argument.meta["val"].numel()
        for argument in node.all_input_nodes
        if isinstance(argument.meta.get("val"), Tensor)
    ]
    return _name(node) in ("sum", "mean", "amax", "amin", "var", "prod") and bool(sizes)


def rounded(value: Tensor, round_to: int) -> int:
    """Returns the bytes that a tensor takes of an allocator."""
    size = value.numel() * value.element_size()
    return -(-size // round_to) * round_to
