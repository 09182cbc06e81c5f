"""A forward and its backward as two CUDA graphs: for steps that wait for kernel launches.

A small model or a short row keeps a GPU busy for less time than Python needs to start its kernels.
A CUDA graph starts all of them at once: at the shape of Llama-3-8B a step of 512 tokens is bound by
launches until it is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_WARM_UPS = 3
"""Runs before a capture: compilation, cuDNN's and Triton's choices must not fall into it."""


class GraphedForward:
    """Replays `run` for inputs of one shape; its gradients go to `parameters` alone.

    What `run` reads beside its arguments must stay where it is (weights, adapters, seeds), and
    what it does beside its result must be kernels: Python in it runs at the capture only.

    The two graphs share their memory, which holds the activations of one forward for good.

    Args:
        run: Tensors in, one float tensor out; no host synchronisation.
        example: Tensors of the shapes, types and device of every later call.
        parameters: The trained tensors that the result depends on.

    Raises:
        RuntimeError: Something in `run` cannot be captured.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        example: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> None:
        self.inputs = [tensor.clone() for tensor in example]
        self.parameters = list(parameters)
        self.runs = 0  # of either graph; each forward has one backward, which uses up its memory
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                out = run(*self.inputs)
                self._gradients(out, torch.zeros_like(out))
                del out
        torch.cuda.current_stream().wait_stream(side)
        # Autocast keeps copies of trained weights: one from outside would be read after its end.
        torch.clear_autocast_cache()
        # Threads that prepare batches may call CUDA meanwhile.
        with torch.cuda.graph(self.forward, pool=pool, capture_error_mode="thread_local"):
            self.out = run(*self.inputs)
        torch.clear_autocast_cache()
        self.grad_out = torch.zeros_like(self.out)
        with torch.cuda.graph(self.backward, pool=pool, capture_error_mode="thread_local"):
            self.grads = self._gradients(self.out, self.grad_out)
        self.out = self.out.detach()

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether inputs have the shapes and types that were captured."""
        return len(inputs) == len(self.inputs) and all(
            a.shape == b.shape and a.dtype == b.dtype
            for a, b in zip(inputs, self.inputs, strict=True)
        )

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Runs it; the next call overwrites the result, so take its one backward before.

        Raises:
            ValueError: The inputs are not those it was captured for.
        """
        if not self.fits(inputs):
            raise ValueError("inputs of another shape or type than the captured ones")
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        out: Tensor = _Replay.apply(self, *self.parameters)  # type: ignore[no-untyped-call]
        return out

    def _gradients(self, out: Tensor, grad_out: Tensor) -> list[Tensor | None]:
        found = torch.autograd.grad(out, self.parameters, grad_out, allow_unused=True)
        return list(found)


class _Replay(torch.autograd.Function):
    """The two graphs as one step of autograd."""

    @staticmethod
    def forward(ctx: Any, graphed: GraphedForward, *parameters: Tensor) -> Tensor:
        graphed.runs += 1
        graphed.forward.replay()
        ctx.graphed, ctx.run = graphed, graphed.runs
        return graphed.out.view_as(graphed.out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        graphed: GraphedForward = ctx.graphed
        if ctx.run != graphed.runs:
            raise RuntimeError("this forward was replayed again: its activations are gone")
        graphed.runs += 1
        graphed.grad_out.copy_(grad_out)
        graphed.backward.replay()
        # Copies: `.grad` keeps what it is given, and the next replay writes into the originals.
        present = [grad for grad in graphed.grads if grad is not None]
        copies = iter(torch._foreach_mul(present, 1.0))
        return (None, *(None if grad is None else next(copies) for grad in graphed.grads))
