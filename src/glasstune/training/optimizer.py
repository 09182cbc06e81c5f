"""AdamW on fp32 master adapters, in 32 or 8 bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from glasstune.core.config import TrainingConfig
from glasstune.core.errors import RunError
from glasstune.training.nonfinite import KEPT, NonFinite
from glasstune.training.schedule import learning_rate


def make_optimizer(parameters: Mapping[str, Parameter], config: TrainingConfig) -> Optimizer:
    """Builds the optimiser over all trained tensors in one group.

    Args:
        parameters: name -> parameter, all fp32; the order is the order of the saved state.
        config: Optimiser, betas, epsilon, weight decay. The learning rate is set each update.

    Raises:
        RunError: A trained tensor is not fp32: small updates would round to nothing (bf16), or
            gradients could not be unscaled (fp16).
        InputError: The 8-bit optimiser does not work on this device.
    """
    wrong = [name for name, value in parameters.items() if value.dtype != torch.float32]
    if wrong:
        raise RunError(
            "trained_tensor_not_fp32",
            f"{len(wrong)} trained tensors are not float32, for example {wrong[0]} "
            f"({parameters[wrong[0]].dtype})",
            fix="make trained tensors float32 (gt.add_adapter does); the base keeps its dtype",
        )
    values = list(parameters.values())
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optim == "adamw_8bit":
        from glasstune.models.quantization import adam_8bit

        built: Optimizer = adam_8bit(
            values,
            lr=config.learning_rate,
            betas=betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        return built
    return torch.optim.AdamW(
        values,
        lr=config.learning_rate,
        betas=betas,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Mapping[str, Parameter], max_norm: float, step: int) -> float:
    """Clips to a global norm and returns the norm before.

    Args:
        parameters: Trained tensors; those without gradient are passed over.
        max_norm: Upper bound; 0 = measure only.
        step: 1-based number of the update, for the message.

    Raises:
        NonFinite: A gradient is not finite; names the tensors.
    """
    gradients = [value.grad for value in parameters.values() if value.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    total = float(norm)
    if not total < float("inf"):  # NaN too
        bad = [
            name
            for name, value in parameters.items()
            if value.grad is not None and not bool(torch.isfinite(value.grad).all())
        ]
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise NonFinite(
            "non_finite_gradient",
            f"the gradient at step {step} is not finite in {len(bad)} of {len(parameters)} "
            f"tensors: {', '.join(bad[:4])}{more}"
            if bad
            else f"the gradient norm at step {step} overflows ({total})",
            where=f"step {step}",
            fix="look at these rows, lower the learning rate, or train in bfloat16 or float32"
            + KEPT,
        )
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), max_norm, norm)
    return total


def move(
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
    config: TrainingConfig,
    step: int,
    total: int,
) -> tuple[float, float]:
    """Clips, sets the update's learning rate, moves the weights and drops the gradients.

    Args:
        parameters: Trained tensors.
        optimizer: Over exactly those.
        config: Clipping and the schedule of the learning rate.
        step: 1-based number of the update.
        total: Updates of the whole run.

    Returns:
        (gradient norm before clipping, learning rate).

    Raises:
        NonFinite: A gradient is not finite; nothing has moved.
    """
    norm = clip_gradients(parameters, config.max_grad_norm, step)
    rate = learning_rate(config, step, total)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, rate
