"""AdamW on fp32 master adapters, in 32 or 8 bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from glasstune.core.config import TrainingConfig
from glasstune.core.errors import RunError


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


def clip_gradients(parameters: Mapping[str, Parameter], max_norm: float) -> float:
    """Clips to a global norm and returns the norm before.

    Args:
        parameters: Trained tensors; those without gradient are passed over.
        max_norm: Upper bound; 0 = measure only.

    Raises:
        RunError: A gradient is not finite; names the tensors.
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
        raise RunError(
            "non_finite_gradient",
            f"the gradient is not finite in {len(bad)} tensors: {', '.join(bad[:4])}"
            if bad
            else f"the gradient norm overflows ({total})",
            fix="lower the learning rate, or train in bfloat16 or float32",
        )
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), max_norm, norm)
    return total
