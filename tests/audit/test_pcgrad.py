"""The code of docs/PCGRAD.md against the paper's formula and an answer worked by hand."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from glasstune.audit.gradient_audit import GradientAudit

PAGE = (Path(__file__).parents[2] / "docs" / "PCGRAD.md").read_text(encoding="utf-8")
CODE, STEP = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def page() -> dict:
    names: dict = {}
    exec(compile(CODE, "docs/PCGRAD.md", "exec"), names)
    return names


class Toy(nn.Module):
    """Two parameters in two modules, so that a surgery by module would give another answer."""

    def __init__(self, x: float, y: float) -> None:
        super().__init__()
        self.a, self.b = nn.Module(), nn.Module()
        self.a.x = nn.Parameter(torch.tensor([x], dtype=torch.float64))
        self.b.y = nn.Parameter(torch.tensor([y], dtype=torch.float64))

    def forward(self):
        return torch.cat([self.a.x, self.b.y])


def test_the_page_is_about_twenty_lines() -> None:
    lines = [line for line in CODE.splitlines() if line.strip()]
    assert len(lines) <= 24


def test_a_hand_worked_answer() -> None:
    """g1 = (1, 0), g2 = (-1, 1), so g1·g2 = -1.

    g1' = g1 + 1/2 g2 = (1/2, 1/2); g2' = g2 + 1/1 g1 = (0, 1); the update is (1/2, 3/2).
    """
    model = Toy(0.0, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    names = page() | {
        "GradientAudit": GradientAudit,
        "model": lambda inputs: model(),
        "optimizer": optimizer,
        "inputs": None,
        "first_loss": lambda p: p[0],
        "second_loss": lambda p: p[1] - p[0],
    }
    step = STEP.replace("GradientAudit(model,", "GradientAudit(toy,").replace(
        "write_pcgrad(model,", "write_pcgrad(toy,"
    )
    exec(compile(step, "docs/PCGRAD.md", "exec"), names | {"toy": model})
    assert model.a.x.grad.tolist() == [0.5]
    assert model.b.y.grad.tolist() == [1.5]
    assert (model.a.x.item(), model.b.y.item()) == (-0.5, -1.5)


def by_the_paper(gradients: list[torch.Tensor], orders: list[list[int]]) -> torch.Tensor:
    """Algorithm 1 on flat vectors, as written there."""
    result = []
    for i, own in enumerate(gradients):
        g = own.clone()
        for j in orders[i]:
            if torch.dot(g, gradients[j]) < 0:
                g = g - torch.dot(g, gradients[j]) / gradients[j].norm() ** 2 * gradients[j]
        result.append(g)
    return torch.stack(result).sum(dim=0)


@pytest.mark.parametrize("seed", range(20))
def test_the_papers_formula_on_a_network(seed: int) -> None:
    names = page()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, target = torch.randn(8, 5).double(), torch.randn(3, 8, 3).double()
    terms = ["one", "two", "three"]

    def losses():
        y = model(x)
        return [(y - target[k]).pow(2).mean() + (k - 1) * y.sum() for k in range(3)]

    flat = [
        torch.cat([g.flatten() for g in torch.autograd.grad(losses()[k], list(model.parameters()))])
        for k in range(3)
    ]
    rng = random.Random(seed)
    orders = [rng.sample([j for j in range(3) if j != i], 2) for i in range(3)]
    with GradientAudit(model) as audit:
        audit.terms({name: (1.0, loss) for name, loss in zip(terms, losses(), strict=True)})
    again = iter(orders)
    factors = names["pcgrad_factors"]
    names["pcgrad_factors"] = lambda gram: factors(gram, order=lambda others, k: next(again))
    names["write_pcgrad"](model, audit, terms)
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    expected = by_the_paper(flat, orders)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    conflicts = any(torch.dot(a, b) < 0 for a in flat for b in flat)
    assert conflicts is not torch.equal(expected, torch.stack(flat).sum(dim=0))


def test_terms_on_disjoint_parameters_are_left_alone() -> None:
    names = page()
    model = Toy(1.0, 2.0)
    with GradientAudit(model) as audit:
        p = model()
        audit.terms({"x": (1.0, model.a.x.square().sum()), "y": (1.0, 3 * p[1])})
    names["write_pcgrad"](model, audit, ["x", "y"])
    assert model.a.x.grad.tolist() == [2.0]
    assert model.b.y.grad.tolist() == [3.0]
