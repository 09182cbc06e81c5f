"""Triton's float8 expansions against plain torch: on a GPU, or by its interpreter on a CPU.

On a CPU: `TRITON_INTERPRET=1 python -m pytest tests/kernels/test_gpu_expand_fp8.py`. Its cast to
float8 cuts off instead of rounding, so there the weights are such that nothing is rounded.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from glasstune.kernels.expand import Fp8Packed, Packed4bit, PackedInt8, weight_scales
from glasstune.kernels.expand.fp8 import round_reference
from glasstune.kernels.expand.reference import (
    block_scales,
    expand_4bit_reference,
    expand_int8_reference,
)
from glasstune.kernels.fp8 import Fp8Weights, Low, extra_columns, fp8_group, write_low
from glasstune.kernels.fp8.numbers import E4M3, scales_of
from glasstune.kernels.lora_group import Layout

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and not INTERPRETED, reason="neither CUDA nor TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("default"),  # Triton's own
]
ON_GPU = pytest.mark.skipif(not CUDA, reason="needs CUDA")
DEVICE = "cuda" if CUDA else "cpu"
# Less than a tile, several tiles, tiles that reach over both edges; blocks across rows.
SHAPES = [(16, 16), (48, 32), (144, 272), (128, 128), (272, 2064), (32, 4112)]
LARGE = [(4096, 14336), (14336, 4096), (1024, 4096)] if CUDA else []


def exact_4bit(shape: tuple[int, int], nested: bool) -> tuple[Any, ...]:
    """Packed bytes and scales whose values float8 holds without rounding."""
    draw = torch.Generator().manual_seed(shape[1])
    n, i = shape
    packed = torch.randint(0, 256, (n * i // 2,), generator=draw).to(torch.uint8)
    code = torch.tensor([0, 1, 1.5, -1, 2, -3, 0.5, -0.25, 1.25, -1.75, 3, -2, 0.375, 4, -6, 7.0])
    blocks = -(-n * i // 64)
    if not nested:
        absmax = 2.0 ** torch.randint(-3, 3, (blocks,), generator=draw)
        return packed, absmax.float(), None, code
    # code * nested absmax + offset is 2 or 4, whatever order they are taken in
    absmax = torch.randint(0, 2, (blocks,), generator=draw).to(torch.uint8)
    nested_code = torch.zeros(256)
    nested_code[0], nested_code[1] = 1.0, 3.0
    deeper = torch.ones(-(-blocks // 256))
    return packed, absmax, (nested_code, deeper, torch.tensor(1.0)), code


def quantized_4bit(shape: tuple[int, int], nested: bool) -> tuple[Any, ...]:
    from bitsandbytes import functional

    torch.manual_seed(0)
    weight = torch.randn(shape, device=DEVICE) * torch.logspace(-3, 0, shape[1], device=DEVICE)
    packed, state = functional.quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
    deeper = (state.state2.code, state.state2.absmax, state.offset) if nested else None
    return packed, state.absmax, deeper, state.code


def frame(shape: tuple[int, int], turned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a larger matrix full of sevens, and the place in it that is written."""
    rows, columns = shape[::-1] if turned else shape
    outer = torch.full((rows + 2, columns + 64), 7.0, device=DEVICE).to(E4M3)
    return outer, outer[1:-1, 16 : 16 + columns]


def check(outer: torch.Tensor, got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(got.contiguous().view(torch.uint8), want.view(torch.uint8))
    around = outer.float()
    around[1:-1, 16 : 16 + got.shape[1]] = 7
    assert bool((around == 7).all())  # nothing beside it is written


def unit_scales(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scales of rows and columns that differ from one to the next."""
    found = []
    for dim in (1, 0):
        peaks = exact.abs().amax(dim)
        found.append(scales_of(peaks) * 2.0 ** (torch.arange(len(peaks), device=DEVICE) % 3))
    return found[0], found[1]


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("made", [exact_4bit, pytest.param(quantized_4bit, marks=ON_GPU)])
def test_4_bit_bit_for_bit(shape, nested, turned, made) -> None:
    from glasstune.kernels.expand.fused_fp8 import expand_4bit_fp8_fused

    packed, absmax, deeper, code = made(shape, nested)
    packed, absmax, code = packed.to(DEVICE), absmax.to(DEVICE), code.to(DEVICE)
    deeper = None if deeper is None else tuple(part.to(DEVICE) for part in deeper)
    exact = torch.empty(shape, device=DEVICE)
    magnitudes = block_scales(absmax, *(deeper or (None, None, None)))
    expand_4bit_reference(packed, magnitudes, code, 64, exact)
    scale, back = unit_scales(exact)
    want = torch.empty(shape[::-1] if turned else shape, dtype=E4M3, device=DEVICE)
    round_reference(exact, scale, back if turned else None, want)
    outer, out = frame(shape, turned)
    expand_4bit_fp8_fused(packed, absmax, deeper, code, 64, scale, back if turned else None, out)
    check(outer, out, want)


def exact_int8(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 4-bit numbers, magnitudes of 127 times a power of two."""
    draw = torch.Generator().manual_seed(shape[1])
    small = torch.randint(-15, 16, shape, generator=draw).to(torch.int8)
    return small, 127.0 * 2.0 ** torch.randint(-4, 1, shape[:1], generator=draw)


def random_int8(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Among its rows are some whose values fall below the range of 4 bits."""
    torch.manual_seed(0)
    magnitudes = 10.0 ** (-7 * torch.rand(shape[0]))
    return torch.randint(-127, 128, shape, dtype=torch.int8), magnitudes


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("made", [exact_int8, pytest.param(random_int8, marks=ON_GPU)])
def test_int8_bit_for_bit(shape, turned, made) -> None:
    from glasstune.kernels.expand.fused_fp8 import expand_int8_fp8_fused

    quantized, row_scales = made(shape)
    exact = torch.empty(shape)
    # On a CPU: torch divides by 127 there, where on a GPU it multiplies by the rounded inverse.
    expand_int8_reference(quantized, row_scales, exact)
    exact, quantized, row_scales = (part.to(DEVICE) for part in (exact, quantized, row_scales))
    scale, back = unit_scales(exact)
    want = torch.empty(shape[::-1] if turned else shape, dtype=E4M3, device=DEVICE)
    round_reference(exact, scale, back if turned else None, want)
    outer, out = frame(shape, turned)
    expand_int8_fp8_fused(quantized, row_scales, scale, back if turned else None, out)
    check(outer, out, want)


def packed_group(bits: int, outs: tuple[int, ...], width: int) -> Any:
    from bitsandbytes import functional

    torch.manual_seed(0)
    weights = [torch.randn(out, width, device=DEVICE) * 0.03 for out in outs]
    if bits == 4:
        made = [functional.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
                for w in weights]  # fmt: skip
        states = [state for _, state in made]
        return Packed4bit(
            [data for data, _ in made], [s.absmax for s in states], [s.state2.code for s in states],
            [s.state2.absmax for s in states], [s.offset for s in states], states[0].code, 64,
        )  # fmt: skip
    scales = [w.abs().amax(1) for w in weights]
    rows = zip(weights, scales, strict=True)
    return PackedInt8([torch.round(w * (127 / s)[:, None]).to(torch.int8) for w, s in rows], scales)


@ON_GPU
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outs", [(4096, 1024, 1024), (14336, 14336)], ids=str)
def test_a_whole_group_is_that_of_the_cpu(bits, outs) -> None:
    width = 1024
    layout = Layout(width, outs, (), ())
    packed = packed_group(bits, outs, width)

    def low(rows: int) -> torch.Tensor:
        return torch.randn(rows, 128, device=DEVICE).to(E4M3)

    source = Fp8Packed(
        packed, outs, *weight_scales(packed, layout), low(layout.rows), low(layout.width)
    )
    host = on_host(source, layout)
    for turned in (False, True):
        mine, scale = source.expand(turned, [])
        right, its_scale = host.expand(turned, [])
        assert torch.equal(scale.cpu(), its_scale)
        assert torch.equal(mine.cpu().view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outs", [(512, 128, 128), (1024, 1024)], ids=str)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=ON_GPU)])
def test_products_of_packed_weights_are_those_of_kept_copies(bits, outs, compiled) -> None:
    """And a compiler that may keep what it likes keeps no expanded weight."""
    width, ranks = 256, (16, 8, 8)[: len(outs)]
    layout = Layout(width, outs, ranks, tuple(2.0 for _ in outs))
    packed, extra = packed_group(bits, outs, width), extra_columns(layout)
    low = Low.empty(layout, torch.bfloat16, torch.device(DEVICE))
    beside = [torch.zeros(size, extra, device=DEVICE).to(E4M3) for size in (layout.rows, width)]
    source = Fp8Packed(packed, outs, *weight_scales(packed, layout), *beside)
    pairs = [torch.randn(r, width, device=DEVICE) * width**-0.5 for r in ranks]
    pairs += [torch.randn(n, r, device=DEVICE) * 0.05 for n, r in zip(outs, ranks, strict=True)]
    sides = (beside[0], source.scale), (beside[1], source.turned_scale)
    write_low(layout, pairs[: len(outs)], pairs[len(outs) :], low, *sides)
    kept = Fp8Weights(*source.expand(False, []), *source.expand(True, []))
    x = torch.randn(64, width, device=DEVICE).bfloat16()
    grad = torch.randn(64, layout.rows, device=DEVICE).bfloat16()
    saved: list[torch.Tensor] = []

    def run(weights: Any, with_compiler: bool) -> list[torch.Tensor]:
        def product(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
            downs, ups = list(given[: len(outs)]), list(given[len(outs) :])
            return torch.cat(fp8_group(x, weights, low, None, layout, downs, ups), -1)

        leaves = [tensor.clone().requires_grad_() for tensor in (x, *pairs)]
        called = torch.compile(product, fullgraph=True) if with_compiler else product
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t, lambda t: t
        )
        with hooks:
            y = called(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    want = run(kept, False)
    saved.clear()
    for mine, right in zip(run(source, compiled), want, strict=True):
        assert float((mine.double() - right.double()).norm() / right.double().norm()) < 0.01
    size = layout.rows * width
    assert saved
    assert not any(t.is_floating_point() and t.numel() >= size for t in saved)


def on_host(source: Fp8Packed, layout: Layout) -> Fp8Packed:
    """Returns the same weights on a CPU, with scales that were computed there."""
    parts = []
    for name in type(source.packed).__slots__:
        value = getattr(source.packed, name)
        if isinstance(value, list):
            value = [tensor.cpu() for tensor in value]
        parts.append(value.cpu() if isinstance(value, torch.Tensor) else value)
    packed = type(source.packed)(*parts)
    assert source.low is not None
    assert source.low_turned is not None
    return Fp8Packed(
        packed, source.outs, *weight_scales(packed, layout), source.low.cpu(),
        source.low_turned.cpu(),
    )  # fmt: skip
