"""Int8 linear layers: bitsandbytes' own numbers, exact gradients, nothing saved."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from glasstune.kernels.int8_linear import Int8Linear
from glasstune.kernels.int8_linear.op import int8_linear
from glasstune.kernels.int8_linear.reference import (
    expand_rows,
    int8_linear_reference,
    quantize_rows,
)

SHAPES = [(64, 32), (7, 13), (1, 5), (130, 70)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_and_scales_are_bitsandbytes_own(shape, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(3)
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
    # bitsandbytes quantises float16; every one of these bfloat16 values exists there.
    assert torch.equal(weight.half().to(dtype), weight)
    theirs, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    ours, our_scale = quantize_rows(weight)
    assert torch.equal(ours, theirs)
    assert torch.equal(our_scale, scale)


def test_a_row_of_zeros_stays_zero():
    quantized, scale = quantize_rows(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert quantized[0].tolist() == [0, 0]
    assert scale[0] == 0
    assert torch.equal(expand_rows(quantized, scale, torch.float32)[0], torch.zeros(2))


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        quantize_rows(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expanded_weight_is_within_half_a_step(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    quantized, scale = quantize_rows(weight)
    step = scale / 127
    error = (expand_rows(quantized, scale, torch.float32) - weight).abs()
    assert bool((error <= step.unsqueeze(1) * 0.5001).all())
    assert float(error.max()) > 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_is_that_of_the_expanded_weight(shape, bias):
    torch.manual_seed(1)
    out, wide = shape
    linear = Int8Linear.from_weight(torch.randn(out, wide), torch.randn(out) if bias else None)
    x = torch.randn(3, 5, wide)
    grad = torch.randn(3, 5, out)
    mine = x.clone().requires_grad_()
    linear(mine).backward(grad)
    true = x.double().requires_grad_()
    truth = functional.linear(
        true, linear.dequantize().double(), None if linear.bias is None else linear.bias.double()
    )
    truth.backward(grad.double())
    torch.testing.assert_close(linear(x).double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_is_as_near_to_the_truth_as_plain_torch(shape):
    torch.manual_seed(2)
    out, wide = shape
    quantized, scale = quantize_rows(torch.randn(out, wide))
    x = torch.randn(4, wide).bfloat16()
    grad = torch.randn(4, out).bfloat16()

    def run(function, tensor):
        tensor = tensor.clone().requires_grad_()
        y = function(tensor, quantized, scale, None)
        y.backward(grad.to(y.dtype))
        return y.detach().float(), tensor.grad.float()

    truth = run(int8_linear_reference, x.float())
    eager = run(int8_linear_reference, x)
    for ours, plain, true in zip(run(int8_linear, x), eager, truth, strict=True):
        assert (ours - true).norm() <= 2 * (plain - true).norm() + 1e-6 * true.norm()


def test_neither_input_nor_expanded_weight_is_saved():
    linear = Int8Linear.from_weight(torch.randn(32, 16))
    kinds = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kinds.append((t.dtype, tuple(t.shape))) or t, lambda t: t
    ):
        linear(torch.randn(8, 16, requires_grad=True))
    assert sorted(map(str, kinds)) == sorted(
        map(str, [(torch.int8, (32, 16)), (torch.float32, (32,))])
    )


def test_autocast_decides_the_type():
    linear = Int8Linear.from_weight(torch.randn(8, 4), torch.randn(8))
    x = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    assert linear(x).dtype == torch.float32
    assert torch.equal(y, linear(x.bfloat16()).to(torch.bfloat16))


def test_scales_stay_exact_through_casts_and_saving():
    linear = Int8Linear.from_weight(torch.randn(8, 4))
    scale = linear.scale.clone()
    linear.to(torch.bfloat16)
    assert linear.scale.dtype == torch.float32
    assert torch.equal(linear.scale, scale)
    other = Int8Linear(4, 8, bias=False)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.dequantize(), linear.dequantize())


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="int8"):
        int8_linear(torch.ones(1, 2), torch.ones(2, 2), torch.ones(2))
    linear = Int8Linear.from_weight(torch.randn(4, 4))
    with pytest.raises(RuntimeError):  # a merge into int8 must not pass silently
        linear.weight.data += 0.5


def test_a_scaled_gradient_is_seen():
    """The gradient test fails on a copy whose backward is 1 % off."""
    torch.manual_seed(1)
    linear = Int8Linear.from_weight(torch.randn(6, 5))
    x = torch.randn(3, 5, requires_grad=True)
    x.register_hook(lambda grad: grad * 1.01)
    linear(x * 1.0).sum().backward()
    true = torch.ones(3, 6) @ linear.dequantize()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(x.grad, true, rtol=1e-5, atol=1e-5)
