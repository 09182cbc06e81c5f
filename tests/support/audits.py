"""Records of real gradient audits, for tests of the page."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import glasstune as gt


class Net(nn.Module):
    """Two blocks that learn, one that is detached, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.cut = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.frozen(x) + self.cut(x).detach()


def audited(name: str = "loss2") -> Any:
    """The report of one step with three terms; the second works against the first."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with gt.GradientAudit(model, optimizer=optimizer, step=7) as audit:
        out = model(torch.randn(3, 4))
        first = (out**2).mean()
        terms = {"loss0": (1.0, first), "loss1": (0.25, -first), name: (0.5, out.abs().mean())}
        audit.terms(terms)
        torch.stack([weight * value for weight, value in terms.values()]).sum().backward()
    return audit.report


def history(updates: int = 30) -> list[dict[str, Any]]:
    """Rows as a run's `audit.jsonl` has them."""
    record = audited().to_dict()
    rows: list[dict[str, Any]] = []
    for step in range(1, updates + 1):
        layers = {"blocks.0": 1.0 / step, "blocks.1": 0.5 + 0.01 * step}
        rows.append({"event": "norms", "step": step, "norm": 2.0 / step, "layers": layers})
        if step % 10 == 0:
            rows.append({**record, "event": "audit", "step": step})
    return rows
