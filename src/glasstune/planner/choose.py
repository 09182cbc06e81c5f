"""Which layers are computed again: the fastest way that fits, with its reason and the next best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glasstune.core.recompute import Recompute
from glasstune.core.units import format_bytes


@dataclass(frozen=True)
class Option:
    """One way to run a forward and its backward.

    Args:
        recompute: Layers computed again.
        peak: Bytes.
        seconds: Of an update.
    """

    recompute: Recompute
    peak: int
    seconds: float


def ways(
    layers: int,
    cost: Callable[[Recompute], tuple[int, float]],
    *,
    offload: bool,
    budgets: Sequence[float] = (1.0,),
) -> list[Option]:
    """Works out every policy.

    Args:
        layers: Decoder layers.
        cost: Policy -> (peak bytes, seconds of an update).
        offload: Whether inputs may wait in host memory.
        budgets: Shares of their activations that layers may keep.
    """
    policies = []
    for budget in budgets:
        policies += [Recompute(count, budget=budget) for count in range(layers + 1)]
        if offload and layers:
            policies.append(Recompute(layers, offload=True, budget=budget))
    return [Option(policy, *cost(policy)) for policy in policies]


def fastest(options: Sequence[Option], limit: int) -> Option | None:
    """Returns the fastest that fits; None where none does."""
    fitting = [option for option in options if option.peak <= limit]
    return min(fitting, key=lambda option: (option.seconds, option.peak), default=None)


def policy_name(recompute: Recompute, layers: int) -> str:
    """Returns `none`, `light`, `partial`, `full` or `offload`."""
    if recompute.offload:
        return "offload"
    if recompute.layers == 0 and recompute.budget < 1:
        return "light"
    if recompute.layers in (0, layers):
        return "full" if recompute.layers else "none"
    return "partial"


def policy_words(recompute: Recompute, layers: int) -> str:
    """Says a policy in words."""
    name = policy_name(recompute, layers)
    share = f"what is cheap made again (memory budget {recompute.budget:g})"
    if name == "none":
        return "no layer computed again"
    if name == "light":
        return f"in every layer {share}"
    where = ", their inputs in host memory" if name == "offload" else ""
    count = f"the first {recompute.layers} of {layers}" if name == "partial" else f"all {layers}"
    rest = f", and {share}" if recompute.budget < 1 else ""
    return f"{count} layers computed again{where}{rest}"


def reason(chosen: Option, options: Sequence[Option], limit: int, layers: int) -> str:
    """Says why, with the next best."""
    text = (
        f"{policy_words(chosen.recompute, layers)}: peak {format_bytes(chosen.peak)} of "
        f"{format_bytes(limit)}"
    )
    faster = [option for option in options if option.seconds < chosen.seconds]
    if faster:
        near = max(faster, key=lambda option: (option.seconds, -option.peak))
        return (
            f"{text}, the fastest that fits; next, {policy_words(near.recompute, layers)}, would "
            f"take {format_bytes(near.peak)} and be {_percent(chosen.seconds / near.seconds - 1)} "
            "faster"
        )
    slower = [option for option in options if option.recompute == Recompute(layers)]
    if chosen.recompute == Recompute(0) and slower and layers:
        other = slower[0]
        return (
            f"{text}, the fastest; next best, {policy_words(other.recompute, layers)}, would take "
            f"{format_bytes(other.peak)} and {_percent(other.seconds / chosen.seconds - 1)} longer"
        )
    return text


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "less than 1%"
