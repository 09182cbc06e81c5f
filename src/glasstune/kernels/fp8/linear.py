"""A frozen linear layer whose products are float8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glasstune.kernels.fp8.numbers import E4M3, power_scales, to_rows
from glasstune.kernels.fp8.op import Fp8Weights, fp8_base
from glasstune.kernels.lora_group.layout import Layout


class Fp8Linear(nn.Linear):
    """A frozen `nn.Linear` whose weight is e4m3 with a power of two for each row.

    Weights are kept twice, by rows and by columns, since tensor cores read both factors of a
    product by rows; both stand for the same numbers. Tensors are bytes (uint8), so that neither
    PEFT nor a cast of the model takes them for a type to compute in. PEFT's own merge into them
    fails, but with `safe_merge` it adds rounded numbers to bytes and says nothing: merge into the
    original weights (`glasstune merge`). `W_q` and `dequantize` are the names by which PEFT reads a
    packed weight.

    Args:
        in_features: Width of the input, a multiple of 16.
        out_features: Width of the output, a multiple of 16.
        bias: Whether there is a bias.
        device: Where its tensors live.
        dtype: Type of the bias.
    """

    weight: nn.Parameter
    scale: Tensor
    turned: Tensor
    turned_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        n, i = out_features, in_features
        rows = torch.zeros(n, i, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.register_buffer("scale", torch.ones(n, device=device))
        self.register_buffer("turned", torch.zeros(i, n, dtype=torch.uint8, device=device))
        self.register_buffer("turned_scale", torch.ones(i, device=device))
        if bias:
            zeros = torch.zeros(n, dtype=dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    @classmethod
    @torch.no_grad()
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> Fp8Linear:
        """Rounds a weight [out, in]; the bias keeps its dtype.

        Raises:
            ValueError: The weight holds NaN or Inf, or a width that float8 products do not take.
        """
        n, i = weight.shape
        if n % 16 or i % 16:
            raise ValueError(f"a float8 weight has multiples of 16 rows and columns, not {n} x {i}")
        module = cls(i, n, bias=False, device="meta")
        scale = power_scales(weight)
        rows = to_rows(weight, scale)
        module.weight = nn.Parameter(rows.view(torch.uint8), requires_grad=False)
        module.scale = scale
        module.turned, module.turned_scale = turn(rows, scale)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return module

    def forward(self, input: Tensor) -> Tensor:
        """Returns [..., out] for an input [..., in]: bfloat16 under autocast, else its type."""
        kind = input.device.type
        given = torch.bfloat16 if torch.is_autocast_enabled(kind) else input.dtype
        input = input.to(torch.bfloat16)  # the only one that tensor cores give of float8 rows
        weights = Fp8Weights(self.weight, self.scale, self.turned, self.turned_scale)
        layout = Layout(self.in_features, (self.out_features,), (), ())
        with torch.autocast(kind, enabled=False):
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return fp8_base(input, weights, bias, layout)[0].to(given)

    def dequantize(self) -> Tensor:
        """Returns the float32 weight [out, in] that the bytes stand for."""
        return self.weight.view(E4M3).float() * self.scale[:, None]

    @property
    def W_q(self) -> Tensor:
        """The packed weight; its presence tells PEFT to call `dequantize`."""
        return self.weight

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Moves like any module, but keeps float32 scales when a cast to 16 bit comes by."""
        exact, turned = self.scale, self.turned_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != torch.float32:
            self.scale = exact.to(self.scale.device)
            self.turned_scale = turned.to(self.turned_scale.device)
        return self

    def extra_repr(self) -> str:
        """Returns what `print` shows between the brackets."""
        return f"{super().extra_repr()}, float8"


def turn(rows_ni: Tensor, scale_n: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the same weight by columns: bytes [i, n] and their scales [i].

    Both copies stand for the same numbers, but those below 2**-6 of a scale.
    """
    turned = (rows_ni.float() * scale_n[:, None]).t().contiguous()
    scale = power_scales(turned)
    return to_rows(turned, scale).view(torch.uint8), scale
