"""Plain torch: the truth that the fused version is measured against.

Shape letters: N positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sums(
    logits_NV: Tensor, targets_N: Tensor, nll_weights_N: Tensor, z_weights_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums of weighted cross-entropy and of the weighted z-loss, in fp32.

    Args:
        logits_NV: Float [N, V].
        targets_N: int64 [N], each in [0, V).
        nll_weights_N: fp32 [N]; weight of each position's negative log likelihood.
        z_weights_N: fp32 [N] or None; weight of each position's squared log normaliser
            (PaLM, section 5: https://arxiv.org/abs/2204.02311).

    Returns:
        (Σ wᵢ·nllᵢ, Σ vᵢ·logZᵢ²), both fp32 scalars; the second is 0 without z weights.
    """
    logits_NV = logits_NV.float()
    log_z_N = torch.logsumexp(logits_NV, dim=-1)
    target_logit_N = logits_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    nll_sum = ((log_z_N - target_logit_N) * nll_weights_N).sum()
    if z_weights_N is None:
        return nll_sum, nll_sum.new_zeros(())
    return nll_sum, (log_z_N.square() * z_weights_N).sum()


def linear_cross_entropy_reference(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    targets_N: Tensor,
    nll_weights_N: Tensor,
    z_weights_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Makes all logits at once and lets autograd do the rest; see `weighted_sums`."""
    logits_NV = hidden_Nd @ weight_Vd.T
    return weighted_sums(logits_NV, targets_N, nll_weights_N, z_weights_N)


def loss_rows_reference(
    logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, nll_C: Tensor, grad: bool
) -> None:
    """Writes the loss of each row, and its gradient over the logits.

    Args:
        logits_CV: Float [C, V]; with `grad` each row becomes weight * (softmax - onehot).
        targets_C: int64 [C], each in [0, V).
        weights_C: fp32 [C].
        nll_C: fp32 [C]; becomes weight * nll.
        grad: Whether the gradient is wanted.
    """
    log_p_CV = logits_CV.float().log_softmax(-1)
    target_C1 = targets_C[:, None]
    nll_C.copy_(-log_p_CV.gather(-1, target_C1).squeeze(-1) * weights_C)
    if grad:
        grad_CV = log_p_CV.exp()
        grad_CV.scatter_add_(-1, target_C1, -torch.ones_like(target_C1, dtype=torch.float32))
        logits_CV.copy_(grad_CV * weights_C[:, None])
