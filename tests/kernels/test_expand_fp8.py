"""Packed weights expanded to float8: the rounded numbers, both layouts, products, nothing kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import QUIET_COMPILER

from glasstune.kernels.expand import Fp8Packed, Packed4bit, PackedInt8, weight_scales
from glasstune.kernels.expand import fp8 as expand_fp8
from glasstune.kernels.fp8 import (
    Fp8Linear,
    Fp8Weights,
    Low,
    extra_columns,
    fp8_base,
    fp8_group,
    write_low,
)
from glasstune.kernels.fp8.low import widened_rows
from glasstune.kernels.fp8.numbers import E4M3
from glasstune.kernels.int8_linear.reference import quantize_rows
from glasstune.kernels.lora_group import Layout

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional
pytestmark = QUIET_COMPILER

# rows of each member and width
SHAPES = [((64,), 128), ((48, 16, 32), 64), ((160, 144), 64), ((32,), 192)]
BF16 = 2.0**-8 / 3**0.5  # what bfloat16 makes of one number, as root of the mean square


def weights_of(outs: tuple[int, ...], width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(outs) + width)
    made = [torch.randn(out, width, generator=generator) / width**0.5 for out in outs]
    made[0][3] *= 30  # rows of very different size
    made[0][:, 5] *= 20
    return made


def pack(
    weights: list[torch.Tensor], bits: int, nested: bool = True, block: int = 64
) -> tuple[Any, list[torch.Tensor]]:
    """Returns our packed group and each weight as its own library expands it, float32."""
    if bits == 8:
        rows = [quantize_rows(weight) for weight in weights]
        packed = PackedInt8([q for q, _ in rows], [scale for _, scale in rows])
        return packed, [q.float() * (scale / 127)[:, None] for q, scale in rows]
    made = [
        functional.quantize_4bit(
            weight, blocksize=block, compress_statistics=nested, quant_type="nf4"
        )
        for weight in weights
    ]
    states = [state for _, state in made]
    group = Packed4bit(
        [data for data, _ in made],
        [state.absmax for state in states],
        [state.state2.code for state in states] if nested else [],
        [state.state2.absmax for state in states] if nested else [],
        [state.offset for state in states] if nested else [],
        states[0].code,
        block,
    )
    return group, [functional.dequantize_4bit(data, state) for data, state in made]


def source_of(packed: Any, layout: Layout) -> Fp8Packed:
    n, i, extra = layout.rows, layout.width, extra_columns(layout)
    low = torch.zeros(n, extra).to(E4M3) if extra else None
    turned = torch.zeros(i, extra).to(E4M3) if extra else None
    return Fp8Packed(packed, layout.outs, *weight_scales(packed, layout), low, turned)


def rounded_weight(exact: list[torch.Tensor], source: Fp8Packed) -> torch.Tensor:
    """Returns expanded rows as e4m3 has them, in fp64."""
    scale = source.scale[:, None]
    return (torch.cat(exact) / scale).to(E4M3).double() * scale


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], ((512,), 64)], ids=str)
def test_one_layer_is_that_of_its_expanded_weight_bit_for_bit(shape, bits, nested) -> None:
    outs, width = shape
    packed, (exact,) = pack(weights_of(outs, width), bits, nested)
    source = source_of(packed, Layout(width, outs, (), ()))
    right = Fp8Linear.from_weight(exact)
    for turned, bytes_, scale in (
        (False, right.weight, right.scale),
        (True, right.turned, right.turned_scale),
    ):
        got, its_scale = source.expand(turned, [])
        assert torch.equal(its_scale, scale)
        assert torch.equal(bits_of(got), bytes_)


def test_by_columns_stands_what_the_rows_hold_however_small_it_is() -> None:
    draw = torch.Generator().manual_seed(0)
    exact = torch.randn(64, 96, generator=draw)
    exact *= 10.0 ** (-7 * torch.rand(64, 96, generator=draw))  # most below the range of 4 bits
    right = Fp8Linear.from_weight(exact)
    turned = torch.empty(96, 64, dtype=E4M3)
    expand_fp8.round_reference(exact, right.scale, right.turned_scale, turned)
    assert torch.equal(bits_of(turned), right.turned)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_layouts_stand_for_the_same_numbers(shape, bits) -> None:
    outs, width = shape
    packed, exact = pack(weights_of(outs, width), bits)
    source = source_of(packed, Layout(width, outs, (), ()))
    wide, scale = source.expand(False, [])
    turned, turned_scale = source.expand(True, [])
    assert wide.shape == (sum(outs), width)
    assert turned.shape == (width, sum(outs))
    rows = wide.float() * scale[:, None]
    columns = (turned.float() * turned_scale[:, None]).t()
    # Rounded once: at most half of the last of 4 bits, or of the least number, off.
    off = (rows - torch.cat(exact)).abs()
    assert bool((off <= torch.cat(exact).abs() * 2.0**-4 + scale[:, None] * 2.0**-10).all())
    whole = (rows == 0) | ((rows / turned_scale).abs() >= 2.0**-6)
    assert whole.float().mean() > 0.85
    assert torch.equal(rows[whole], columns[whole])
    assert bool(((rows - columns).abs() <= turned_scale * 2.0**-10).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows_at_once", [1, 300])
def test_scales_are_the_same_however_few_rows_are_expanded_at_once(
    bits, rows_at_once, monkeypatch
) -> None:
    layout = Layout(64, (512, 528), (), ())
    packed, _ = pack(weights_of(layout.outs, 64), bits)
    at_once = weight_scales(packed, layout)
    sizes = []
    exact = expand_fp8._exact

    def watched(*args: Any) -> Any:
        for rows in exact(*args):
            sizes.append(len(rows))
            yield rows

    monkeypatch.setattr(expand_fp8, "_exact", watched)
    monkeypatch.setattr(expand_fp8, "_CHUNK", 64 * rows_at_once)
    for one, other in zip(weight_scales(packed, layout), at_once, strict=True):
        assert torch.equal(one, other)
    # At 4 bit whole blocks of 256 blocks of 64 values.
    assert max(sizes) == (rows_at_once if bits == 8 else 256 * -(-rows_at_once // 256))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_is_no_number_is_refused(bits) -> None:
    packed, _ = pack(weights_of((32,), 64), bits, nested=False)
    (packed.absmax if bits == 4 else packed.row_scales)[0][2] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        weight_scales(packed, Layout(64, (32,), (), ()))


class Problem:
    """A group of packed layers with LoRA, and its truth."""

    def __init__(self, shape: Any, bits: int, up: float = 0.05) -> None:
        outs, width = shape
        draw = torch.Generator().manual_seed(0)
        ranks = (8, 3, 4)[: len(outs)]
        self.layout = Layout(width, outs, ranks, tuple(2.0 for _ in outs))
        self.packed, self.exact = pack(weights_of(outs, width), bits)
        self.source = source_of(self.packed, self.layout)
        self.downs = [torch.randn(r, width, generator=draw) * width**-0.5 for r in ranks]
        self.ups = [
            torch.randn(n, r, generator=draw) * up for n, r in zip(outs, ranks, strict=True)
        ]
        self.low = Low.empty(self.layout, torch.bfloat16, torch.device("cpu"))
        source = self.source
        sides = (source.low, source.scale), (source.low_turned, source.turned_scale)
        write_low(self.layout, self.downs, self.ups, self.low, *sides)
        self.x = torch.randn(11, width, generator=draw).bfloat16()
        self.grad = torch.randn(11, self.layout.rows, generator=draw).bfloat16()

    def kept(self) -> Fp8Weights:
        """Returns both copies, made from the expanded rows in plain torch and kept."""
        source, n, i = self.source, self.layout.rows, self.layout.width
        extra = extra_columns(self.layout)
        wide, turned = torch.zeros(n, i + extra), torch.zeros(i, n + extra)
        wide[:, :i] = torch.cat(self.exact) / source.scale[:, None]
        rounded = wide[:, :i].to(E4M3).float() * source.scale[:, None]
        turned[:, :n] = rounded.t() / source.turned_scale[:, None]
        weights = Fp8Weights(wide.to(E4M3), source.scale, turned.to(E4M3), source.turned_scale)
        sides = (weights.wide, weights.scale), (weights.turned, weights.turned_scale)
        write_low(self.layout, self.downs, self.ups, self.low, *sides)
        return weights

    def run(self, weights: Any, function: Any = None) -> list[torch.Tensor]:
        """Returns y and the gradients of x, each A and each B."""
        leaves = [t.detach().clone().requires_grad_() for t in (self.x, *self.downs, *self.ups)]
        count = len(self.downs)

        def product(x: torch.Tensor, *pairs: torch.Tensor) -> torch.Tensor:
            downs, ups = list(pairs[:count]), list(pairs[count:])
            return torch.cat(fp8_group(x, weights, self.low, None, self.layout, downs, ups), -1)

        y = (function or (lambda f: f))(product)(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grad)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_kept_copies(shape, bits) -> None:
    problem = Problem(shape, bits)
    got, want = problem.run(problem.source), problem.run(problem.kept())
    for mine, right in zip(got, want, strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("up", [0.002, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_against_fp64(shape, bits, up) -> None:
    """Over the rounded numbers: what is left is bfloat16's rounding of LoRA and of the results."""
    problem = Problem(shape, bits, up)
    source, layout, low = problem.source, problem.layout, problem.low
    weight = rounded_weight(problem.exact, source)

    def rounded(rows: torch.Tensor, factor: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
        nothing = torch.zeros(len(rows), layout.columns).bfloat16()
        made, scale = widened_rows(rows, nothing, factor, reach, extra_columns(layout))
        return made[:, : rows.shape[1]].double() * scale

    x, grad = problem.x.double(), problem.grad.double()
    y = rounded(problem.x, low.factor_k, low.reach_k) @ weight.t()
    dx = rounded(problem.grad, low.factor_back_k, low.reach_back_k) @ weight
    downs, ups = [], []
    for down, up_, out in zip(problem.downs, problem.ups, layout.out_slices(), strict=True):
        a, b = down.double(), 2 * up_.double()
        y[:, out] += (x @ a.t()) @ b.t()
        dx += (grad[:, out] @ b) @ a
        downs.append((grad[:, out] @ b).t() @ x)
        ups.append(2 * grad[:, out].t() @ (x @ a.t()))
    for mine, right in zip(problem.run(source), [y, dx, *downs, *ups], strict=True):
        assert float((mine.double() - right).norm() / right.norm()) <= 1.5 * 2 * BF16


def test_the_frozen_product() -> None:
    outs, width = SHAPES[1]
    packed, exact = pack(weights_of(outs, width), 4)
    layout = Layout(width, outs, (), ())
    source = source_of(packed, layout)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(7, width, generator=draw).bfloat16().requires_grad_()
    grad = torch.randn(7, sum(outs), generator=draw).bfloat16()
    bias = torch.randn(sum(outs), generator=draw).bfloat16()
    y = torch.cat(fp8_base(x, source, bias, layout), -1)
    (dx,) = torch.autograd.grad(y, x, grad)
    weight = rounded_weight(exact, source)

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        made, scale = widened_rows(rows.detach(), None, None, None, 0)
        return made.double() * scale

    for got, want in (
        (y.detach(), rounded(x) @ weight.t() + bias.double()),
        (dx, rounded(grad) @ weight),
    ):
        assert float((got.double() - want).norm() / want.norm()) <= 2.0**-7  # rounded twice at most


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("budget", [1.0, 0.3])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_expanded_weight_is_kept(bits, budget, compiled) -> None:
    problem = Problem(((160, 144), 64), bits)
    kept, got = watched(problem, budget, compiled)
    assert kept
    assert not any(expanded(tensor, problem.layout) for tensor in kept)
    for mine, right in zip(got, problem.run(problem.source), strict=True):
        assert torch.equal(mine, right)


def test_a_kept_weight_would_be_seen(monkeypatch) -> None:
    """Without `after` a compiler may make the backward's layout in the forward and keep it."""
    problem = Problem(((160, 144), 64), 8)
    expand = Fp8Packed.expand
    monkeypatch.setattr(Fp8Packed, "expand", lambda self, turned, after: expand(self, turned, []))
    kept, _ = watched(problem, 1.0, True)
    assert any(expanded(tensor, problem.layout) for tensor in kept)


def watched(problem: Problem, budget: float, compiled: bool) -> tuple[list[Any], list[Any]]:
    """Returns what is saved for the backward, and outputs with gradients."""
    from torch._functorch import config

    kept: list[torch.Tensor] = []

    def function(run: Any) -> Any:
        if not compiled:
            return run
        torch._dynamo.reset()
        return torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)

    with (
        config.patch(activation_memory_budget=budget),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        return kept, problem.run(problem.source, function)


def expanded(tensor: torch.Tensor, layout: Layout) -> bool:
    """Whether it is an expanded weight; packed ones are integers.

    A kept one may be saved as a view of another shape: its memory tells.
    """
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.is_floating_point() and size >= layout.rows * layout.width


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("with_low", [False, True])
def test_the_compilers_view_of_the_ops_is_the_real_one(bits, turned, with_low) -> None:
    problem = Problem(SHAPES[1], bits)
    source, packed = problem.source, problem.packed
    parts = [getattr(packed, name) for name in type(packed).__slots__]
    low = (source.low_turned if turned else source.low) if with_low else None
    rest = (source.scale, source.turned_scale, low, list(problem.layout.outs), turned, [])
    op = getattr(torch.ops.glasstune, f"expand_{'4bit' if bits == 4 else 'int8'}_fp8").default
    torch.library.opcheck(op, (*parts, *rest), test_utils="test_faketensor")
