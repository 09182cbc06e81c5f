"""One pass over chunks: the loss and the gradient of the hidden state together.

The head is frozen, so its gradient is not needed and the logits of a chunk die with the chunk.
The two products (logits, then their gradient times the weight) are done once each; recomputing
the logits in backward would cost a third.

Shape letters: N positions, d hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FrozenHeadLoss(torch.autograd.Function):
    """(hidden, weight, targets, weights) -> (nll sum, z sum) with gradients for hidden only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_Nd: Tensor,
        weight_Vd: Tensor,
        targets_N: Tensor,
        nll_weights_N: Tensor,
        z_weights_N: Tensor | None,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        """Computes both sums and, where hidden needs it, both gradients of hidden."""
        needs_grad = ctx.needs_input_grad[0]
        nll_sum = torch.zeros((), dtype=torch.float32, device=hidden_Nd.device)
        z_sum = torch.zeros_like(nll_sum)
        nll_grad_Nd = torch.empty_like(hidden_Nd) if needs_grad else None
        z_grad_Nd = torch.empty_like(hidden_Nd) if needs_grad and z_weights_N is not None else None
        for start in range(0, hidden_Nd.shape[0], rows):
            part = slice(start, start + rows)
            logits_CV = (hidden_Nd[part] @ weight_Vd.T).float()
            target_C1 = targets_N[part, None]
            log_z_C = torch.logsumexp(logits_CV, dim=-1)
            nll_C = log_z_C - logits_CV.gather(-1, target_C1).squeeze(-1)
            nll_sum += (nll_C * nll_weights_N[part]).sum()
            if z_weights_N is not None:
                z_sum += (log_z_C.square() * z_weights_N[part]).sum()
            if nll_grad_Nd is None:
                continue
            # d nll / d logits = softmax - onehot; d logZ^2 / d logits = 2 logZ softmax.
            softmax_CV = torch.exp_(logits_CV.sub_(log_z_C[:, None]))
            if z_grad_Nd is not None and z_weights_N is not None:
                scale_C1 = (2 * log_z_C * z_weights_N[part])[:, None]
                z_grad_Nd[part] = (softmax_CV * scale_C1).to(weight_Vd.dtype) @ weight_Vd
            softmax_CV.scatter_add_(-1, target_C1, -torch.ones_like(target_C1, dtype=torch.float32))
            softmax_CV.mul_(nll_weights_N[part, None])
            nll_grad_Nd[part] = softmax_CV.to(weight_Vd.dtype) @ weight_Vd
        ctx.has_z = z_grad_Nd is not None
        if nll_grad_Nd is not None:
            saved = (nll_grad_Nd,) if z_grad_Nd is None else (nll_grad_Nd, z_grad_Nd)
            ctx.save_for_backward(*saved)
        return nll_sum, z_sum

    @staticmethod
    def backward(ctx: Any, nll_upstream: Tensor, z_upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the saved gradients; both sums are linear in their upstream scalar."""
        grads = ctx.saved_tensors
        grad_Nd = grads[0] * nll_upstream.to(grads[0].dtype)
        if ctx.has_z:
            grad_Nd = grad_Nd + grads[1] * z_upstream.to(grads[1].dtype)
        return grad_Nd, None, None, None, None, None
