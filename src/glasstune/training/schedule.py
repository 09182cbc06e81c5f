"""Learning rate as a pure function of the update number: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from glasstune.core.config import TrainingConfig


def warmup_updates(config: TrainingConfig, total: int) -> int:
    """Number of warm-up updates; `warmup_steps` below 1 is a share of all updates."""
    if config.lr_scheduler_type == "constant":
        return 0
    if config.warmup_steps < 1:
        return round(config.warmup_steps * total)
    return int(config.warmup_steps)


def learning_rate(config: TrainingConfig, step: int, total: int) -> float:
    """Returns the learning rate of an update.

    The warm-up rises as step / warmup, so that the first update already moves: a first rate of
    zero (as in transformers' schedules) wastes an update and hides dead tensors.

    Args:
        config: Peak rate, shape and warm-up.
        step: 1-based number of the update.
        total: Number of updates in the run.

    Returns:
        The rate; reaches 0 only after the last update.
    """
    warmup = warmup_updates(config, total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.lr_scheduler_type in ("constant", "constant_with_warmup"):
        return config.learning_rate
    # The update after warm-up runs at the peak, the one after the last would run at 0.
    done = min(1.0, (step - 1 - warmup) / max(1, total - warmup))
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1 - done)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
