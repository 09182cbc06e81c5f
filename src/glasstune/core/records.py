"""Result records: what `--json` writes. Field names are the contract's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from glasstune.core.findings import Finding


@dataclass(slots=True)
class Record:
    """Base of all records."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the contract."""
        return asdict(self)


@dataclass(slots=True)
class DataRecord(Record):
    """Result of the data check; every row is kept or dropped.

    Args:
        rows: Rows read.
        kept: Rows that are trained or held out, before any repetition.
        dropped: Rows left out, by reason.
        tokens: Tokens of the kept rows.
        trained_tokens: Those that the loss sees.
        lengths: Tokens of a kept row: p50, p95, max.
        by_source: rows, kept, tokens and trained_tokens of each source.
        findings: What was seen, errors first.
        policies: The settings truncation, on_error and duplicates.
        cut: Rows whose answer was cut at max_length.
        duplicates: Training rows whose text an earlier row has, dropped or kept.
        scripts: Share of the letters by script, for example Latin and Han.
        held_out: Rows that validate.
        fingerprint: SHA-256 of the set that is trained and of its validation rows.
        histogram: `[first, last, rows]`: kept rows of first to last tokens, in bins of one width.
    """

    rows: int
    kept: int
    dropped: dict[str, int]
    tokens: int
    trained_tokens: int
    lengths: dict[str, int]
    by_source: dict[str, dict[str, int]]
    findings: list[Finding] = field(default_factory=list)
    policies: dict[str, str] = field(default_factory=dict)
    cut: int = 0
    duplicates: int = 0
    scripts: dict[str, float] = field(default_factory=dict)
    held_out: int = 0
    fingerprint: str = ""
    histogram: list[list[int]] = field(default_factory=list)


StoppedBy = Literal["done", "signal", "gate", "early_stopping"]


@dataclass(slots=True)
class TrainRecord(Record):
    """Result of a training run. Losses are means over trained tokens, in nats."""

    ok: bool
    stopped_by: StoppedBy
    updates: int
    eval_loss_before: float | None
    eval_loss_after: float | None
    best_step: int | None
    seconds: float
    trained_tokens: int
    peak_memory_bytes: int
    adapter: str
    resumable: bool
    findings: list[Finding] = field(default_factory=list)


@dataclass(slots=True)
class EvaluateRecord(Record):
    """Result of an evaluation."""

    eval_loss: float
    perplexity: float
    token_accuracy: float
    tokens: int
    metrics: dict[str, Any] = field(default_factory=dict)
    by_source: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(slots=True)
class DryRunRecord(Record):
    """Result of `train --dry-run`: what would be trained, and how."""

    ok: bool
    updates: int
    data: DataRecord
    choices: list[dict[str, Any]]
    config: str
    plan: dict[str, Any] | None = None


@dataclass(slots=True)
class Check:
    """Whether something works on this machine, found by trying it.

    Args:
        status: `works`, `fails` or `missing`.
        detail: What was measured, or why it does not work.
    """

    status: Literal["works", "fails", "missing"]
    detail: str


@dataclass(slots=True)
class DoctorRecord(Record):
    """What this machine can do. Sizes in bytes; parameters counted one by one."""

    device: dict[str, Any]
    python: str
    versions: dict[str, str]
    disk: dict[str, Any]
    checks: dict[str, Check]
    fits_parameters: dict[str, float]
    findings: list[Finding] = field(default_factory=list)
