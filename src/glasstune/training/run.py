"""What a run is made of, how it ends, and the sums between two rows of its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch.nn import Parameter
from torch.optim import Optimizer

from glasstune.core.config import Config
from glasstune.core.findings import Finding
from glasstune.core.protocols import MetricsWriter, Progress, StepAudit, StepHook
from glasstune.data.packing import PackedSet
from glasstune.training.batching import Schedule
from glasstune.training.checkpoint import Identity, LoopState
from glasstune.training.distributed import ALONE, World
from glasstune.training.step import AdaptedModel, UpdateResult
from glasstune.training.terms import Term


@dataclass
class Run:
    """Everything the loop needs; the workflow builds it.

    Args:
        config: Resolved.
        folder: The run folder.
        adapted: The model.
        parameters: Trained tensors, in the optimiser's order.
        optimizer: Over exactly those.
        terms: Loss terms.
        train: Training rows.
        validation: Held-out rows, or None.
        schedule: Sizes and number of updates.
        pad_id: Padding token.
        identity: What checkpoints belong to.
        write_adapter: Writes adapter, tokenizer and template into a folder.
        progress: Bars and log.
        hooks: The gate.
        audit: Looks at gradients, says why one is missing, and looks into a bad update.
        writers: Metric sinks beside the file.
        world: The ranks that share it.
    """

    config: Config
    folder: Path
    adapted: AdaptedModel
    parameters: Mapping[str, Parameter]
    optimizer: Optimizer
    terms: Sequence[Term]
    train: PackedSet
    validation: PackedSet | None
    schedule: Schedule
    pad_id: int
    identity: Identity
    write_adapter: Callable[[Path], None]
    progress: Progress
    hooks: Sequence[StepHook] = ()
    writers: Sequence[MetricsWriter] = ()
    audit: StepAudit | None = None
    world: World = ALONE

    @property
    def every_hook(self) -> tuple[StepHook, ...]:
        """The audit first: what it saw of an update explains what the gate says."""
        return (*(() if self.audit is None else (self.audit,)), *self.hooks)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"


StoppedBy = Literal["done", "signal", "early_stopping"]


@dataclass
class Outcome:
    """How the loop ended.

    Args:
        stopped_by: Why.
        state: Where it stands.
        findings: What gate and hooks said.
    """

    stopped_by: StoppedBy
    state: LoopState
    findings: list[Finding] = field(default_factory=list)


@dataclass
class Window:
    """Sums since the last metrics row."""

    updates: int = 0
    loss: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)
    grad_norm: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def add(self, result: UpdateResult, seconds: float) -> None:
        """Takes one update."""
        self.updates += 1
        self.loss += result.loss
        for name, value in result.losses.items():
            if value is not None:
                self.losses.setdefault(name, []).append(value)
        self.grad_norm = result.grad_norm
        self.tokens += result.tokens
        self.trained_tokens += result.trained_tokens
        self.seconds += seconds
