"""LoRA inside the base's own product: one of its dimensions is widened by the ranks.

y = [x, x·Aᵀ] · [W, s·B]ᵀ, so the wide outputs are written once and never read again for LoRA; the
backward mirrors it, dx = [dy, dy·sB] · [W; A]. Where one side of W is much narrower than the other,
the ranks join that one instead, so that the wide side is read once, by the base's own product:
[y', u] = x · [W; A]ᵀ and y = y' + u·(sB)ᵀ for a wide input; [dx', v] = dy · [W, sB] and
dx = dx' + v·A for wide outputs, which then have a product each and need not be joined.

On an H100 at the shape of Llama-3-8B (8,192 tokens) a step of the whole model took 539 ms with LoRA
beside one product a group, 498 ms inside it.

The wide weight M is either kept (a 16-bit base) or expanded from packed weights in the forward and
once more in the backward, and freed after each.

Shape letters: T tokens, i input features, n outputs of all members, k ranks of all members, r
rank of one member.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glasstune.kernels.lora_group.layout import Layout


class Source(Protocol):
    """Packed weights of a group that expand to its M."""

    def expand(
        self,
        layout: Layout,
        downs: list[Tensor],
        ups: list[Tensor],
        dtype: torch.dtype,
        after: list[Tensor],
    ) -> Tensor:
        """Returns M [n + k, i + k]; `after` holds what must be there before it is made."""
        ...


def forward_product(
    x_Ti: Tensor, wide: Tensor, bias_n: Tensor | None, layout: Layout
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Returns the outputs (one of all members, or one of each), x and u = x·Aᵀ [T, k].

    x is a part of [x, u] where that was made: then the copy is kept and not x itself.
    """
    n, i = layout.rows, layout.width
    if layout.narrows:
        both = x_Ti @ wide[:, :i].t()
        low_Tk = both[:, n:].clone()  # kept, and a view would keep all of both
        y_Tn = both[:, :n] + low_Tk @ wide[:n, i:].t()
        return [y_Tn if bias_n is None else y_Tn + bias_n], x_Ti, low_Tk
    joined_Tik = torch.cat([x_Ti, x_Ti @ wide[n:, :i].t()], 1)
    outs = []
    for rows in layout.out_slices() if layout.apart else [slice(0, n)]:
        weight = wide[rows].t()
        if bias_n is None:
            outs.append(joined_Tik @ weight)
        else:
            outs.append(torch.addmm(bias_n[rows], joined_Tik, weight))
    return outs, joined_Tik[:, :i], joined_Tik[:, i:]


def input_gradient(
    grads: list[Tensor], wide: Tensor, layout: Layout, needed: bool
) -> tuple[Tensor | None, Tensor]:
    """Returns dx [T, i] where needed, and v = dy·sB [T, k].

    Args:
        grads: dy of all members [T, n], or of each where they are apart.
        wide: M.
        layout: Of the group.
        needed: Whether dx is.
    """
    n, i = layout.rows, layout.width
    if not layout.apart:
        (grad_Tn,) = grads
        low_Tk = grad_Tn @ wide[:n, i:]
        if not needed:
            return None, low_Tk
        return torch.cat([grad_Tn, low_Tk], 1) @ wide[:, :i], low_Tk
    start = 0 if needed else i
    parts = [
        grad @ wide[rows, start:] for grad, rows in zip(grads, layout.out_slices(), strict=True)
    ]
    total = sum(parts[1:], parts[0])
    if not needed:
        return None, total
    low_Tk = total[:, i:]
    return total[:, :i] + low_Tk @ wide[n:, :i], low_Tk


def adapter_gradients(
    grads: list[Tensor],
    low_grad_Tk: Tensor,
    x_Ti: Tensor,
    low_Tk: Tensor,
    layout: Layout,
    dtypes: list[torch.dtype],
    needed: list[bool],
    apart: bool,
) -> list[Tensor | None]:
    """Gradients of A and B of each member.

    Args:
        grads: dy of all members [T, n], or of each where they are apart.
        low_grad_Tk: dy·sB.
        x_Ti: The input.
        low_Tk: x·Aᵀ.
        layout: Of the group.
        dtypes: Type of A and B of each member in turn.
        needed: Whether each of them needs its gradient.
        apart: Whether each member has its own dy.

    Returns:
        dA [r, i] and dB [n_j, r] of each member in turn; None where not needed.
    """
    downs_ki = low_grad_Tk.t() @ x_Ti if any(needed[0::2]) else None
    found: list[Tensor | None] = []
    members = zip(layout.out_slices(), layout.rank_slices(), layout.scales, strict=True)
    for index, (out, rank, scale) in enumerate(members):
        down = up = None
        if needed[2 * index] and downs_ki is not None:
            down = downs_ki[rank].to(dtypes[2 * index])
        if needed[2 * index + 1]:
            grad = grads[index] if apart else grads[0][:, out]
            thin = grad.t() @ low_Tk[:, rank]
            exact = torch.promote_types(thin.dtype, torch.float32)
            up = (thin.to(exact) * scale).to(dtypes[2 * index + 1])
        found += [down, up]
    return found


class GroupProduct(torch.autograd.Function):
    """(x, M or its source, bias, A and B of up to four members) -> y [T, n], or y of each.

    M already holds the values of A and B, and a source reads them when it expands; they are
    inputs so that their gradients have a place, and saved so that a change between forward and
    backward is an error as it is in plain torch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_Ti: Tensor,
        wide: Tensor | None,
        source: Source | None,
        bias_n: Tensor | None,
        layout: Layout,
        a0: Tensor,
        b0: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        a3: Tensor | None,
        b3: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Returns the outputs; saves x, x·Aᵀ and a kept M."""
        full = wide
        if full is None:
            assert source is not None
            downs, ups = _present(a0, a1, a2, a3), _present(b0, b1, b2, b3)
            full = source.expand(layout, downs, ups, x_Ti.dtype, [])
        outs, x_Ti, low_Tk = forward_product(x_Ti, full, bias_n, layout)
        ctx.save_for_backward(x_Ti, low_Tk, wide, a0, b0, a1, b1, a2, b2, a3, b3)
        ctx.source, ctx.layout = source, layout
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Returns dx and the gradients of A and B, in the order of forward's inputs."""
        x_Ti, low_Tk, wide, *flat = ctx.saved_tensors
        layout: Layout = ctx.layout
        downs, ups = _present(*flat[0::2]), _present(*flat[1::2])
        if wide is None:
            # Expanded after dy is there: else a compiler could make it in the forward and keep it.
            wide = ctx.source.expand(layout, downs, ups, grads[0].dtype, list(grads))
        dx_Ti, low_grad_Tk = input_gradient(list(grads), wide, layout, ctx.needs_input_grad[0])
        pairs = [tensor for pair in zip(downs, ups, strict=True) for tensor in pair]
        needed = list(ctx.needs_input_grad[5 : 5 + len(pairs)])
        dtypes = [tensor.dtype for tensor in pairs]
        found = adapter_gradients(
            list(grads), low_grad_Tk, x_Ti, low_Tk, layout, dtypes, needed, layout.apart
        )
        found += [None] * (8 - len(found))
        return (dx_Ti, None, None, None, None, *found)


class FrozenProduct(torch.autograd.Function):
    """(x, W of all members or its source, bias) -> y [T, n], with a gradient for x alone.

    Nothing but a kept W is saved: the base is frozen, so dx needs no input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_Ti: Tensor,
        weight: Tensor | None,
        source: Source | None,
        bias_n: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        """Returns y."""
        full = weight
        if full is None:
            assert source is not None
            full = source.expand(layout, [], [], x_Ti.dtype, [])
        ctx.save_for_backward(weight)
        ctx.source, ctx.layout = source, layout
        if bias_n is None:
            return x_Ti @ full.t()
        return torch.addmm(bias_n, x_Ti, full.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Tn: Tensor) -> tuple[Any, ...]:
        """Returns dx."""
        (weight,) = ctx.saved_tensors
        if weight is None:
            weight = ctx.source.expand(ctx.layout, [], [], grad_Tn.dtype, [grad_Tn])
        return grad_Tn @ weight, None, None, None, None


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]
