"""Numbers of tensors, computed where the tensors live and copied to the host once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from glasstune.core.gradients import TensorSummary

CHUNK = 1 << 22
"""Elements looked at together, so that a large tensor needs no copy of its own size."""


BLOCK = 1 << 16
"""Entries whose squares are summed in float32 before the sums are added in float64."""


def dense(tensor: Tensor) -> Tensor:
    """Returns a detached, dense, real view or copy of 16 bits or more; complex becomes pairs."""
    plain = tensor.detach()
    if plain.layout != torch.strided:
        plain = plain.to_dense()
    if plain.dtype.is_floating_point and plain.itemsize == 1:
        return plain.float()  # float8 has hardly any kernels
    return torch.view_as_real(plain) if plain.is_complex() else plain


def tensor_stats(tensor: Tensor) -> Tensor:
    """Squared norm, largest magnitude (both over finite entries), zeros, NaNs, Infs.

    The host is not waited for.

    Args:
        tensor: Any shape, floating point.

    Returns:
        float64 [5] on the tensor's device.
    """
    flat = dense(tensor).reshape(-1)
    total = torch.zeros(5, dtype=torch.float64, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        quick = _quick(part) if part.device.type == "cpu" else None
        found = _masked(part[None])[0] if quick is None else quick
        largest = torch.maximum(total[1], found[1])
        total += found
        total[1] = largest
    return total


def many_stats(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensor_stats` of many tensors.

    On a GPU those of one size are looked at together: an adapter has hundreds of tensors of a
    few sizes, and a dozen small kernels for each of them take longer than a training step.

    Args:
        tensors: n tensors, floating point.

    Returns:
        n rows, float64 [5], each on its tensor's device.
    """
    rows: list[Tensor | None] = [None] * len(tensors)
    alike: dict[Hashable, list[int]] = {}
    flat = [dense(tensor).reshape(-1) for tensor in tensors]
    for index, part in enumerate(flat):
        if part.device.type == "cpu" or not 0 < part.numel() <= CHUNK:
            rows[index] = tensor_stats(tensors[index])
        else:
            alike.setdefault((part.device, part.dtype, part.numel()), []).append(index)
    for places in alike.values():
        size = max(1, CHUNK // flat[places[0]].numel())
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            found = _masked(torch.stack([flat[index] for index in chosen]))
            for index, row in zip(chosen, found.unbind(0), strict=True):
                rows[index] = row
    return [row for row in rows if row is not None]


def _masked(part: Tensor) -> Tensor:
    """The five numbers of each row without asking the host: [n, size] to float64 [n, 5]."""
    clean = torch.where(part.isfinite(), part, torch.zeros_like(part)).abs()
    # float16 and float32 squares overflow; float64 holds them all.
    wide = clean.double()
    counts = [(part == 0).sum(-1), part.isnan().sum(-1), part.isinf().sum(-1)]
    columns = [wide.square().sum(-1), wide.amax(-1), *(count.double() for count in counts)]
    return torch.stack(columns, -1)


def _quick(part: Tensor) -> Tensor | None:
    """The same on a CPU, where asking costs nothing; None where an entry is not finite.

    4 Mi bfloat16 entries take 3 ms on one core this way and 60 ms the other.
    """
    low, high = (float(value) for value in torch.aminmax(part))
    largest = max(abs(low), abs(high))
    if not math.isfinite(largest):
        return None
    if part.numel() <= BLOCK or not 1e-12 < largest < 1e12:
        wide = part.double()
        squares = float(wide.dot(wide))
    else:
        blocks = (part[start : start + BLOCK].float() for start in range(0, part.numel(), BLOCK))
        squares = math.fsum(float(block.dot(block)) for block in blocks)
    zeros = part.numel() - int(torch.count_nonzero(part))
    return torch.tensor([squares, largest, zeros, 0, 0], dtype=torch.float64)


def summary(row: Sequence[float], entries: int) -> TensorSummary:
    """Makes the record of `tensor_stats` of a tensor with that many entries."""
    squared, largest, zeros, nan, inf = row
    share = zeros / entries if entries else 0.0
    return TensorSummary(squared**0.5, largest, share, int(nan), int(inf))


class Gatherer:
    """Collects small device tensors under keys and brings them to the host together."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, Tensor] = {}

    def put(self, key: Hashable, row: Tensor) -> None:
        """Keeps a tensor of any shape under a key; a later one replaces it."""
        self._rows[key] = row.detach()

    def gather(self) -> dict[Hashable, list[float]]:
        """Returns every row as a flat list of floats; one copy for each device."""
        by_device: dict[torch.device, list[Hashable]] = {}
        for key, row in self._rows.items():
            by_device.setdefault(row.device, []).append(key)
        found: dict[Hashable, list[float]] = {}
        for keys in by_device.values():
            flat = torch.cat([self._rows[key].reshape(-1).double() for key in keys]).tolist()
            start = 0
            for key in keys:
                size = self._rows[key].numel()
                found[key] = flat[start : start + size]
                start += size
        return found


def _alike(grad: Tensor, first: Tensor) -> bool:
    """Whether a gradient is dense float32 with entries, on the device of the first one."""
    return (
        grad.dtype == torch.float32
        and grad.layout == torch.strided
        and grad.device == first.device
        and grad.numel() > 0
    )


@torch.no_grad()
def live_norms(parameters: Sequence[Tensor]) -> Tensor:
    """Norm and largest magnitude of each `.grad`, for one copy to the host each logging step.

    The 2-norm of [1e20, 1e20] is Inf in float32 and that of [1e-30] is 0: judge "zero" and
    "not finite" by the second column, which is exact (NaN stays NaN).

    Args:
        parameters: n parameters.

    Returns:
        float32 [n, 2] on the device of the first gradient: 2-norm and largest magnitude; a row of
        -1 where `.grad` is None.
    """
    plain = [value.grad for value in parameters if value.grad is not None]
    if plain and len(plain) == len(parameters) and all(_alike(g, plain[0]) for g in plain):
        # The usual case, without a handful of small operations for each of hundreds of tensors.
        columns = [torch.stack(torch._foreach_norm(plain, order)) for order in (2.0, math.inf)]
        return torch.stack(columns, 1)
    held = [index for index, value in enumerate(parameters) if value.grad is not None]
    grads = [dense(grad) for value in parameters if (grad := value.grad) is not None]
    if not grads:
        return torch.full((len(parameters), 2), -1.0)
    device = grads[0].device
    result = torch.full((len(parameters), 2), -1.0, device=device)
    full = [position for position, grad in enumerate(grads) if grad.numel()]
    index = torch.tensor([held[position] for position in full], dtype=torch.long, device=device)
    for column, order in enumerate((2.0, float("inf"))):
        norms = torch._foreach_norm([grads[position] for position in full], order)
        if norms:
            result[index, column] = torch.stack([norm.to(device, torch.float32) for norm in norms])
    for position, grad in enumerate(grads):
        if not grad.numel():
            result[held[position]] = 0.0
    return result
