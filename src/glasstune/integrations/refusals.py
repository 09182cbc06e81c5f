"""What the callback refuses and how it says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from glasstune.core.errors import InputError, RunError
from glasstune.core.findings import Finding
from glasstune.core.gradients import ParameterAudit

if TYPE_CHECKING:
    from transformers import TrainingArguments


def check_mode(key: str, value: str) -> None:
    """Checks one of the callback's options.

    Raises:
        InputError: It is not stop, warn or off.
    """
    if value not in ("stop", "warn", "off"):
        raise InputError(
            "wrong_value",
            f"{key} is {value!r}",
            where="GlasstuneCallback",
            fix="use stop, warn or off",
        )


def refuse_hidden_gradients(
    args: TrainingArguments, parameters: Mapping[str, Tensor], optimizer: Any
) -> None:
    """Refuses what keeps gradients elsewhere than in `.grad` of whole tensors.

    Raises:
        InputError: DeepSpeed or FSDP.
    """
    kinds = {type(value).__name__ for value in parameters.values()} & {"DTensor", "FlatParameter"}
    who = "FSDP" if kinds or getattr(args, "fsdp", None) else ""
    if getattr(args, "deepspeed", None) or "DeepSpeed" in type(optimizer).__name__:
        who = "DeepSpeed"
    if who:
        raise InputError(
            "gradients_hidden",
            f"{who} keeps gradients in buffers of its own, and a callback cannot read them yet",
            where="GlasstuneCallback",
            fix="leave the callback out, or check the model once on one device with it",
        )


def nothing_trained(mode: str) -> Finding:
    """The finding of a model without a trained parameter.

    Args:
        mode: Of the gate.
    """
    return Finding(
        "nothing_trained",
        "warning" if mode == "warn" else "error",
        "model",
        "no parameter requires a gradient, so nothing can be trained",
        "add an adapter, or switch the one there is on: a disabled adapter is frozen",
    )


def not_finite(
    step: int,
    mode: str,
    bad: Sequence[str],
    losses: Mapping[str, float],
    total: int,
    clipped: bool,
    story: str,
) -> Finding:
    """The finding of a NaN or Inf.

    Args:
        step: Of the update.
        mode: `stop` or `warn`.
        bad: Tensors whose gradient is not finite.
        losses: Term -> value, of those that are not finite; "" = the model's own loss.
        total: Number of trained tensors.
        clipped: Whether the gradients were read after clipping.
        story: Where the audit saw it begin, or nothing.
    """
    parts = []
    for name, value in losses.items():
        parts.append(f"loss term {name!r} is {value}" if name else f"the loss is {value}")
    if bad:
        some = ", ".join(bad[:6]) + (f" and {len(bad) - 6} more" if len(bad) > 6 else "")
        spread = " (read after clipping, which spreads a NaN to all)" if clipped else ""
        parts.append(f"the gradient of {len(bad)} of {total} tensors is not finite: {some}{spread}")
    if story:
        parts.append(story)
    text = "; ".join(parts)
    return Finding(
        "non_finite_loss" if losses else "non_finite_gradient",
        "error" if mode == "stop" else "warning",
        bad[0] if bad else next(iter(losses)),
        f"step {step}: {text}" if mode == "warn" else text,
        "look at this update's rows (a batch without a trained label gives NaN), the learning rate "
        "and the precision; the weights are still those before this update",
    )


def never_scaled(step: int, bad: Sequence[str], total: int, updates: int) -> Finding:
    """The warning that an fp16 gradient scaler passes over one update after another.

    Args:
        step: Of the latest.
        bad: Tensors whose gradient is not finite.
        total: Number of trained tensors.
        updates: How many in a row.
    """
    some = ", ".join(bad[:6]) + (f" and {len(bad) - 6} more" if len(bad) > 6 else "")
    return Finding(
        "fp16_overflow",
        "warning",
        bad[0],
        f"step {step}: the gradient scaler has passed over {updates} updates in a row, so nothing "
        f"was learned in them; the gradient of {len(bad)} of {total} tensors overflows: {some}",
        "train in bf16, or lower the loss's scale",
    )


def explained(finding: Finding, row: ParameterAudit | None) -> Finding:
    """Adds the audit's reason to what the gate says of a tensor, where it names a fault."""
    if finding.severity == "info" or row is None or row.reason is None or row.reason.healthy:
        return finding
    return replace(finding, message=f"{finding.message}: {row.reason.text}")


def refusal(errors: Sequence[Finding], step: int) -> RunError:
    """The error that ends the training.

    Args:
        errors: At least one, all of one check.
        step: Of the update.
    """
    where = f"step {step}"
    if errors[0].code != "gate_dead_tensor":
        return RunError(errors[0].code, errors[0].message, where=where, fix=errors[0].fix)
    names = ", ".join(item.where for item in errors[:6])
    more = f" and {len(errors) - 6} more" if len(errors) > 6 else ""
    return RunError(
        "first_step_gate",
        f"{len(errors)} trained tensors do not learn: {names}{more}. First: {errors[0].message}",
        where=where,
        fix="GlasstuneCallback(first_step_gate='warn') goes on anyway; gate_allow=[...] takes "
        "globs of tensors that may stay dead",
    )
