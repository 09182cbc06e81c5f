"""Reads every gradient at the end of a backward, before the Trainer clips them.

The Trainer clips before `on_pre_optimizer_step`, so a callback sees gradients that were scaled
already; where the norm is NaN or Inf, the scaling has made every gradient NaN or zero, and nobody
can tell any more whose fault it was. So the watch looks earlier: a hook on the model's outputs
fires as a backward begins and asks autograd to call back when it has ended.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glasstune.audit.norms import live_norms
from glasstune.integrations.term_loss import tensors_in


class GradientWatch:
    """Norm and largest magnitude of each gradient after the latest backward, on the device.

    Nothing is copied to the host and nothing is changed.

    Args:
        model: The model that the Trainer calls, not wrapped.
        parameters: Trained tensors by name.
        on_end: Called at the end of each backward, after the reading.

    Attributes:
        measured: float32 [n, 2] of `live_norms`, or None while no backward has ended.
        muted: Whether backwards are passed over, because an audit runs them.
        losses: The model's own `loss` of each forward of the update, where it computes one.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], on_end: Callable[[], None]
    ) -> None:
        self.parameters = list(parameters.values())
        self.muted = False
        self._on_end = on_end
        self.measured: Tensor | None = None
        self._forwards = 0
        self.losses: list[Tensor] = []
        self._asked = False
        self._handle = model.register_forward_hook(self._forward)

    def begin(self) -> None:
        """Forgets the last update."""
        self.measured = None
        self._forwards = 0
        self.losses = []
        self._asked = False

    def take_forward(self) -> bool:
        """Whether the model ran with gradients on since this was last asked."""
        ran = self._forwards > 0
        self._forwards = 0
        return ran

    def _forward(self, module: nn.Module, args: Any, output: Any) -> None:
        # A compiled model is traced with its hooks: nothing here can be seen from inside.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        self._forwards += 1
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if isinstance(loss, Tensor) and loss.dim() == 0:
            self.losses.append(loss.detach())
        self.follow(tensors_in(output))

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Takes the arrival of a gradient at any of these as the beginning of a backward."""
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(self._begun)  # type: ignore[no-untyped-call]

    def _begun(self, gradient: Tensor) -> None:
        if not self._asked and not self.muted:
            self._asked = True
            _when_backward_ends(self._ended)

    def _ended(self) -> None:
        # Once more to the end of the queue: DDP shares the gradients in a call of its own, which
        # it queued after ours.
        _when_backward_ends(self._measure)

    def _measure(self) -> None:
        self._asked = False
        self.measure()
        self._on_end()

    def measure(self) -> None:
        """Reads the gradients as they are now."""
        with torch.no_grad():
            self.measured = live_norms(self.parameters)

    def close(self) -> None:
        """Removes the hook."""
        self._handle.remove()


def _when_backward_ends(function: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)


def to_host(measured: Tensor, values: Sequence[Tensor]) -> tuple[list[list[float]], list[float]]:
    """Copies the watch's numbers and other scalars in one go.

    Args:
        measured: float32 [n, 2].
        values: Scalars on any device.

    Returns:
        (n rows of norm and largest magnitude, the scalars).
    """
    flat = [value.detach().reshape(1).to(measured.device, torch.float32) for value in values]
    numbers: list[float] = torch.cat([measured.reshape(-1), *flat]).tolist()
    cut = measured.numel()
    return [numbers[at : at + 2] for at in range(0, cut, 2)], numbers[cut:]


def norm_numbers(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Four numbers about the gradients of all trained tensors.

    Args:
        rows: 2-norm and largest magnitude of each, as `live_norms` has them.
    """
    norms = [norm for norm, largest in rows if not largest < 0]
    numbers = {
        "glasstune/tensors_without_gradient": float(len(rows) - len(norms)),
        # Not by the norm: in fp32 that of 1e-30 is 0.
        "glasstune/tensors_with_zero_gradient": float(sum(largest == 0 for _, largest in rows)),
    }
    if norms:
        numbers["glasstune/grad_norm/median"] = statistics.median(norms)
        numbers["glasstune/grad_norm/max"] = max(norms)
    return numbers
