"""Float8 products in a plan: what is said of them, and what they would change."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from glasstune.core.config import Config
from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.core.plan import Alternative

if TYPE_CHECKING:
    from glasstune.workflows.plan_work import Work

ROUNDS_MORE = (
    "float8 products round more than bfloat16 ones (4 significant bits where those have 8); a "
    "run's fp8.json says how far each layer is off"
)


def fp8_note(config: Config) -> str:
    """Says how float8 products were planned."""
    kept = "every layer float8" if config.training.fp8_keep in ("auto", []) else "as fp8_keep says"
    auto = config.training.fp8_keep == "auto"
    later = "; fp8_keep: auto may keep some in bfloat16 once they are measured" if auto else ""
    if config.model.bits != 16:
        return f"{kept}{later}; packed weights expanded to e4m3 in each pass, nothing kept of it"
    return f"{kept}{later}; two e4m3 copies of each weight in place of the 16-bit one"


def with_fp8(work: Work, rows: int) -> tuple[Alternative, Finding] | None:
    """Works the same run out with float8 products.

    Args:
        work: A run with bfloat16 products.
        rows: Of a forward.

    Returns:
        The alternative and what is to be said of it; None where the run or its device has none.
    """
    config = work.config
    wanted = work.device.kind == "cuda" and config.model.bits == 16 and work.device.fast
    if not wanted or config.training.compute == "fp8" or not _has_fp8():
        return None
    from glasstune.planner.choose import fastest
    from glasstune.workflows.prepare_run import check_fp8

    training = config.training.model_copy(update={"compute": "fp8"})
    other = config.model_copy(update={"training": training})
    try:
        check_fp8(other)
        changed = work.changed(replace(work.prepared, config=other))
    except InputError:  # not with this dtype, or this start of the adapters
        return None
    options = changed.options(rows)
    option = fastest(options, work.limit) or min(options, key=lambda item: item.peak)
    total = option.seconds * work.total + changed.evaluation_seconds(rows)
    change = {"training.compute": "fp8"}
    fits = option.peak <= work.limit
    finding = Finding("fp8_rounds_more", "info", "training.compute", f"fp8: {ROUNDS_MORE}")
    return Alternative(change, option.peak, total, fits, option.seconds), finding


def _has_fp8() -> bool:
    import torch

    from glasstune.models.fp8 import check_device

    try:
        check_device(torch.device("cuda", torch.cuda.current_device()))
    except InputError:
        return False
    return True
