"""A plan record made by hand, for reports."""

from __future__ import annotations

from typing import Any

from glasstune.core.findings import Finding
from glasstune.core.plan import Alternative, Moment, PlanRecord, Several

GIB = 2**30


def hand_plan(**changes: Any) -> PlanRecord:
    """An 8B model at 4 bit on a card of 22 GiB; the peak is in the loss."""
    parts = {
        "base": 6 * GIB, "adapters": GIB // 4, "gradients": 0, "optimizer": GIB // 2,
        "activations": 9 * GIB, "workspace": 2 * GIB, "context": GIB // 2,
    }  # fmt: skip
    step = {**parts, "activations": 0, "workspace": 0, "gradients": GIB // 4}
    record = PlanRecord(
        peak_bytes=sum(parts.values()),
        parts=parts,
        recompute_layers=12,
        reason="the first 12 of 32 layers computed again: peak 18.2 GiB of 22.0 GiB, the fastest "
        "that fits; next, the first 11 of 32 layers computed again, would take 22.4 GiB and be 1% "
        "faster",
        updates=1200,
        tokens_per_epoch=4_000_000,
        seconds_per_update=2.5,
        total_seconds=3120.0,
        basis="estimate",
        disk_bytes=3 * GIB,
        alternatives=[
            Alternative({"training.recompute": "full"}, 11 * GIB, 3900.0, True, 3.1),
            Alternative({"training.recompute": "none"}, 31 * GIB, 2800.0, False, 2.2),
        ],
        limit_bytes=22 * GIB,
        limit_reason="training.max_memory",
        phase="loss",
        owner="activations",
        moments=[
            Moment("backward", "layer 31", 17 * GIB, {**parts, "workspace": GIB * 3 // 4}),
            Moment("loss", "head and loss", sum(parts.values()), parts),
            Moment("optimizer", "adapters move", sum(step.values()), step),
        ],
        layers=32,
        recompute="partial",
        model="meta-llama/Llama-3.1-8B",
        bits=4,
        device="NVIDIA H100",
        rows=4,
        length=2048,
        trained_tokens=6100,
        tokens_per_second=9100.0,
        evaluation_seconds=120.0,
        download_bytes=16 * GIB,
        several=[Several("ddp", 2, 19 * GIB, parts), Several("fsdp2", 2, 16 * GIB, parts)],
        basis_of={"base": "exact: by formula", "context": "calibrated on a card"},
        findings=[Finding("terms_not_planned", "info", "losses", "not in the plan", "measure")],
    )
    for name, value in changes.items():
        setattr(record, name, value)
    return record
