"""Every byte that lives while operations run on tensors without data.

Each storage is counted when an operation makes it and taken off when nothing holds it any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from glasstune.planner.fp8 import emulated_bytes

ROUND = {"cuda": 512, "cpu": 64}
"""Bytes to which an allocator rounds each tensor: CUDA's caching one, torch's CPU alignment."""


def attention_workspace(name: str, inputs: Sequence[Any]) -> int:
    """Bytes that CUDA's flash attention allocates inside its backward.

    Source: `mha_bwd` of flash attention, as torch has it: dq is gathered in float32, and where
    several queries share a key, the gradients of keys and values are made for every query first.

    Args:
        name: Of the operation.
        inputs: Its arguments: dout, q, k, v [B, H, L, D], ...
    """
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if "attention" not in name or "backward" not in name or len(tensors) < 4:
        return 0
    _, q, k, _ = tensors[:4]
    shared = 0 if q.shape[1] == k.shape[1] else 2 * q.numel() * q.element_size()
    return 4 * q.numel() + shared


def logsumexp_workspace(name: str, inputs: Sequence[Any]) -> int:
    """Bytes that torch's logsumexp allocates inside: the shifted input, whose exponents it sums.

    Source: `logsumexp_out_impl` of ATen, the same on every device.

    Args:
        name: Of the operation.
        inputs: Its arguments.
    """
    if not name.startswith("aten.logsumexp") or not isinstance(inputs[0], Tensor):
        return 0
    return inputs[0].numel() * inputs[0].element_size()


def _attention_flops(name: str, inputs: Sequence[Any]) -> int:
    """Operations of an attention kernel that torch does not count (its CPU's)."""
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.dim() == 4]
    if len(tensors) < 3:
        return 0
    back = "backward" in name
    q, k = tensors[1:3] if back else tensors[:2]
    whole = 4 * q.numel() * k.shape[2]
    return whole * 5 // 2 if back else whole


def operations(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Returns the floating point operations of a product or an attention; 0 of anything else.

    Args:
        func: The operation.
        args: Its arguments.
        kwargs: Those by name.
        out: What it returned.
    """
    counter = flop_registry.get(getattr(func, "_overloadpacket", None))
    if counter is not None:
        return int(counter(*args, **kwargs, out_val=out))
    return _attention_flops(str(func), args) if "attention" in str(func) else 0


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of living storages that were made inside.

    Args:
        round_to: Bytes to which each storage is rounded up.
        cuda: Whether kernels are a GPU's, with buffers of their own inside.

    Attributes:
        now: Bytes that live.
        peak: The most that lived since `restart`.
        most: The most that ever lived.
        flops: Floating point operations of products and attention so far.
        then: Called once, before the next operation.
    """

    def __init__(self, round_to: int = 1, cuda: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cuda = cuda
        self.now = 0
        self.peak = 0
        self.most = 0
        self.round_to = round_to
        self.flops = 0
        self.then: Callable[[], None] | None = None
        self._known: dict[int, Any] = {}

    def restart(self) -> None:
        """Forgets the peak."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operation and counts what is new."""
        if self.then is not None:
            then, self.then = self.then, None
            then()
        out = func(*args, **(kwargs or {}))
        inside = logsumexp_workspace(str(func), args)
        if self.cuda:
            inside += attention_workspace(str(func), args)
        else:
            inside += emulated_bytes(str(func), args)
        if inside:
            self.peak = max(self.peak, self.now + inside)
            self.most = max(self.most, self.now + inside)
        self.flops += operations(func, args, kwargs or {}, out)
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._count(value)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.round_to) * self.round_to
        # A storage's Python object lives as long as the storage.
        self._known[key] = weakref.ref(storage, partial(self._gone, key, size))
        self.now += size
        self.peak = max(self.peak, self.now)
        self.most = max(self.most, self.now)

    def know(self, tensor: Tensor) -> None:
        """Leaves a tensor out that was there before."""
        storage = tensor.untyped_storage()
        self._known.setdefault(storage._cdata, weakref.ref(storage))

    def _gone(self, key: int, size: int, _: object) -> None:
        self._known.pop(key, None)
        self.now -= size
