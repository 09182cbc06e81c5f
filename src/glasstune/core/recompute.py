"""Recomputation as numbers: how many decoder layers forget what they made, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recompute:
    """Which decoder layers are computed again in the backward pass.

    The first ones are taken: when the backward pass reaches them, the activations of the later
    layers are already freed, so the one layer that is being recomputed adds nothing to the peak.

    Args:
        layers: Number of recomputed layers, counted from the first; 0 recomputes nothing.
        offload: Whether the inputs of recomputed layers wait in pinned host memory.
        budget: Share of their activations that compiled layers keep, 0 to 1. The compiler makes
            the rest again, what is cheapest first: below 1 without a product at first.
    """

    layers: int = 0
    offload: bool = False
    budget: float = 1.0
