"""The door to int8 linear layers: a module, and a product that keeps nothing for the backward.

Weights are expanded to the compute dtype in the forward and again in the backward, and freed after
each product; neither the expanded weight nor the input is saved, since a frozen base needs the
input's gradient only. The cost is one expansion a pass, the accuracy that of the stored weight:
activations are never rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from glasstune.kernels.int8_linear.reference import expand_rows, quantize_rows


class _FrozenProduct(torch.autograd.Function):
    """x @ W.T for a frozen int8 W; the backward gives dx alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(quantized, scale)
        return functional.linear(x, expand_rows(quantized, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        (grad,) = grads
        quantized, scale = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return grad @ expand_rows(quantized, scale, grad.dtype), None, None


def int8_linear(x: Tensor, quantized: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies by an int8 weight expanded to the compute dtype.

    Under autocast the compute dtype is autocast's, else x's own.

    Args:
        x: Floating point [..., in].
        quantized: int8 [out, in].
        scale: float32 [out].
        bias: [out] or None.

    Returns:
        [..., out] in the compute dtype.

    Raises:
        TypeError: The weight is not int8, the scales are not float32.
    """
    if quantized.dtype != torch.int8 or scale.dtype != torch.float32:
        raise TypeError(f"int8 weight and float32 scales, not {quantized.dtype} and {scale.dtype}")
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        y: Tensor = _FrozenProduct.apply(x, quantized, scale)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias.to(y.dtype)


class Int8Linear(nn.Linear):
    """A frozen `nn.Linear` whose weight is int8 with one float32 scale a row.

    It is an `nn.Linear` so that PEFT finds and wraps it. PEFT's own merge into it fails, since the
    weight is an int8 tensor, but with `safe_merge` it adds rounded numbers and says nothing:
    `glasstune merge` takes the original weights. `W_q` and `dequantize` are the names by which
    PEFT reads a packed weight (DoRA needs its norm).

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether there is a bias.
        device: Where its tensors live.
        dtype: Type of the bias.
    """

    weight: nn.Parameter
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        rows = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.register_buffer("scale", torch.zeros(out_features, device=device))
        if bias:
            zeros = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> Int8Linear:
        """Quantises a weight [out, in]; the bias keeps its dtype.

        Raises:
            ValueError: The weight holds NaN or Inf.
        """
        out_features, in_features = weight.shape
        module = cls(in_features, out_features, bias=False, device="meta")
        quantized, scale = quantize_rows(weight.detach())
        module.weight = nn.Parameter(quantized, requires_grad=False)
        module.scale = scale
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return module

    def forward(self, input: Tensor) -> Tensor:
        """Returns [..., out] for an input [..., in]."""
        return int8_linear(input, self.rows, self.scale, self.bias)

    @property
    def rows(self) -> Tensor:
        """The int8 weight [out, in]; a sharded base keeps its bytes as another type."""
        if self.weight.dtype == torch.int8:
            return self.weight
        return self.weight.view(torch.int8).view(self.out_features, self.in_features)

    def dequantize(self) -> Tensor:
        """Returns the float32 weight [out, in] that the int8 rows stand for."""
        return expand_rows(self.rows, self.scale, torch.float32)

    @property
    def W_q(self) -> Tensor:
        """The packed weight; its presence tells PEFT to call `dequantize`."""
        return self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Moves like any module, but keeps float32 scales when a cast to 16 bit comes by."""
        exact = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != torch.float32:
            self.scale = exact.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """Returns what `print` shows between the brackets."""
        return f"{super().extra_repr()}, int8 rows"
