"""Protocols between rooms that never import each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

    from glasstune.core.batch import MicroBatch
    from glasstune.core.findings import Finding


class Progress(Protocol):
    """Where long work shows itself. Training and data call it; reports draw it."""

    def start(self, task: str, total: int | None, unit: str) -> None:
        """Opens a bar named `task`; `total` None means unknown."""

    def advance(self, task: str, amount: int = 1, **fields: float | str) -> None:
        """Moves the bar and updates the values beside it (for example `loss=2.31`)."""

    def finish(self, task: str) -> None:
        """Closes the bar."""

    def say(self, text: str) -> None:
        """Prints one line to the log without breaking a bar."""


class StepHook(Protocol):
    """Something that looks into training steps: the first-step gate, the gradient audit.

    The loop calls the methods in this order at every update:
    `before_update`, then per micro-batch `before_backward`, then `after_backward` once,
    then `after_update`.
    """

    def before_update(self, step: int) -> None:
        """`step` is the 1-based number of the update about to be computed."""

    def before_backward(
        self, step: int, terms: Mapping[str, tuple[float, Tensor]], batch: MicroBatch
    ) -> None:
        """Per micro-batch. `terms`: name to (weight / count of the update, sum with graph)."""

    def after_backward(self, step: int, model: Module, optimizer: Optimizer) -> None:
        """All gradients of the update are in `.grad`, not clipped yet."""

    def after_update(self, step: int, model: Module, learning_rate: float) -> Sequence[Finding]:
        """The optimiser has moved. A finding of severity `error` stops the run as a gate."""


class MetricsWriter(Protocol):
    """A sink of metric events beside `metrics.jsonl` (TensorBoard, wandb, mlflow)."""

    def write(self, event: Mapping[str, Any]) -> None:
        """Takes one event as the contract defines it."""

    def close(self) -> None:
        """Flushes and closes."""
