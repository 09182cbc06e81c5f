"""Inputs of recomputed layers wait in pinned host memory and are back before they are needed.

A copy leaves on a stream of its own while the layer computes. In the backward pass the input of
the layer before is fetched while this one is recomputed, so the device waits for the first alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class Offload:
    """A checkpoint function whose saved hidden state is in host memory.

    Args:
        device: Where the model is; copies of a CPU are plain ones.

    Attributes:
        bytes: Copied to the host so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.bytes = 0
        self._last: weakref.ref[Waiting] | None = None

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a function so that only its first floating-point input is kept, on the host."""
        taken = False

        def pack(tensor: Tensor) -> Tensor | Waiting:
            nonlocal taken
            if taken or not tensor.is_floating_point() or tensor.numel() == 0:
                return tensor
            taken = True
            previous = None if self._last is None else self._last()
            waiting = Waiting(self, tensor, previous)
            self._last = weakref.ref(waiting)
            self.bytes += tensor.numel() * tensor.element_size()
            return waiting

        def unpack(held: Tensor | Waiting) -> Tensor:
            return held.take() if isinstance(held, Waiting) else held

        # The checkpoint saves its inputs under these hooks; what the function saves inside is
        # under the checkpoint's own.
        with saved_tensors_hooks(pack, unpack):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)


class Waiting:
    """A tensor that waits on the host.

    Args:
        store: Whose stream copies.
        tensor: On the device.
        previous: What was packed before it: needed next in the backward pass.
    """

    def __init__(self, store: Offload, tensor: Tensor, previous: Waiting | None) -> None:
        self.store = store
        self.previous = None if previous is None else weakref.ref(previous)
        self.back: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        stream = store.stream
        self.host = torch.empty(
            tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=stream is not None
        )
        if stream is None:
            self.host.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(store.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is given out again only after the copy

    def fetch(self) -> None:
        """Starts the way back, where it has not begun."""
        if self.back is not None:
            return
        stream = self.store.stream
        if stream is None:
            self.back = self.host.clone()
            return
        current = torch.cuda.current_stream(self.store.device)
        self.back = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.store.device)
        stream.wait_stream(current)  # what used this memory before must be done
        with torch.cuda.stream(stream):
            self.back.copy_(self.host, non_blocking=True)
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.arrived.record(stream)

    def take(self) -> Tensor:
        """Returns the tensor on the device and starts fetching the one before it.

        The host's copy stays, for a second backward of the same graph.
        """
        self.fetch()
        previous = None if self.previous is None else self.previous()
        if previous is not None:
            previous.fetch()
        back, arrived = self.back, self.arrived
        self.back = self.arrived = None
        assert back is not None
        if arrived is not None:
            torch.cuda.current_stream(self.store.device).wait_event(arrived)
        return back
