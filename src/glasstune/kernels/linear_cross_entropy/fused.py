"""One pass over chunks: the loss and the gradient of the hidden state together.

The head is frozen, so its gradient is not needed and the logits of a chunk die with the chunk.
The two products (logits, then their gradient times the weight) are done once each; recomputing
the logits in backward would cost a third.

Shape letters: N positions, d hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# On a GPU logits have the head's type: 2,048 rows of 128,256 (0.5 GiB) were as fast as more.
GPU_ROWS = 2048
GPU_CHUNK_BYTES = 2**30
_ALIGN = 8
"""Rows of logits start at a multiple of these (16 bytes at 16 bit), and the few words of an odd
vocabulary (BLOOM, GPT-2) beyond a multiple have products of their own: else cuBLAS takes kernels
that were 6 times as slow on an H100."""

LossRows = Callable[[Tensor, Tensor, Tensor, Tensor, bool], None]
"""See `reference.loss_rows_reference`."""


def gpu_rows(vocabulary: int, itemsize: int) -> int:
    """Rows of a chunk on a GPU; at least 16."""
    return max(16, min(GPU_ROWS, GPU_CHUNK_BYTES // (itemsize * vocabulary)))


def nll_in_place(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    rows: int,
    needs_grad: bool,
    loss_rows: LossRows,
) -> tuple[Tensor, Tensor | None]:
    """Weighted cross-entropy whose logits turn into their own gradient.

    Args:
        hidden_Nd: Float [N, d].
        weight_Vd: [V, d], same type.
        targets_N: int64 [N].
        weights_N: fp32 [N].
        rows: Of a chunk.
        needs_grad: Whether the gradient of hidden is wanted.
        loss_rows: What is done with a chunk's logits.

    Returns:
        (Σ wᵢ·nllᵢ fp32, its gradient over hidden [N, d] or None).
    """
    nll_N = torch.empty(hidden_Nd.shape[0], dtype=torch.float32, device=hidden_Nd.device)
    grad_Nd = None
    if needs_grad:
        grad_Nd = torch.empty_like(hidden_Nd, memory_format=torch.contiguous_format)
    count, vocabulary = hidden_Nd.shape[0], weight_Vd.shape[0]
    space = hidden_Nd.new_empty(min(rows, count), -(-vocabulary // _ALIGN) * _ALIGN)
    with torch.autocast(hidden_Nd.device.type, enabled=False):
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            logits_CV = space[: part.stop - start, :vocabulary]
            _logits(hidden_Nd[part], weight_Vd, logits_CV)
            loss_rows(logits_CV, targets_N[part], weights_N[part], nll_N[part], needs_grad)
            if grad_Nd is not None:
                _hidden_gradient(logits_CV, weight_Vd, grad_Nd[part])
    return nll_N.sum(), grad_Nd


def _logits(hidden_Cd: Tensor, weight_Vd: Tensor, out_CV: Tensor) -> None:
    """Writes the logits of a chunk."""
    even = len(weight_Vd) // _ALIGN * _ALIGN
    torch.mm(hidden_Cd, weight_Vd[:even].T, out=out_CV[:, :even])
    if even < len(weight_Vd):
        out_CV[:, even:] = hidden_Cd @ weight_Vd[even:].T


def _hidden_gradient(logits_CV: Tensor, weight_Vd: Tensor, out_Cd: Tensor) -> None:
    """Writes the gradient of a chunk's hidden states from that of its logits."""
    even = len(weight_Vd) // _ALIGN * _ALIGN
    torch.mm(logits_CV[:, :even], weight_Vd[:even], out=out_Cd)
    if even < len(weight_Vd):
        out_Cd.addmm_(logits_CV[:, even:], weight_Vd[even:])


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
        if hidden_Nd.device.type == "cuda" and z_weights_N is None:
            from glasstune.kernels.linear_cross_entropy.triton_rows import loss_rows

            rows = gpu_rows(weight_Vd.shape[0], weight_Vd.element_size())
            nll_sum, grad_Nd = nll_in_place(
                hidden_Nd, weight_Vd, targets_N, nll_weights_N, rows, needs_grad, loss_rows
            )
            ctx.has_z = False
            if grad_Nd is not None:
                ctx.save_for_backward(grad_Nd)
            return nll_sum, torch.zeros_like(nll_sum)
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
