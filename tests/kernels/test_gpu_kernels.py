"""Triton kernels against their plain versions: on a GPU, or by Triton's interpreter on a CPU.

On a CPU: `TRITON_INTERPRET=1 python -m pytest tests/kernels/test_gpu_kernels.py`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from glasstune.kernels.expand.reference import (
    block_scales,
    expand_4bit_reference,
    expand_int8_reference,
)
from glasstune.kernels.linear_cross_entropy import op
from glasstune.kernels.linear_cross_entropy.fused import gpu_rows, nll_in_place
from glasstune.kernels.linear_cross_entropy.reference import (
    linear_cross_entropy_reference,
    loss_rows_reference,
)

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and not INTERPRETED, reason="neither CUDA nor TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("default"),  # Triton's own
]
DEVICE = "cuda" if CUDA else "cpu"
# Whole blocks, blocks across rows, odd widths; more than one block of 256 blocks.
SHAPES = [(6, 128), (5, 40), (7, 33), (1, 5), (3, 2050), (140, 128), (199, 101)]
LARGE = [((4096, 14336)), ((28672, 4096))] if CUDA else []
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if CUDA else [])


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_4_bit_bit_for_bit(shape, nested, kind, dtype) -> None:
    from bitsandbytes import functional

    from glasstune.kernels.expand.fused import expand_4bit_fused

    torch.manual_seed(0)
    weight = torch.randn(shape, device=DEVICE, dtype=torch.float32)
    packed, state = functional.quantize_4bit(weight, compress_statistics=nested, quant_type=kind)
    outer = torch.full((shape[0] + 2, shape[1] + 24), 7.0, dtype=dtype, device=DEVICE)
    out = outer[1:-1, : shape[1]]
    deeper = (state.state2.code, state.state2.absmax, state.offset) if nested else None
    expand_4bit_fused(packed, state.absmax, deeper, state.code, state.blocksize, out)
    theirs = functional.dequantize_4bit(packed, state).to(dtype)
    assert torch.equal(out, theirs)
    plain = torch.empty_like(theirs)
    scales = block_scales(state.absmax, *(deeper or (None, None, None)))
    expand_4bit_reference(packed, scales, state.code, state.blocksize, plain)
    assert torch.equal(plain, theirs)
    assert bool((outer[0] == 7).all() and (outer[-1] == 7).all())  # nothing beside it is written
    assert bool((outer[:, shape[1] :] == 7).all())


@pytest.mark.parametrize("shape", [*SHAPES[:5], *LARGE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_bit_for_bit(shape, dtype) -> None:
    from glasstune.kernels.expand.fused import expand_int8_fused

    torch.manual_seed(0)
    quantized = torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)
    scale = torch.rand(shape[0], device=DEVICE)
    outer = torch.full((shape[0] + 1, shape[1] + 24), 7.0, dtype=dtype, device=DEVICE)
    out = outer[:-1, : shape[1]]
    expand_int8_fused(quantized, scale, out)
    plain = torch.empty(shape, dtype=dtype, device=DEVICE)
    expand_int8_reference(quantized, scale, plain)
    assert torch.equal(out, plain)
    assert bool((outer[-1] == 7).all() and (outer[:, shape[1] :] == 7).all())


@pytest.mark.parametrize("shape", [(5, 129), (1, 16), (3, 4096), (4, 9001)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_rows_against_fp64(shape, grad, masked) -> None:
    from glasstune.kernels.linear_cross_entropy.triton_rows import loss_rows

    torch.manual_seed(0)
    rows, vocabulary = shape
    logits = torch.randn(rows, vocabulary, device=DEVICE) * 5
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    if masked:  # a vocabulary mask, from the first lane on
        logits[:, : vocabulary // 3] = -float("inf")
        targets = vocabulary // 3 + targets % (vocabulary - vocabulary // 3)
    weights = torch.rand(rows, device=DEVICE)
    weights[0] = 0
    log_p = logits.double().log_softmax(-1)
    onehot = torch.nn.functional.one_hot(targets, vocabulary)
    want = -(log_p * onehot).nan_to_num(0).sum(-1) * weights
    for function in (loss_rows, loss_rows_reference):
        given, nll = logits.clone(), torch.empty(rows, device=DEVICE)
        function(given, targets, weights, nll, grad)
        torch.testing.assert_close(nll.double(), want, rtol=1e-5, atol=1e-6)
        right = (log_p.exp() - onehot) * weights[:, None] if grad else logits.double()
        torch.testing.assert_close(given.double(), right, rtol=1e-5, atol=1e-6)


def test_the_loss_with_its_gradient() -> None:
    from glasstune.kernels.linear_cross_entropy.triton_rows import loss_rows

    torch.manual_seed(0)
    hidden = torch.randn(37, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(530, 16, device=DEVICE)
    targets = torch.randint(0, 530, (37,), device=DEVICE)
    weights = torch.rand(37, device=DEVICE)
    total, grad = nll_in_place(hidden.detach(), weight, targets, weights, 8, True, loss_rows)
    right, _ = linear_cross_entropy_reference(
        hidden.double(), weight.double(), targets, weights.double()
    )
    (exact,) = torch.autograd.grad(right, hidden)
    torch.testing.assert_close(total.double(), right.detach().double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, exact.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("z", [False, True])
def test_the_door_on_a_gpu(dtype, z) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3001, 64, device="cuda", dtype=dtype)
    weight = (torch.randn(40_000, 64, device="cuda") / 8).to(dtype)
    targets = torch.randint(0, 40_000, (3001,), device="cuda")
    weights = torch.rand(3001, device="cuda")

    def run(function, kind):
        given = hidden.to(kind).requires_grad_()
        nll, z_sum = function(given, weight.to(kind), targets, weights, weights if z else None)
        (grad,) = torch.autograd.grad(nll + 0.3 * z_sum, given)
        return nll.double(), grad.double()

    truth = run(linear_cross_entropy_reference, torch.float64)
    eager = run(linear_cross_entropy_reference, dtype)
    ours = run(op.linear_cross_entropy, dtype)
    for mine, theirs, right in zip(ours, eager, truth, strict=True):
        assert (mine - right).norm() <= 2 * (theirs - right).norm() + 1e-5 * right.norm()


def test_chunks_of_a_gpu() -> None:
    assert gpu_rows(128_256, 2) == 2048
    assert gpu_rows(1_000_000, 4) == 268
