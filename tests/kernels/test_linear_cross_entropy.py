"""The fused loss against an fp64 truth: at most twice eager's own distance, all gradients."""

from __future__ import annotations

import pytest
import torch

from glasstune.kernels.linear_cross_entropy import fused, op
from glasstune.kernels.linear_cross_entropy.reference import (
    linear_cross_entropy_reference,
    loss_rows_reference,
)

SHAPES = [(1, 8, 16), (7, 33, 129), (64, 32, 512), (130, 16, 1000)]


def problem(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    n, d, v = shape
    generator = torch.Generator().manual_seed(n)
    return {
        "hidden": torch.randn(n, d, generator=generator).to(dtype),
        "weight": (torch.randn(v, d, generator=generator) / d**0.5).to(dtype),
        "targets": torch.randint(0, v, (n,), generator=generator),
        "nll_weights": torch.rand(n, generator=generator),
        "z_weights": torch.rand(n, generator=generator),
    }


def run(function, data, dtype, z=True, upstream=(1.0, 0.3)):
    hidden = data["hidden"].to(dtype).detach().requires_grad_()
    weights = data["nll_weights"].to(dtype if dtype == torch.float64 else torch.float32)
    z_weights = data["z_weights"].to(weights.dtype) if z else None
    nll, z_sum = function(hidden, data["weight"].to(dtype), data["targets"], weights, z_weights)
    (upstream[0] * nll + upstream[1] * z_sum).backward()
    return nll.detach().double(), z_sum.detach().double(), hidden.grad.double()


def truth(data, z=True):
    """Cross-entropy and z-loss written out in fp64, independent of the code under test."""
    hidden = data["hidden"].double().requires_grad_()
    logits = torch.einsum("nd,vd->nv", hidden, data["weight"].double())
    log_z = logits.exp().sum(-1).log()
    nll = (
        (log_z - logits[torch.arange(len(logits)), data["targets"]]) * data["nll_weights"].double()
    ).sum()
    z_sum = (log_z**2 * data["z_weights"].double()).sum() if z else torch.zeros(()).double()
    (nll + 0.3 * z_sum).backward()
    return nll.detach(), z_sum.detach(), hidden.grad


def worse_than_twice(ours, eager, exact) -> bool:
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        scale = right.abs().max().clamp(min=1e-30)
        distance = (mine - right).abs().max() / scale
        allowed = 2 * (theirs - right).abs().max() / scale + 1e-6
        if distance > allowed:
            return True
    return False


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z", [True, False])
def test_fused_is_as_near_to_the_truth_as_eager(shape, dtype, z, monkeypatch) -> None:
    monkeypatch.setattr(op, "chunk_rows", lambda vocabulary: 5)
    data = problem(shape, dtype)
    ours = run(op.linear_cross_entropy, data, dtype, z)
    eager = run(linear_cross_entropy_reference, data, dtype, z)
    assert not worse_than_twice(ours, eager, truth(data, z))


@pytest.mark.parametrize("fault", ["scaled gradient", "dropped tail", "no target"])
def test_broken_copies_fail(fault, monkeypatch) -> None:
    data = problem((64, 32, 512), torch.float32)
    eager = run(linear_cross_entropy_reference, data, torch.float32)
    nll, z_sum, grad = run(op.linear_cross_entropy, data, torch.float32)
    if fault == "scaled gradient":
        grad = grad * 1.001
    elif fault == "dropped tail":
        grad = torch.cat([grad[:-1], torch.zeros_like(grad[-1:])])
    else:
        grad = grad + data["nll_weights"][:, None] * data["weight"][data["targets"]]
    assert worse_than_twice((nll, z_sum, grad), eager, truth(data))


def test_general_head_gives_its_own_gradient(monkeypatch) -> None:
    """A trained head with a bias and a soft cap, chunked, against autograd over all logits."""
    monkeypatch.setattr(op, "chunk_rows", lambda vocabulary: 7)
    data = problem((40, 16, 64), torch.float32)
    head = torch.nn.Linear(16, 64)

    def capped(hidden):
        return 3 * torch.tanh(head(hidden) / 3)

    hidden = data["hidden"].clone().requires_grad_()
    nll, z_sum = op.head_cross_entropy(
        hidden, capped, 64, data["targets"], data["nll_weights"], data["z_weights"]
    )
    (nll + z_sum).backward()
    mine = [hidden.grad.clone(), head.weight.grad.clone(), head.bias.grad.clone()]
    hidden.grad = head.weight.grad = head.bias.grad = None
    logits = capped(hidden)
    log_z = logits.logsumexp(-1)
    full = torch.nn.functional.cross_entropy(logits, data["targets"], reduction="none")
    ((full * data["nll_weights"]).sum() + (log_z**2 * data["z_weights"]).sum()).backward()
    for ours, right in zip(mine, [hidden.grad, head.weight.grad, head.bias.grad], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


def test_a_second_backward_gives_the_same_gradient() -> None:
    data = problem((20, 8, 50), torch.float32)
    hidden = data["hidden"].clone().requires_grad_()
    nll, _ = op.linear_cross_entropy(hidden, data["weight"], data["targets"], data["nll_weights"])
    (first,) = torch.autograd.grad(nll, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(nll, hidden)
    assert torch.equal(first, second)


def test_full_logits_are_never_made() -> None:
    """Rows of the largest product stay at the chunk's size whatever the number of positions."""
    rows = []
    original = torch.logsumexp
    data = problem((130, 16, 1000), torch.float32)

    def spy(logits, **kwargs):
        rows.append(logits.shape[0])
        return original(logits, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "chunk_rows", lambda vocabulary: 32)
        patch.setattr(fused.torch, "logsumexp", spy)
        op.linear_cross_entropy(
            data["hidden"], data["weight"], data["targets"], data["nll_weights"]
        )
    assert sum(rows) == 130
    assert max(rows) <= 32


def test_token_losses_agree_with_torch() -> None:
    data = problem((70, 16, 100), torch.float32)
    head = torch.nn.Linear(16, 100, bias=False)
    nll, correct = op.token_losses(data["hidden"], head, data["targets"], 100)
    logits = head(data["hidden"])
    right = torch.nn.functional.cross_entropy(logits, data["targets"], reduction="none")
    torch.testing.assert_close(nll, right)
    assert torch.equal(correct, logits.argmax(-1) == data["targets"])


def test_wrong_inputs_are_named() -> None:
    data = problem((4, 8, 16), torch.float32)
    weight = torch.nn.Parameter(data["weight"])
    with pytest.raises(ValueError, match="head is trained"):
        op.linear_cross_entropy(data["hidden"], weight, data["targets"], data["nll_weights"])
    with pytest.raises(ValueError, match="does not fit"):
        op.linear_cross_entropy(
            data["hidden"], data["weight"], data["targets"][:3], data["nll_weights"]
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_turn_into_their_gradient(shape, dtype) -> None:
    """The road of a GPU, with its row kernel written in torch."""

    def in_place(hidden, weight, targets, weights, z_weights):
        total, grad = fused.nll_in_place(
            hidden.detach(), weight, targets, weights, 5, True, loss_rows_reference
        )
        return (hidden * grad).sum() - (hidden.detach() * grad).sum() + total, torch.zeros(())

    data = problem(shape, dtype)
    ours = run(in_place, data, dtype, z=False)
    eager = run(linear_cross_entropy_reference, data, dtype, z=False)
    assert not worse_than_twice(ours, eager, truth(data, z=False))
    nll, z_sum, grad = ours
    dropped = torch.cat([grad[:-1], torch.zeros_like(grad[-1:])])
    assert worse_than_twice((nll, z_sum, dropped), eager, truth(data, z=False))
    if dtype == torch.float32:
        assert worse_than_twice((nll, z_sum, grad * 1.001), eager, truth(data, z=False))


def test_nothing_but_the_loss_without_a_gradient() -> None:
    data = problem((9, 8, 16), torch.float32)
    given = [data[name] for name in ("hidden", "weight", "targets", "nll_weights")]
    total, grad = fused.nll_in_place(*given, 4, False, loss_rows_reference)
    assert grad is None
    torch.testing.assert_close(total, linear_cross_entropy_reference(*given)[0])
