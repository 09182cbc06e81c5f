"""Expansion of packed weights: bitsandbytes' own bits, the wide product on top, nothing kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import QUIET_COMPILER
from judged import too_far

from glasstune.kernels.expand import Packed4bit, PackedInt8
from glasstune.kernels.int8_linear.reference import quantize_rows
from glasstune.kernels.lora_group import Layout, base_group, lora_group
from glasstune.kernels.lora_group.reference import lora_group_reference

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional
pytestmark = QUIET_COMPILER

# rows of each member, width: whole blocks, blocks across rows, an odd width, one odd row,
# more than one block of 256 blocks
SHAPES = [
    ((64, 32), 128),
    ((6, 10), 40),
    ((7, 9), 33),
    ((1,), 5),
    ((3, 4, 5, 6), 66),
    ((199, 170), 101),
]


def weights_of(outs: tuple[int, ...], width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(outs) + width)
    return [torch.randn(out, width, generator=generator) / width**0.5 for out in outs]


def pack(weights: list[torch.Tensor], kind: str, nested: bool, block: int = 64) -> Any:
    """Returns our packed group and each weight as bitsandbytes expands it, float32."""
    made = [
        functional.quantize_4bit(
            weight, blocksize=block, compress_statistics=nested, quant_type=kind
        )
        for weight in weights
    ]
    states = [state for _, state in made]
    packed = Packed4bit(
        [data for data, _ in made],
        [state.absmax for state in states],
        [state.state2.code for state in states] if nested else [],
        [state.state2.absmax for state in states] if nested else [],
        [state.offset for state in states] if nested else [],
        states[0].code,
        block,
    )
    return packed, [functional.dequantize_4bit(data, state) for data, state in made]


def pack_int8(weights: list[torch.Tensor]) -> Any:
    rows = [quantize_rows(weight) for weight in weights]
    packed = PackedInt8([q for q, _ in rows], [scale for _, scale in rows])
    return packed, [q.float() * (scale / 127)[:, None] for q, scale in rows]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_4_bit_is_bitsandbytes_bit_for_bit(shape, kind, nested, dtype) -> None:
    outs, width = shape
    packed, want = pack(weights_of(outs, width), kind, nested)
    layout = Layout(width, outs, (), ())
    got = packed.expand(layout, [], [], dtype, [])
    assert torch.equal(got, torch.cat(want).to(dtype))


@pytest.mark.parametrize("block", [32, 128, 4096])
def test_other_block_sizes(block) -> None:
    packed, want = pack(weights_of((20, 30), 50), "nf4", True, block)
    got = packed.expand(Layout(50, (20, 30), (), ()), [], [], torch.float32, [])
    assert torch.equal(got, torch.cat(want))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_the_rows_own_value(shape) -> None:
    outs, width = shape
    packed, want = pack_int8(weights_of(outs, width))
    got = packed.expand(Layout(width, outs, (), ()), [], [], torch.float32, [])
    assert torch.equal(got, torch.cat(want))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_frame_holds_the_adapters(bits) -> None:
    weights = weights_of((6, 10), 40)
    packed, want = pack(weights, "nf4", True) if bits == 4 else pack_int8(weights)
    downs = [torch.randn(3, 40), torch.randn(2, 40)]
    ups = [torch.randn(6, 3), torch.randn(10, 2)]
    got = packed.expand(Layout(40, (6, 10), (3, 2), (2.0, 0.5)), downs, ups, torch.float32, [])
    assert got.shape == (24, 48)
    right = torch.zeros(24, 48)
    right[:16, :40] = torch.cat(want)
    right[16:19, :40], right[19:21, :40] = downs
    right[:6, 40:43], right[6:16, 43:45] = ups[0] * 2, ups[1] * 0.5
    got[16:, 40:] = 0  # never read
    assert torch.equal(got, right)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_product_as_near_to_the_truth_as_eager(bits, dtype, shape) -> None:
    outs, width = shape
    weights = weights_of(outs, width)
    packed, expanded = pack(weights, "nf4", True) if bits == 4 else pack_int8(weights)
    ranks, scales = (3, 2), (2.0, 0.5)
    x = torch.randn(11, width)
    downs = [torch.randn(rank, width) / width**0.5 for rank in ranks]
    ups = [torch.randn(out, rank) for out, rank in zip(outs, ranks, strict=True)]
    grads = [torch.randn(11, out) for out in outs]

    def run(kind: torch.dtype, masters: torch.dtype, way: str) -> dict[str, torch.Tensor]:
        leaves = [x.to(dtype).to(kind), *(t.to(masters) for t in (*downs, *ups))]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        a, b = leaves[1:3], leaves[3:]
        if way == "fast":
            layout = Layout(width, outs, ranks, scales)
            ys = lora_group(leaves[0], packed, None, layout, a, b)
        else:
            base = [weight.to(dtype).to(kind) for weight in expanded]
            ys = lora_group_reference(leaves[0], base, [None] * 2, a, b, scales)
        loss = sum((y * grad.to(y.dtype)).sum() for y, grad in zip(ys, grads, strict=True))
        found = torch.autograd.grad(loss, leaves)
        names = ["x", "a0", "a1", "b0", "b1"]
        return {**{f"y{i}": y.detach() for i, y in enumerate(ys)},
                **dict(zip(names, found, strict=True))}  # fmt: skip

    truth = run(torch.float64, torch.float64, "eager")
    eager = run(dtype, torch.float32, "eager")
    ours = run(dtype, torch.float32, "fast")
    assert not too_far(ours, eager, truth)
    if dtype == torch.float32:
        for name in ours:
            broken = {**ours, name: ours[name] * 1.0001}
            assert list(too_far(broken, eager, truth)) == [name]


def test_the_frozen_product_of_packed_weights() -> None:
    packed, want = pack(weights_of((6, 10), 40), "nf4", True)
    x = torch.randn(5, 40, requires_grad=True)
    outs = base_group(x, packed, None, Layout(40, (6, 10), (), ()))
    (mine,) = torch.autograd.grad(sum(out.square().sum() for out in outs), x)
    weight = torch.cat(want)
    torch.testing.assert_close(torch.cat(outs, 1), x @ weight.T)
    torch.testing.assert_close(mine, 2 * (x @ weight.T) @ weight)


def case(bits: int) -> tuple[Any, Any, list[torch.Tensor]]:
    weights = weights_of((96, 160), 64)
    packed, _ = pack(weights, "nf4", True) if bits == 4 else pack_int8(weights)
    downs = [torch.randn(2, 64, requires_grad=True) for _ in range(2)]
    ups = [torch.randn(out, 2, requires_grad=True) for out in (96, 160)]
    layout = Layout(64, (96, 160), (2, 2), (2.0, 2.0))

    def run(x: torch.Tensor) -> torch.Tensor:
        a, b = lora_group(x, packed, None, layout, downs, ups)
        return (a * b[:, :96]).sum()

    return run, packed, [*downs, *ups]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("budget", [1.0, 0.3])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_expanded_weight_is_kept(bits, budget, compiled) -> None:
    """Neither eagerly nor by a compiler that merges equal calls and chooses what to save."""
    from torch._functorch import config

    run, _, leaves = case(bits)
    x = torch.randn(7, 64, requires_grad=True)
    want = torch.autograd.grad(run(x), [x, *leaves])
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)
    kept = []
    with (
        config.patch(activation_memory_budget=budget),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        loss = run(x)
    wide = 256 * 64
    assert kept
    assert all(tensor.numel() < wide or not tensor.is_floating_point() for tensor in kept)
    got = torch.autograd.grad(loss, [x, *leaves])
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_a_kept_weight_would_be_seen(monkeypatch) -> None:
    """The test above must be able to fail: without `after` the two expansions are one."""
    from glasstune.kernels.lora_group import fused

    run, packed, leaves = case(8)
    expand = type(packed).expand
    monkeypatch.setattr(type(packed), "expand", lambda s, *args: expand(s, *args[:-1], []))
    assert fused.GroupProduct is not None
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compiled(torch.randn(7, 64, requires_grad=True))
    assert leaves
    assert any(tensor.numel() > 256 * 64 and tensor.is_floating_point() for tensor in kept)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_compilers_view_of_the_ops_is_the_real_one(bits) -> None:
    weights = weights_of((6, 10), 40)
    packed, _ = pack(weights, "nf4", True) if bits == 4 else pack_int8(weights)
    downs = [torch.randn(3, 40), torch.randn(2, 40)]
    ups = [torch.randn(6, 3), torch.randn(10, 2)]
    rest = (downs, ups, [2.0, 0.5], [6, 10], 40, torch.bfloat16, [])
    parts = [getattr(packed, name) for name in type(packed).__slots__]
    op = getattr(torch.ops.glasstune, "expand_4bit" if bits == 4 else "expand_int8").default
    torch.library.opcheck(op, (*parts, *rest), test_utils="test_faketensor")
