"""The wide product against fp64 mathematics: forward and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import QUIET_COMPILER
from judged import too_far

from glasstune.kernels import lora_group as door
from glasstune.kernels.lora_group import Layout, fused
from glasstune.kernels.lora_group.reference import lora_group_reference, wide_reference

pytestmark = QUIET_COMPILER

# tokens, input features, output features and rank of each member
SHAPES = [
    (64, 64, (64, 16, 16), (8, 8, 8)),
    (1, 16, (8,), (4,)),
    (7, 33, (17, 5, 9), (3, 1, 8)),
    (12, 20, (6, 7, 8, 9), (2, 2, 2, 2)),
    (30, 40, (24, 24), (1, 1)),
    (24, 16, (40, 32), (8, 3)),  # each output at least twice as wide as the input: apart
    (9, 7, (33,), (4,)),
    (24, 40, (8, 7), (3, 8)),  # the input at least twice as wide as all outputs: narrows
    (9, 33, (7,), (4,)),
]


def problem(shape: Any, bias: bool, seed: int = 0) -> dict[str, Any]:
    tokens, width, outs, ranks = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * scale

    return {
        "x": draw(tokens, width),
        "weights": [draw(out, width, scale=width**-0.5) for out in outs],
        "biases": [draw(out) if bias else None for out in outs],
        "downs": [draw(rank, width, scale=width**-0.5) for rank in ranks],
        "ups": [draw(out, rank) for out, rank in zip(outs, ranks, strict=True)],
        "scales": [0.5 + index for index in range(len(outs))],
        "grads": [draw(tokens, out) for out in outs],
    }


def results(outs: Any, leaves: dict[str, torch.Tensor], grads: Any) -> dict[str, torch.Tensor]:
    loss = sum((out * grad.to(out.dtype)).sum() for out, grad in zip(outs, grads, strict=True))
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {
        **{f"y{index}": out.detach() for index, out in enumerate(outs)},
        **dict(zip(leaves, found, strict=True)),
    }


def leaves_of(data: dict[str, Any], x: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    leaves = {"x": x.detach().requires_grad_()}
    for index, (down, up) in enumerate(zip(data["downs"], data["ups"], strict=True)):
        leaves[f"a{index}"] = down.to(dtype).detach().clone().requires_grad_()
        leaves[f"b{index}"] = up.to(dtype).detach().clone().requires_grad_()
    return leaves


def pairs(leaves: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    return (
        [leaf for name, leaf in leaves.items() if name[0] == "a"],
        [leaf for name, leaf in leaves.items() if name[0] == "b"],
    )


def truth(data: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Written out in fp64; the base is what `dtype` can hold, the adapter is not rounded."""
    leaves = leaves_of(data, data["x"].to(dtype).double(), torch.float64)
    outs = []
    for index, weight in enumerate(data["weights"]):
        delta = leaves[f"b{index}"] @ leaves[f"a{index}"] * data["scales"][index]
        y = leaves["x"] @ (weight.to(dtype).double() + delta).T
        bias = data["biases"][index]
        outs.append(y if bias is None else y + bias.to(dtype).double())
    return results(outs, leaves, data["grads"])


def eager(data: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    leaves = leaves_of(data, data["x"].to(dtype), torch.float32)
    downs, ups = pairs(leaves)
    outs = lora_group_reference(
        leaves["x"],
        [weight.to(dtype) for weight in data["weights"]],
        [None if bias is None else bias.to(dtype) for bias in data["biases"]],
        downs,
        ups,
        data["scales"],
    )
    return results(outs, leaves, data["grads"])


def fast(data: dict[str, Any], dtype: torch.dtype, x: Any = None) -> dict[str, torch.Tensor]:
    leaves = leaves_of(data, data["x"].to(dtype) if x is None else x, torch.float32)
    downs, ups = pairs(leaves)
    layout = layout_of(data)
    wide = torch.zeros(layout.rows + layout.columns, layout.width + layout.columns, dtype=dtype)
    wide[: layout.rows, : layout.width] = torch.cat(data["weights"])
    door.write_adapters(wide, layout, downs, ups)
    biases = data["biases"]
    bias = None if biases[0] is None else torch.cat(biases).to(dtype)
    outs = door.lora_group(leaves["x"], wide, bias, layout, downs, ups)
    grads = [grad.view(*out.shape) for grad, out in zip(data["grads"], outs, strict=True)]
    return results(outs, leaves, grads)


def layout_of(data: dict[str, Any]) -> Layout:
    return Layout(
        data["x"].shape[1],
        tuple(weight.shape[0] for weight in data["weights"]),
        tuple(down.shape[0] for down in data["downs"]),
        tuple(data["scales"]),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_as_near_to_the_truth_as_eager(shape, dtype, bias) -> None:
    data = problem(shape, bias)
    assert not too_far(fast(data, dtype), eager(data, dtype), truth(data, dtype))


def test_strided_input_of_three_dimensions() -> None:
    data = problem((12, 20, (6, 7), (2, 3)), True)
    whole = torch.randn(4, 3, 50)
    x = whole[..., 5:25]  # rows are not adjacent
    x.copy_(data["x"].view(4, 3, 20))
    assert not x.is_contiguous()
    ours = fast(data, torch.float32, x)
    ours = {name: value.reshape(12, -1) if name[0] in "xy" else value
            for name, value in ours.items()}  # fmt: skip
    assert not too_far(ours, eager(data, torch.float32), truth(data, torch.float32))


def test_no_token_at_all() -> None:
    data = problem((4, 20, (6, 7), (2, 3)), False)
    data["x"], data["grads"] = data["x"][:0], [grad[:0] for grad in data["grads"]]
    found = fast(data, torch.float32)
    assert found["y0"].shape == (0, 6)
    assert float(found["b1"].abs().max()) == 0


FAULTS = ["scaled A", "scaled B", "dropped tail", "B without s", "members swapped", "dx without A",
          "y without B"]  # fmt: skip
WAYS = {
    "joined": (64, 64, (40, 40), (8, 8)),
    "apart": (64, 16, (40, 40), (8, 8)),
    "narrows": (64, 64, (16, 16), (8, 8)),
}


def test_the_shapes_reach_every_way() -> None:
    found = {name: layout_of(problem(shape, False)) for name, shape in WAYS.items()}
    assert {name: (layout.apart, layout.narrows) for name, layout in found.items()} == {
        "joined": (False, False),
        "apart": (True, False),
        "narrows": (False, True),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", FAULTS)
def test_broken_copies_fail(fault, way, monkeypatch) -> None:
    data = problem(WAYS[way], False)
    right, plain = fused.adapter_gradients, fast(data, torch.float32)
    assert not too_far(plain, eager(data, torch.float32), truth(data, torch.float32))

    def broken(grads, low_grad, x, low, layout, dtypes, needed, apart):
        if fault == "dropped tail":
            short = [grad[:-1] for grad in grads]
            return right(short, low_grad[:-1], x[:-1], low[:-1], layout, dtypes, needed, apart)
        found = right(grads, low_grad, x, low, layout, dtypes, needed, apart)
        if fault == "scaled A":
            found[0] = found[0] * 1.0001
        elif fault == "scaled B":
            found[3] = found[3] * 1.0001
        elif fault == "B without s":
            found[3] = found[3] / layout.scales[1]
        elif fault == "members swapped":
            found = found[2:] + found[:2]
        return found

    monkeypatch.setattr(fused, "adapter_gradients", broken)
    to_input, forward = fused.input_gradient, fused.forward_product

    def without_a(grads, wide, layout, needed):
        low = to_input(grads, wide, layout, needed)[1]
        bare = wide.clone()
        bare[layout.rows :, : layout.width] = 0
        return to_input(grads, bare, layout, needed)[0], low

    def without_b(x, wide, bias, layout):
        bare = wide.clone()
        bare[: layout.rows, layout.width :] = 0
        return forward(x, bare, bias, layout)

    if fault == "dx without A":
        monkeypatch.setattr(fused, "input_gradient", without_a)
    if fault == "y without B":
        monkeypatch.setattr(fused, "forward_product", without_b)
    assert too_far(
        fast(data, torch.float32), eager(data, torch.float32), truth(data, torch.float32)
    )


def test_frozen_tensors_get_no_gradient() -> None:
    data = problem((5, 8, (6, 7), (2, 3)), False)
    leaves = leaves_of(data, data["x"], torch.float32)
    downs, ups = pairs(leaves)
    layout = layout_of(data)
    wide = wide_reference(layout, data["weights"], downs, ups, torch.float32).detach()
    downs[0].requires_grad_(False)
    x = data["x"]
    outs = door.lora_group(x, wide, None, layout, downs, ups)
    sum(out.sum() for out in outs).backward()
    assert x.grad is None
    assert downs[0].grad is None
    assert all(tensor.grad is not None for tensor in (downs[1], *ups))


def test_written_adapters_are_the_definition() -> None:
    data = problem((4, 20, (6, 7), (2, 3)), False)
    layout = layout_of(data)
    want = wide_reference(layout, data["weights"], data["downs"], data["ups"], torch.bfloat16)
    got = want.clone()
    got[:, layout.width :] = 0
    got[layout.rows :, : layout.width] = 0
    door.write_adapters(got, layout, data["downs"], data["ups"])
    assert torch.equal(got, want)
    # s·B is rounded once: 0.7 of B, not 0.7 of the rounded B
    other = Layout(layout.width, layout.outs, layout.ranks, (0.7, 0.7))
    door.write_adapters(got, other, data["downs"], data["ups"])
    assert torch.equal(got[:6, 20:22], (data["ups"][0] * 0.7).bfloat16())


def test_a_second_backward_and_saved_tensors() -> None:
    data = problem((9, 8, (6,), (2,)), False)
    leaves = leaves_of(data, data["x"], torch.float32)
    downs, ups = pairs(leaves)
    layout = layout_of(data)
    wide = wide_reference(layout, data["weights"], downs, ups, torch.float32).detach()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        (y,) = door.lora_group(leaves["x"], wide, None, layout, downs, ups)
    shapes = sorted(tuple(t.shape) for t in kept)
    # x and x·Aᵀ are parts of one tensor.
    assert shapes == sorted([(9, 8), (9, 8), tuple(wide.shape), (2, 8), (6, 2)])
    assert len({t.untyped_storage().data_ptr() for t in kept}) == 4
    first = torch.autograd.grad(y.sum(), list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(y.sum(), list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_change_before_the_backward_is_an_error_as_in_torch() -> None:
    data = problem((9, 8, (6,), (2,)), False)
    leaves = leaves_of(data, data["x"], torch.float32)
    downs, ups = pairs(leaves)
    layout = layout_of(data)
    wide = wide_reference(layout, data["weights"], downs, ups, torch.float32).detach()
    (y,) = door.lora_group(leaves["x"], wide, None, layout, downs, ups)
    with torch.no_grad():
        ups[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_silent_second_derivative() -> None:
    data = problem((9, 8, (6,), (2,)), False)
    leaves = leaves_of(data, data["x"], torch.float32)
    downs, ups = pairs(leaves)
    layout = layout_of(data)
    wide = wide_reference(layout, data["weights"], downs, ups, torch.float32).detach()
    (y,) = door.lora_group(leaves["x"], wide, None, layout, downs, ups)
    (grad,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_wrong_inputs_are_named() -> None:
    layout = Layout(8, (6,), (2,), (1.0,))
    wide = torch.zeros(14, 16)
    down, up = torch.zeros(2, 8), torch.zeros(6, 2)
    with pytest.raises(ValueError, match=r"float32 \(14, 16\), not torch.bfloat16"):
        door.lora_group(torch.zeros(1, 8).bfloat16(), wide, None, layout, [down], [up])
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        door.lora_group(torch.zeros(1, 8), wide[:6, :8], None, layout, [down], [up])
    with pytest.raises(ValueError, match="members"):
        door.lora_group(torch.zeros(1, 8), wide, None, layout, [], [])


@pytest.mark.parametrize("bias", [False, True])
def test_the_frozen_product_alone(bias) -> None:
    data = problem((12, 20, (6, 7), (2, 3)), bias)
    x = data["x"].clone().requires_grad_()
    weight = torch.cat(data["weights"])
    joined = torch.cat(data["biases"]) if bias else None
    layout = layout_of(data).without_adapters()
    outs = door.base_group(x, weight, joined, layout)
    (mine,) = torch.autograd.grad(sum(out.square().sum() for out in outs), x)
    exact = data["x"].double().requires_grad_()
    y = exact @ weight.double().T + (joined.double() if joined is not None else 0)
    (right,) = torch.autograd.grad(y.square().sum(), exact)
    torch.testing.assert_close(torch.cat(outs, 1).double(), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(12, 20, (12, 7), (2, 3)), (12, 4, (8, 9), (2, 3)), (12, 30, (6, 7), (2, 3))],
    ids=["joined", "apart", "narrows"],
)
def test_under_torch_compile(needs_x, shape) -> None:
    data = problem(shape, True)
    layout = layout_of(data)
    leaves = leaves_of(data, data["x"], torch.float32)
    downs, ups = pairs(leaves)
    wide = wide_reference(layout, data["weights"], downs, ups, torch.float32).detach()
    bias = torch.cat(data["biases"])
    if not needs_x:
        leaves["x"] = leaves["x"].detach()

    def run(x):
        a, b = door.lora_group(x, wide, bias, layout, downs, ups)
        return a.square().sum() + (a[:, :6] * b[:, :6]).sum()

    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    plain = torch.autograd.grad(run(leaves["x"]), wanted)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)
    for mine, right in zip(torch.autograd.grad(compiled(leaves["x"]), wanted), plain, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
