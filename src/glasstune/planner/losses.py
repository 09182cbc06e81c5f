"""What stands behind the last norm: training's loss, in its own order of buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glasstune.kernels.linear_cross_entropy import (
    head_cross_entropy,
    linear_cross_entropy,
    token_losses,
)
from glasstune.kernels.linear_cross_entropy.fused import gpu_rows, nll_in_place


def frozen_head_loss(hidden: Tensor, head: nn.Module, z: bool = False) -> Tensor:
    """The fused loss behind a frozen bare head, as a CPU computes it.

    Args:
        hidden: [N, d].
        head: A bare linear layer.
        z: Whether z_loss is there too.
    """
    targets, weights = _labels(hidden)
    weight: Tensor = head.weight  # type: ignore[assignment]
    both = linear_cross_entropy(
        hidden.to(weight.dtype), weight, targets, weights, weights if z else None
    )
    return both[0] + both[1] if z else both[0]


def frozen_head_loss_gpu(hidden: Tensor, head: nn.Module) -> Tensor:
    """The same as a GPU computes it without z_loss: logits become their gradient in place."""
    weight: Tensor = head.weight  # type: ignore[assignment]
    total: Tensor = _InPlace.apply(hidden.to(weight.dtype), weight)  # type: ignore[no-untyped-call]
    return total


def any_head_loss(hidden: Tensor, head: nn.Module, z: bool = False) -> Tensor:
    """The loss behind any other head: chunks, each computed again in the backward."""
    targets, weights = _labels(hidden)
    weight: Tensor = head.weight  # type: ignore[assignment]
    vocabulary = int(weight.shape[0])
    both = head_cross_entropy(hidden, head, vocabulary, targets, weights, weights if z else None)
    return both[0] + both[1] if z else both[0]


def held_out_loss(hidden: Tensor, head: nn.Module) -> Tensor:
    """What an evaluation computes, whatever is trained."""
    weight: Tensor = head.weight  # type: ignore[assignment]
    losses, _ = token_losses(hidden, head, _labels(hidden)[0], int(weight.shape[0]))
    return losses.sum()


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        """Allocates what `FrozenHeadLoss` does; the kernel that it calls allocates nothing."""
        rows = gpu_rows(weight.shape[0], weight.element_size())
        targets, weights = _labels(hidden)
        total, grad = nll_in_place(hidden, weight, targets, weights, rows, True, _nothing)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, None]:
        """Scales the saved gradient."""
        return ctx.saved_tensors[0] * upstream[0].to(ctx.saved_tensors[0].dtype), None


def _nothing(*_: object) -> None:
    return None


def _labels(hidden: Tensor) -> tuple[Tensor, Tensor]:
    count, device = hidden.shape[0], hidden.device
    return (
        torch.zeros(count, dtype=torch.int64, device=device),
        torch.zeros(count, dtype=torch.float32, device=device),
    )
