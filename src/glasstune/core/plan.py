"""The record of `glasstune plan`: bytes by part and moment, seconds, what else would fit.

Bytes are of one device: allocated on a GPU with the context of its driver, resident in a process on
a CPU. Times are seconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from glasstune.core.findings import Finding
from glasstune.core.records import Record

PARTS = (
    "base",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "workspace",
    "context",
)
"""Parts of a peak in the order of the picture: what stays first, what is there for a moment last.

`workspace` is what an operation needs for a moment: logits of a chunk, expanded weights, gradients
of activations. `context` is what the process itself takes: driver and libraries, on a CPU Python.
"""

Basis = Literal["measured", "estimate"]
Strategy = Literal["ddp", "fsdp2"]


@dataclass(slots=True)
class Moment:
    """The most memory within one stretch of a run.

    Args:
        phase: `load`, `forward`, `loss`, `backward`, `optimizer`, `evaluation`.
        where: The layer, or what runs then.
        bytes: Peak of the stretch.
        parts: The same by part; see `PARTS`.
    """

    phase: str
    where: str
    bytes: int
    parts: dict[str, int]


@dataclass(slots=True)
class Alternative:
    """Another way to run the same rows.

    Args:
        change: What differs, as configuration keys; empty for the plan itself.
        peak_bytes: Its peak.
        total_seconds: Its time.
        fits: Whether the peak is within the limit.
        seconds_per_update: Of one update.
    """

    change: dict[str, Any]
    peak_bytes: int
    total_seconds: float
    fits: bool
    seconds_per_update: float


@dataclass(slots=True)
class Several:
    """One device of several.

    Args:
        strategy: `ddp` or `fsdp2`.
        devices: How many.
        peak_bytes: Peak of one of them, each with the rows of a forward of this plan.
        parts: The same by part.
    """

    strategy: Strategy
    devices: int
    peak_bytes: int
    parts: dict[str, int]


@dataclass(slots=True)
class PlanRecord(Record):
    """Result of `glasstune plan`.

    Args:
        peak_bytes: The most memory of the run.
        parts: The same by part.
        recompute_layers: Decoder layers that are computed again in the backward.
        reason: Why that many, with the next best.
        updates: Of the run.
        tokens_per_epoch: Of the training rows.
        seconds_per_update: Mean.
        total_seconds: Training and evaluations.
        basis: Where the seconds come from.
        disk_bytes: What the run writes and what is cached for it.
        alternatives: Other ways, those that fit first, fastest first.
        measured_peak_bytes: Of a real step, None where none was run.
        error: (peak_bytes - measured) / measured; None without a measurement.
        limit_bytes: What may be used.
        limit_reason: Where that number comes from.
        phase: When the peak occurs.
        owner: The part that is the largest then.
        moments: The peak of every phase.
        layers: Decoder layers of the model.
        layer_bytes: What each of them keeps on the device for the backward, the chosen way.
        recompute: `none`, `light`, `partial`, `full` or `offload`.
        model: As the configuration names it.
        bits: Of its base.
        device: Name of the device.
        rows: Rows of a forward.
        length: Tokens of the longest row.
        trained_tokens: Trained positions of that forward.
        tokens_per_second: Predicted.
        evaluation_seconds: Of all evaluations.
        download_bytes: Still to be fetched; None where not known.
        host_bytes: Pinned host memory for offloaded inputs.
        several: One of several devices, by formula.
        basis_of: How each number was found, by name.
        findings: What should be said.
        choices: Automatic decisions with their reasons, as `Choices.to_list` has them.
    """

    peak_bytes: int
    parts: dict[str, int]
    recompute_layers: int
    reason: str
    updates: int
    tokens_per_epoch: int
    seconds_per_update: float
    total_seconds: float
    basis: Basis
    disk_bytes: int
    alternatives: list[Alternative] = field(default_factory=list)
    measured_peak_bytes: int | None = None
    error: float | None = None
    limit_bytes: int = 0
    limit_reason: str = ""
    phase: str = ""
    owner: str = ""
    moments: list[Moment] = field(default_factory=list)
    layers: int = 0
    layer_bytes: list[int] = field(default_factory=list)
    recompute: str = "none"
    model: str = ""
    bits: int = 16
    device: str = "cpu"
    rows: int = 1
    length: int = 0
    trained_tokens: int = 0
    tokens_per_second: float = 0.0
    evaluation_seconds: float = 0.0
    download_bytes: int | None = None
    host_bytes: int = 0
    several: list[Several] = field(default_factory=list)
    basis_of: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak_bytes <= self.limit_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the contract."""
        return {**asdict(self), "fits": self.fits}
