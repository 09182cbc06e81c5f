"""Protocols between rooms that never import each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


class CountsTaker(Protocol):
    """Who wants to know what each term's sum is divided by."""

    def take_counts(self, step: int, counts: Mapping[str, float]) -> None:
        """Counts over the whole update; called before its first `before_backward`."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What a second look at a bad update has shown.

    Args:
        text: One or two clauses for the error message: the first bad module and its neighbours.
        terms: Names of the loss terms that are not finite, or whose gradients are not.
    """

    text: str
    terms: tuple[str, ...] = ()


class StepAudit(StepHook, CountsTaker, Protocol):
    """The gradient audit inside the loop: a hook that can also say why, and look again."""

    def explain(self, step: int, names: Sequence[str]) -> Mapping[str, str]:
        """Why tensors of this update got no gradient, or a zero one; those it knows of."""

    def examine(
        self, step: int, replay: Callable[[], None], *, rows: Sequence[str], error: str
    ) -> Examined:
        """Has an update computed again, with everything watched, and keeps the record.

        Args:
            step: Number of the update.
            replay: Computes it again with this audit as its only hook; `.grad` is empty before.
            rows: Origins of the rows at fault, for the record.
            error: What was wrong, for the record.
        """

    def sync(self) -> None:
        """Flushes what was written to the disk."""

    def close(self) -> None:
        """Removes every hook and closes the file."""


class Exchange(Protocol):
    """The ranks that share an update, for who looks into it on one of them."""

    @property
    def rank(self) -> int:
        """Number of this process; 0 writes."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's value; all ranks call it."""

    def sum_tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Adds tensors over all ranks; all call it with the same shapes and one dtype."""


class MetricsWriter(Protocol):
    """A sink of metric events beside `metrics.jsonl` (TensorBoard, wandb, mlflow)."""

    def write(self, event: Mapping[str, Any]) -> None:
        """Takes one event as the contract defines it."""

    def close(self) -> None:
        """Flushes and closes."""
