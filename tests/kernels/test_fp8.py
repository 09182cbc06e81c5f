"""Float8 products with LoRA inside, against fp64 mathematics over the rounded numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glasstune.kernels.fp8 import Fp8Linear, Fp8Weights, Low, extra_columns, fp8_group, write_low
from glasstune.kernels.fp8.low import widened_rows
from glasstune.kernels.fp8.numbers import E4M3, power_scales, to_rows, two_parts
from glasstune.kernels.fp8.product import fp8_product, fp8_rows
from glasstune.kernels.lora_group import Layout

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
if CUDA:
    pytestmark = pytest.mark.filterwarnings("default")  # Triton's own
ON_GPU = pytest.mark.skipif(not CUDA, reason="needs CUDA")

# tokens, input features, output features and ranks
SHAPES = [
    (32, 64, (64, 16, 16), (8, 8, 8)),
    (5, 128, (48,), (4,)),
    (16, 32, (80, 64), (8, 3)),  # each output at least twice as wide as the input: apart
    (16, 160, (32, 16), (3, 16)),
]
# What bfloat16 makes of one number, as root of the mean square.
BF16 = 2.0**-8 / 3**0.5


class Problem:
    """A group of float8 layers, and its parts in fp64 as they were rounded."""

    def __init__(self, shape: Any, up: float = 0.05, outlier: float = 1.0) -> None:
        tokens, width, outs, ranks = shape
        draw = torch.Generator().manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=draw).to(DEVICE)

        self.layout = Layout(width, outs, ranks, tuple(2.0 for _ in outs))
        self.weight = normal(self.layout.rows, width) * width**-0.5
        self.x = normal(tokens, width).bfloat16()
        self.x[:, 3] *= outlier
        self.grad = normal(tokens, self.layout.rows).bfloat16()
        self.downs = [normal(r, width) * width**-0.5 for r in ranks]
        self.ups = [normal(n, r) * up for n, r in zip(outs, ranks, strict=True)]
        n, extra = self.layout.rows, extra_columns(self.layout)
        linear = Fp8Linear.from_weight(self.weight)
        wide = torch.zeros(n, width + extra, dtype=E4M3, device=DEVICE)
        turned = torch.zeros(width, n + extra, dtype=E4M3, device=DEVICE)
        wide[:, :width] = linear.weight.view(E4M3)
        turned[:, :n] = linear.turned.view(E4M3)
        self.weights = Fp8Weights(wide, linear.scale, turned, linear.turned_scale)
        self.low = Low.empty(self.layout, torch.bfloat16, DEVICE)
        self.write()
        self.exact = linear.dequantize().double()

    def write(self) -> None:
        """Brings LoRA's columns up to date."""
        weights = self.weights
        sides = (weights.wide, weights.scale), (weights.turned, weights.turned_scale)
        write_low(self.layout, self.downs, self.ups, self.low, *sides)

    def run(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns y, and the gradients of x, each A and each B."""
        x = self.x.clone().requires_grad_()
        downs = [value.clone().requires_grad_() for value in self.downs]
        ups = [value.clone().requires_grad_() for value in self.ups]
        y = torch.cat(fp8_group(x, self.weights, self.low, None, self.layout, downs, ups), -1)
        return y.detach(), list(torch.autograd.grad(y, [x, *downs, *ups], self.grad))

    def rounded(self, rows: torch.Tensor, back: bool) -> torch.Tensor:
        """Returns rows as the product takes them: rounded to e4m3, in fp64."""
        low, k = self.low, self.layout.columns
        nothing = torch.zeros(len(rows), k, dtype=torch.bfloat16, device=DEVICE)
        factor, reach = (
            (low.factor_back_k, low.reach_back_k) if back else (low.factor_k, low.reach_k)
        )
        bytes_, scale = widened_rows(rows, nothing, factor, reach, extra_columns(self.layout))
        return bytes_[:, : rows.shape[1]].double() * scale.double()

    def truth(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the same in fp64: rounded activations for the base, exact ones for LoRA."""
        x, grad = self.x.double(), self.grad.double()
        y = self.rounded(self.x, False) @ self.exact.t()
        dx = self.rounded(self.grad, True) @ self.exact
        downs, ups = [], []
        for down, up, out in zip(self.downs, self.ups, self.layout.out_slices(), strict=True):
            a, b = down.double(), 2 * up.double()
            y[:, out] += (x @ a.t()) @ b.t()
            dx += (grad[:, out] @ b) @ a
            downs.append((grad[:, out] @ b).t() @ x)
            ups.append(2 * grad[:, out].t() @ (x @ a.t()))
        return y, [dx, *downs, *ups]


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("up", [0.002, 0.05, 3.0])
@pytest.mark.parametrize("outlier", [1.0, 500.0])
def test_lora_keeps_bfloat16s_precision_inside_a_float8_product(shape, up, outlier) -> None:
    problem = Problem(shape, up, outlier)
    y, grads = problem.run()
    want_y, want_grads = problem.truth()
    # A, s*B, u and y are rounded once each; 1.5 for the term that the split leaves out.
    assert far(y, want_y) <= 1.5 * 2 * BF16
    for got, want in zip(grads, want_grads, strict=True):
        assert far(got, want) <= 1.5 * 2 * BF16


@pytest.mark.skipif(CUDA, reason="the kernel splits by itself: only plain torch can be broken so")
def test_a_single_e4m3_number_for_b_would_fail_that_test(monkeypatch) -> None:
    from glasstune.kernels.fp8 import low

    def one(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return values.to(E4M3), torch.zeros_like(values).to(E4M3)

    monkeypatch.setattr(low, "two_parts", one)
    problem = Problem(SHAPES[0], 3.0)
    assert far(problem.run()[0], problem.truth()[0]) > 4 * BF16


def test_the_whole_layer_is_as_far_from_fp64_as_e4m3_rounds() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 512, device=DEVICE) * 0.05
    linear = Fp8Linear.from_weight(weight)
    x = torch.randn(64, 512, device=DEVICE).bfloat16().requires_grad_()
    y = linear(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    one = 2.0**-4 / 3**0.5 / 1.3  # a number of 4 bits, rounded to nearest, evenly spread
    assert far(linear.dequantize(), weight.double()) <= one
    assert far(y.detach(), x.detach().double() @ linear.dequantize().double().t()) <= one
    assert x.grad is not None
    assert far(x.grad, grad.double() @ linear.dequantize().double()) <= one


def test_autocast_changes_no_product() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(8, 64).to(E4M3), torch.randn(16, 64).to(E4M3)
    ones = torch.ones(8, 1), torch.ones(16)
    want = fp8_product(left, ones[0], right, ones[1], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp8_product(left, ones[0], right, ones[1], torch.float32), want)
        fp8_rows([torch.randn(4, 8), torch.randn(4, 8)], None, None, None, 0)


def test_both_copies_stand_for_the_same_numbers() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96) * torch.logspace(-2, 1, 64)[:, None]
    linear = Fp8Linear.from_weight(weight)
    turned = linear.turned.view(E4M3).float() * linear.turned_scale[:, None]
    rows = linear.dequantize()
    # Columns hold rows of very different size: what is below 2**-6 of a scale loses bits.
    whole = (rows.t() / linear.turned_scale[:, None]).abs() >= 2.0**-6
    assert whole.float().mean() > 0.9
    assert torch.equal(turned[whole], rows.t()[whole])


def test_zero_rows_and_planted_outliers() -> None:
    weight = torch.randn(32, 64)
    weight[4] = 0
    weight[7, 5] = 1e4
    linear = Fp8Linear.from_weight(weight)
    assert torch.equal(linear.dequantize()[4], torch.zeros(64))
    assert far(linear.dequantize()[:4], weight[:4].double()) <= 0.03  # rows have their own scale
    x = torch.randn(6, 64).bfloat16()
    x[2] = 0
    x[3, 9] = 3e38
    rows, scale = fp8_rows([x.to(DEVICE)], None, None, None, 0)
    back = (rows.float() * scale).cpu()
    assert torch.equal(back[2], torch.zeros(64))
    assert torch.isfinite(back).all()
    assert far(back[3, 9], x[3, 9].double()) <= 2.0**-4
    assert far(back[:2], x[:2].double()) <= 0.03
    all_zero = Fp8Linear.from_weight(torch.zeros(16, 16))
    assert torch.equal(all_zero.dequantize(), torch.zeros(16, 16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_spoils_its_own_row_and_no_other(bad) -> None:
    x = torch.randn(4, 32).bfloat16()
    x[1, 30] = bad
    weight = Fp8Linear.from_weight(torch.randn(16, 32)).to(DEVICE)
    y = weight(x.to(DEVICE)).float().cpu()
    assert not torch.isfinite(y[1]).any()
    assert torch.isfinite(y[[0, 2, 3]]).all()
    with pytest.raises(ValueError, match="NaN or Inf"):
        Fp8Linear.from_weight(torch.full((16, 16), bad))


def test_widths_that_tensor_cores_do_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        Fp8Linear.from_weight(torch.randn(24, 32))


def test_scales_are_the_least_powers_of_two_that_fit() -> None:
    rows = torch.tensor([[1.0, -448.0], [449.0, 0.0], [0.5, 0.25], [0.0, 0.0]])
    # The row of zeros shares what a row 2**10 weaker than the strongest has.
    assert power_scales(rows).tolist() == [1.0, 2.0, 2.0**-9, 2.0**-9]
    assert torch.equal(to_rows(rows, power_scales(rows)).float()[1], torch.tensor([224.0, 0.0]))


def test_two_parts_have_eight_bits() -> None:
    values = torch.linspace(1, 448, 5000)
    first, second = two_parts(values)
    assert float(((first.float() + second.float() - values) / values).abs().max()) <= 2.0**-8


def test_a_cast_of_the_model_leaves_the_weights_alone() -> None:
    linear = Fp8Linear.from_weight(torch.randn(32, 64), torch.randn(32))
    before = linear.dequantize()
    linear.to(torch.bfloat16)
    assert linear.bias.dtype == torch.bfloat16
    assert linear.scale.dtype == linear.turned_scale.dtype == torch.float32
    assert torch.equal(linear.dequantize(), before)


@ON_GPU
@pytest.mark.parametrize("shape", [*SHAPES, (256, 4096, (4096, 1024, 1024), (16, 16, 16)),
                                   (64, 4096, (14336, 14336), (16, 16)),
                                   (64, 14336, (4096,), (64,))], ids=str)  # fmt: skip
def test_kernels_write_what_plain_torch_writes(shape) -> None:
    problem = Problem(shape)
    plain = Problem(shape)
    layout, low = plain.layout, plain.low
    weights = plain.weights
    on_host = [
        tensor.cpu() for tensor in (weights.wide, weights.scale, weights.turned,
                                    weights.turned_scale, *low.tensors())
    ]  # fmt: skip
    wide, scale, turned, turned_scale, *rest = on_host
    host_low = Low(*rest)
    write_low(
        layout, [d.cpu() for d in plain.downs], [u.cpu() for u in plain.ups], host_low,
        (wide, scale), (turned, turned_scale),
    )  # fmt: skip
    ranks = [r for part in layout.rank_slices() for r in range(part.start, part.stop)]
    for mine, theirs in zip(problem.low.tensors(), host_low.tensors(), strict=True):
        if mine.dim() == 1:
            torch.testing.assert_close(mine.cpu()[ranks], theirs[ranks], rtol=1e-5, atol=0)
        else:
            assert torch.equal(mine.cpu(), theirs)
    assert torch.equal(problem.weights.wide.cpu().view(torch.uint8), wide.view(torch.uint8))
    assert torch.equal(problem.weights.turned.cpu().view(torch.uint8), turned.view(torch.uint8))
    grads = [problem.grad[:, part] for part in layout.out_slices()]
    v = torch.randn(len(grads[0]), layout.columns, device=DEVICE).bfloat16()
    args = (problem.low.factor_back_k, problem.low.reach_back_k)
    rows, scales = fp8_rows(grads, v, *args, extra_columns(layout))
    want, want_scales = widened_rows(
        torch.cat(grads, 1).cpu(), v.cpu(), *[arg.cpu() for arg in args], extra_columns(layout)
    )
    torch.testing.assert_close(scales.cpu(), want_scales, rtol=1e-5, atol=0)
    # Scales are powers of two and equal; LoRA's columns may be rounded to the neighbour, which at 4
    # significant bits is an eighth of a number away.
    differ = rows.cpu().view(torch.uint8) != want.view(torch.uint8)
    assert float(differ.float().mean()) < 1e-3
    torch.testing.assert_close(rows.cpu().float(), want.float(), rtol=0.13, atol=2.0**-9)


@ON_GPU
def test_tensor_cores_give_the_product_of_the_same_numbers() -> None:
    torch.manual_seed(0)
    left = torch.randn(64, 4096, device=DEVICE).to(E4M3)
    right = torch.randn(128, 4096, device=DEVICE).to(E4M3)
    one = torch.rand(64, 1, device=DEVICE) + 0.5
    other = torch.rand(128, device=DEVICE) + 0.5
    got = fp8_product(left, one, right, other, torch.bfloat16)
    want = (left.double() * one) @ (right.double() * other[:, None]).t()
    assert far(got, want) <= 0.004  # sums in 14 bits, and bfloat16
