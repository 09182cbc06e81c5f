"""The gate where several ranks share an update: a module that ran on one of them has run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glasstune.audit.gate import FirstStepGate


class Two(nn.Module):
    """An expert of which this rank's rows need one."""

    def __init__(self) -> None:
        super().__init__()
        self.mine, self.theirs = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.mine(x)


class Other:
    """The other rank, whose rows need the other expert."""

    rank, size = 0, 2

    def __init__(self, called: list[str]) -> None:
        self.called = called

    def gather(self, value: Any) -> list[Any]:
        return [value, (self.called, {"next_token"})]

    def sum_tensors(self, tensors: Any) -> list[Tensor]:
        return list(tensors)


def judged(called: list[str], *, gradient: bool) -> tuple[list[Any], FirstStepGate]:
    torch.manual_seed(0)
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gate = FirstStepGate(model, exchange=Other(called))
    found: list[Any] = []
    for step in (1, 2, 3):
        gate.before_update(step)
        loss = model(torch.ones(2, 3)).square().sum()
        gate.before_backward(step, {"next_token": (1.0, loss)}, None)  # type: ignore[arg-type]
        loss.backward()
        if gradient:  # as the sum over ranks brings it
            for value in model.theirs.parameters():
                value.grad = torch.ones_like(value)
        gate.after_backward(step, model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        found += gate.after_update(step, model, 0.1)
    return found, gate


def test_an_expert_that_ran_elsewhere_is_judged_there_and_here() -> None:
    found, gate = judged(["theirs.weight", "theirs.bias"], gradient=True)
    assert found == []
    assert gate.done


def test_an_expert_that_ran_elsewhere_and_is_dead_stops_every_rank() -> None:
    found, _ = judged(["theirs.weight", "theirs.bias"], gradient=False)
    assert {item.where for item in found if item.severity == "error"} == {
        "theirs.weight", "theirs.bias",
    }  # fmt: skip


def test_an_expert_that_ran_nowhere_is_waited_for() -> None:
    found, gate = judged([], gradient=False)
    assert {item.code for item in found} == {"gate_not_called"}
    assert not gate.done
