"""Records of real gradient audits, for tests of the page."""

from __future__ import annotations

import copy
from functools import cache
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


def losses(out: torch.Tensor, name: str = "loss2") -> dict[str, tuple[float, torch.Tensor]]:
    """Three terms; the second works against the first."""
    first = (out**2).mean()
    return {"loss0": (1.0, first), "loss1": (0.25, -first), name: (0.5, out.abs().mean())}


def audited(name: str = "loss2") -> Any:
    """The report of one step with three terms."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with gt.GradientAudit(model, optimizer=optimizer, step=7) as audit:
        terms = losses(model(torch.randn(3, 4)), name)
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


@cache
def _adapted() -> dict[str, Any]:
    """A real audit of a one-layer model with LoRA on seven modules, at step 0."""
    from peft import LoraConfig, get_peft_model
    from tiny import tiny_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config("llama"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    ids = torch.randint(0, 64, (2, 8))
    with gt.GradientAudit(model, step=1) as audit:
        out = model(input_ids=ids, labels=ids)
        terms = {
            "next_token": (1.0, out.loss),
            "z_loss": (0.01, torch.logsumexp(out.logits, -1).square().mean()),
            "entropy": (-0.1, out.logits.softmax(-1).square().sum(-1).mean()),
        }
        audit.terms(terms)
        torch.stack([weight * value for weight, value in terms.values()]).sum().backward()
    record: dict[str, Any] = audit.report.to_dict()
    return record


def adapters_record(layers: int = 32) -> dict[str, Any]:
    """That audit with its first layer repeated: 32 layers with 14 adapter tensors each."""
    record = copy.deepcopy(_adapted())
    rows, grams = record["parameters"], record["layers"]
    first = [row for row in rows if ".layers.0." in row["name"]]
    others = [row for row in rows if ".layers." not in row["name"]]
    gram = next(layer for layer in grams if layer["layer"].endswith(".layers.0"))

    def numbered(value: Any, index: int) -> Any:
        return value.replace(".layers.0", f".layers.{index}")

    record["parameters"] = others[:1] + [
        {**row, "name": numbered(row["name"], index), "layer": numbered(row["layer"], index)}
        for index in range(layers)
        for row in first
    ] + others[1:]  # fmt: skip
    record["layers"] = [
        {**gram, "layer": numbered(gram["layer"], index)} for index in range(layers)
    ]
    return record
