"""The public door: checks, the choice between fused and general, and the evaluation form.

Shape letters: N positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glasstune.kernels.linear_cross_entropy.fused import FrozenHeadLoss
from glasstune.kernels.linear_cross_entropy.reference import weighted_sums

# fp32 logits of one chunk. On a 2-core CPU (SmolLM2's 49,152 entries) 64 MiB was as fast as 256.
CHUNK_BYTES = 64 * 2**20

Head = Callable[[Tensor], Tensor]
"""Maps hidden [n, d] to logits [n, V], with whatever the family does after the product."""


def chunk_rows(vocabulary: int) -> int:
    """Rows whose fp32 logits fit `CHUNK_BYTES`; at least 16."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `rows`."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def linear_cross_entropy(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    targets_N: Tensor,
    nll_weights_N: Tensor,
    z_weights_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy and z-loss sums behind a frozen, bare linear head.

    Args:
        hidden_Nd: Float [N, d]; receives a gradient.
        weight_Vd: Float [V, d], same dtype, frozen.
        targets_N: int64 [N], each in [0, V).
        nll_weights_N: fp32 [N].
        z_weights_N: fp32 [N] or None.

    Returns:
        (Σ wᵢ·nllᵢ, Σ vᵢ·logZᵢ²), fp32 scalars with a graph to hidden.

    Raises:
        ValueError: The weight is trained, or shapes or dtypes do not fit.
    """
    if weight_Vd.requires_grad:
        raise ValueError("the head is trained: use chunked_head_sums, which gives its gradient")
    if hidden_Nd.dim() != 2 or targets_N.shape != hidden_Nd.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden_Nd.shape)} does not fit targets {tuple(targets_N.shape)}"
        )
    if hidden_Nd.dtype != weight_Vd.dtype:
        raise ValueError(f"hidden is {hidden_Nd.dtype}, the head's weight {weight_Vd.dtype}")
    sums: tuple[Tensor, Tensor] = FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_Nd,
        weight_Vd,
        targets_N,
        nll_weights_N,
        z_weights_N,
        chunk_rows(weight_Vd.shape[0]),
    )
    return sums


def chunked_head_sums(
    hidden_Nd: Tensor,
    function: Callable[[Tensor, slice], Tensor],
    vocabulary: int,
) -> Tensor:
    """Sums `function(hidden chunk, slice)` over chunks; each chunk is recomputed in backward.

    Serves every head: trained, adapted, with a bias or a soft cap. The function runs the head
    itself, so its parameters get their gradients.

    Args:
        hidden_Nd: Float [N, d].
        function: (hidden [n, d], slice into N) -> a tensor of sums, the same shape each time.
        vocabulary: V, for the chunk's size.

    Returns:
        The sum over chunks.

    Raises:
        ValueError: There is no position.
    """
    total: Tensor | None = None
    for part in chunks(hidden_Nd.shape[0], chunk_rows(vocabulary)):
        if torch.is_grad_enabled():
            value = checkpoint(function, hidden_Nd[part], part, use_reentrant=False)
        else:
            value = function(hidden_Nd[part], part)
        total = value if total is None else total + value
    if total is None:
        raise ValueError("no trained position in this batch")
    return total


def head_cross_entropy(
    hidden_Nd: Tensor,
    head: Head,
    vocabulary: int,
    targets_N: Tensor,
    nll_weights_N: Tensor,
    z_weights_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` for any head: chunked, recomputed in backward."""

    def sums(hidden_Cd: Tensor, part: slice) -> Tensor:
        z_weights = None if z_weights_N is None else z_weights_N[part]
        return torch.stack(
            weighted_sums(head(hidden_Cd), targets_N[part], nll_weights_N[part], z_weights)
        )

    both = chunked_head_sums(hidden_Nd, sums, vocabulary)
    return both[0], both[1]


@torch.no_grad()
def token_losses(
    hidden_Nd: Tensor, head: Head, targets_N: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood and correctness of each position, for evaluation.

    Args:
        hidden_Nd: Float [N, d].
        head: Maps [n, d] to logits [n, V].
        targets_N: int64 [N].
        vocabulary: V, for the chunk's size.

    Returns:
        (nll fp32 [N] in nats, whether the largest logit is the target, bool [N]).
    """
    nll_N = torch.empty(hidden_Nd.shape[0], dtype=torch.float32, device=hidden_Nd.device)
    correct_N = torch.empty(hidden_Nd.shape[0], dtype=torch.bool, device=hidden_Nd.device)
    for part in chunks(hidden_Nd.shape[0], chunk_rows(vocabulary)):
        logits_CV = head(hidden_Nd[part]).float()
        nll_N[part] = torch.nn.functional.cross_entropy(
            logits_CV, targets_N[part], reduction="none"
        )
        correct_N[part] = logits_CV.argmax(dim=-1) == targets_N[part]
    return nll_N, correct_N
