"""Head product and cross-entropy over trained positions, without ever holding all logits."""

from glasstune.kernels.linear_cross_entropy.op import (
    chunk_rows,
    chunked_head_sums,
    chunks,
    head_cross_entropy,
    linear_cross_entropy,
    token_losses,
)

__all__ = [
    "chunk_rows",
    "chunked_head_sums",
    "chunks",
    "head_cross_entropy",
    "linear_cross_entropy",
    "token_losses",
]
