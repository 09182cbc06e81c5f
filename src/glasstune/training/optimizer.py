"""AdamW on fp32 master adapters, in 32 or 8 bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
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


def gradient_norm(parameters: Mapping[str, Parameter]) -> Tensor:
    """Norm of all gradients together, a scalar on the device; those without are passed over."""
    gradients = [value.grad for value in parameters.values() if value.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def check_norm(norm: float, parameters: Mapping[str, Parameter], step: int) -> None:
    """Stops where the gradients are not finite.

    Args:
        norm: Of all gradients.
        parameters: Trained tensors.
        step: 1-based number of the update, for the message.

    Raises:
        NonFinite: A gradient is not finite; names the tensors.
    """
    if norm < float("inf"):  # not so for NaN
        return
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
        else f"the gradient norm at step {step} overflows ({norm})",
        where=f"step {step}",
        fix="look at these rows, lower the learning rate, or train in bfloat16 or float32" + KEPT,
    )


def move(
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
    config: TrainingConfig,
    step: int,
    total: int,
    measured: tuple[Tensor, float] | None = None,
) -> tuple[float, float]:
    """Clips, sets the update's learning rate, moves the weights and drops the gradients.

    Args:
        parameters: Trained tensors.
        optimizer: Over exactly those.
        config: Clipping (0 = measure only) and the schedule of the learning rate.
        step: 1-based number of the update.
        total: Updates of the whole run.
        measured: `gradient_norm`, on the device and on the host, where it was read before.

    Returns:
        (gradient norm before clipping, learning rate).

    Raises:
        NonFinite: A gradient is not finite; nothing has moved.
    """
    if measured is None:
        norm = gradient_norm(parameters)
        measured = norm, float(norm)
    check_norm(measured[1], parameters, step)
    if config.max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(
            list(parameters.values()), config.max_grad_norm, measured[0]
        )
    rate = learning_rate(config, step, total)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return measured[1], rate
