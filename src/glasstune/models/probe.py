"""Tries one quantised layer, forward and backward, on a device."""

from __future__ import annotations

import torch

from glasstune.kernels.fp8 import Fp8Linear


def try_quantized_layer(bits: int, device: str) -> float:
    """Runs a small 8- or 4-bit layer of bitsandbytes as training does.

    Args:
        bits: 8 (`Linear8bitLt`) or 4 (`Linear4bit`, NF4).
        device: `cpu` or `cuda`.

    Returns:
        Largest deviation from the 16-bit product, as a share of the largest output.

    Raises:
        Exception: Whatever the library raises where it does not work here.
        ArithmeticError: The numbers are far off, or no gradient reaches the input.
    """
    import bitsandbytes as bnb

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 128, generator=generator)
    x = torch.randn(8, 128, generator=generator)
    layer: torch.nn.Module
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(128, 128, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(128, 128, bias=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        # In eval mode it would repack the weight for a CPU kernel that has no backward.
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    layer = layer.to(device)
    dtype = torch.float16 if bits == 8 and device == "cuda" else torch.bfloat16
    given = x.to(device, dtype).requires_grad_(True)
    out = layer(given)
    out.float().sum().backward()
    truth = x @ weight.T
    deviation = float((out.float().cpu() - truth).abs().max() / truth.abs().max())
    if given.grad is None or not bool(given.grad.abs().sum() > 0):
        raise ArithmeticError("no gradient reaches the layer's input")
    if not deviation < 0.25:
        raise ArithmeticError(f"outputs are off by {deviation:.0%}")
    return deviation


def try_fp8_layer(device: str) -> tuple[float, float]:
    """Runs a small linear layer with float8 products and a scale a row, as training does.

    Args:
        device: `cpu` (the products are emulated) or `cuda`.

    Returns:
        Relative distances of the output and of the input's gradient from the exact ones.

    Raises:
        Exception: Whatever torch or Triton raise where it does not work here.
        ArithmeticError: The numbers are far off.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 256, generator=generator)
    x = torch.randn(32, 256, generator=generator)
    x[::2] *= 1e4  # one scale for all rows would leave nothing of the others
    layer = Fp8Linear.from_weight(weight.to(device, torch.bfloat16))
    given = x.to(device, torch.bfloat16).requires_grad_(True)
    out = layer(given)
    out.float().sum().backward()
    assert given.grad is not None
    truth, back = x @ weight.T, weight.sum(0).expand_as(x)
    got = (out, truth), (given.grad, back)
    off = [
        max(
            float((found[half::2].float().cpu() - true[half::2]).norm() / true[half::2].norm())
            for half in (0, 1)
        )
        for found, true in got
    ]
    if not max(off) < 0.08:
        raise ArithmeticError(f"outputs are off by {off[0]:.1%}, gradients by {off[1]:.1%}")
    return off[0], off[1]
