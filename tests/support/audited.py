"""Small modules and a training step for the tests of the gradient audit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glasstune.audit.gradient_audit import GradientAudit


class Net(nn.Module):
    """Embedding, three blocks, a head; every case of a lost gradient is a subclass of it."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.head = nn.Linear(width, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


IDS = torch.tensor([[1, 4, 2], [9, 0, 4]])


def losses(output: Tensor) -> dict[str, Tensor]:
    """Three losses that pull in different ways."""
    return {
        "square": output.square().mean(),
        "sum": -output.sum() / 7,
        "spread": output.exp().mean(),
    }


def weighted(output: Tensor, weights: Mapping[str, Any]) -> dict[str, tuple[Any, Tensor]]:
    """The losses that have a weight, as the audit takes them."""
    return {name: (weights[name], loss) for name, loss in losses(output).items() if name in weights}


WEIGHTS = {"square": 1.0, "sum": 0.25, "spread": 2.0}


def audit_step(
    model: nn.Module,
    forward: Callable[[nn.Module], Tensor] | None = None,
    weights: Mapping[str, Any] = WEIGHTS,
    **options: Any,
) -> GradientAudit:
    """One audited forward, terms and backward."""
    with GradientAudit(model, **options) as audit:
        output = (forward or (lambda module: module(IDS)))(model)
        audit.combine(weighted(output, weights)).backward()
    return audit
