"""NaN and Inf: counted, named, bracketed by the finite neighbours."""

from __future__ import annotations

import json
import math

import pytest
import torch
from audited import IDS, WEIGHTS, Net, audit_step, weighted
from torch import nn

from glasstune.audit.finite import bracket
from glasstune.audit.gradient_audit import GradientAudit


class Deep(nn.Module):
    """Six linear layers; one spoils its output, or its gradient."""

    def __init__(self, forward_at: int = -1, backward_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])
        self.forward_at, self.backward_at = forward_at, backward_at

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == self.backward_at:
                # sqrt at zero: the value is 0, the derivative infinite.
                x = x + torch.sqrt((x - x.detach()).abs()).sum() * 0
            if index + 1 == self.forward_at:
                x = x / 0
        return x


def step(model, x=None):
    with GradientAudit(model) as audit:
        y = model(torch.ones(2, 4) if x is None else x)
        audit.combine({"a": (1.0, y.square().mean()), "b": (2.0, y.sum())}).backward()
    return audit.report


def finding(report, code: str):
    (found,) = [item for item in report.findings if item.code == code]
    return found


def test_the_first_bad_output_has_its_neighbours() -> None:
    report = step(Deep(forward_at=3))
    found = finding(report, "first_nonfinite_output")
    assert found.where == "layers.3"
    assert "layers.2 before it is finite" in found.message
    assert "nothing after it is finite" in found.message


def test_the_first_bad_gradient_of_a_finite_forward() -> None:
    report = step(Deep(backward_at=2))
    assert "first_nonfinite_output" not in [item.code for item in report.findings]
    found = finding(report, "first_nonfinite_output_gradient")
    assert found.where == "layers.2"
    assert "layers.3 before it is finite" in found.message
    first = finding(report, "first_nonfinite_gradient")
    assert first.where.startswith("layers.2")
    assert "layers.3" in first.message
    assert report["layers.3.weight"].status == "ok"
    row = report["layers.2.bias"]
    assert row.status == "nonfinite"
    assert row.grad_after.nan == 4


def test_bracket() -> None:
    assert bracket([("a", True), ("b", True)]) is None
    found = bracket([("a", True), ("b", False), ("c", False), ("d", True)])
    assert (found.bad, found.before, found.after) == ("b", "a", "d")
    assert bracket([("a", False)]).text() == ("nothing comes before it, nothing after it is finite")


def test_nan_and_inf_are_counted() -> None:
    model = nn.Linear(3, 2, bias=False)
    with GradientAudit(model) as audit:
        y = model(torch.tensor([[1.0, float("inf"), float("nan")]]))
        audit.combine({"a": (1.0, y.sum())}).backward()
    grad = audit.report["weight"].grad_after
    assert (grad.nan, grad.inf) == (2, 2)
    assert grad.norm == pytest.approx(math.sqrt(2))
    assert grad.max_abs == 1
    assert audit.report["weight"].reason.code == "nonfinite"


def test_a_loss_that_is_not_finite_is_a_finding_and_no_refusal() -> None:
    model = Net()
    with GradientAudit(model) as audit:
        y = model(IDS)
        terms = {"good": (1.0, y.sum()), "bad": (1.0, (y.sum() * 0).log() * -1)}
        audit.combine(terms).backward()
    found = finding(audit.report, "loss_not_finite")
    assert (found.where, found.severity) == ("bad", "error")
    row = audit.report["head.weight"]
    assert row.status == "nonfinite"
    assert "from bad" in row.reason.text
    assert row.terms["good"].norm > 0
    content = json.dumps(audit.report.to_dict(), allow_nan=False)
    assert json.loads(content)["terms"][1]["value"] is None
    assert str(audit.report)


def test_a_weight_that_is_not_finite() -> None:
    report = audit_step(Net(), weights={"sum": float("nan")}).report
    assert finding(report, "weight_not_finite").where == "sum"
    assert report["head.weight"].status == "nonfinite"


def test_a_value_that_is_not_finite_already() -> None:
    model = Net()
    with torch.no_grad():
        model.layers[1].weight[0, 0] = float("nan")
    report = audit_step(model).report
    assert report["layers.1.weight"].value.nan == 1
    assert finding(report, "first_nonfinite_output").where == "layers.1"
    assert "its value does already" in report["layers.1.weight"].reason.text


def test_float16_overflow_is_found() -> None:
    class Half(Net):
        def forward(self, ids):
            x = self.embed(ids)
            x = self.layers[0](x)
            x = self.layers[1](x * 6e4)
            return self.head(self.layers[2](x))

    model = Half().half()
    with torch.no_grad():
        model.embed.weight.fill_(1.0)
        model.layers[0].weight.fill_(1.0)
    with GradientAudit(model) as audit:
        audit.combine({"a": (1.0, model(IDS).float().sum())}).backward()
    assert finding(audit.report, "first_nonfinite_output").where == "layers.1"


def test_masked_minus_inf_in_a_healthy_step_is_no_finding() -> None:
    class Masks(nn.Module):
        def forward(self, x):
            return x.masked_fill(x > 0.5, float("-inf"))

    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mask = Masks()

        def forward(self, ids):
            return self.mask(super().forward(ids)).softmax(-1)

    report = audit_step(Model()).report
    assert [item for item in report.findings if item.severity == "error"] == []


def test_looking_at_outputs_can_be_left_out() -> None:
    model = Deep(forward_at=3)
    with GradientAudit(model, activations=False) as audit:
        audit.combine({"a": (1.0, model(torch.ones(2, 4)).sum())}).backward()
    codes = [item.code for item in audit.report.findings]
    assert "first_nonfinite_output" not in codes
    assert "first_nonfinite_gradient" in codes


def test_huge_and_tiny_gradients_are_neither_inf_nor_zero() -> None:
    model = nn.Linear(2, 1, bias=False)
    for scale, norm in ((1e20, 1e20 * math.sqrt(2)), (1e-30, 1e-30 * math.sqrt(2))):
        model.zero_grad()
        with GradientAudit(model) as audit:
            audit.combine({"a": (1.0, model(torch.full((1, 2), scale)).sum())}).backward()
        row = audit.report["weight"]
        assert row.status == "ok"
        assert row.grad_after.norm == pytest.approx(norm, rel=1e-6)
        assert row.terms["a"].norm == pytest.approx(norm, rel=1e-6)
        assert row.terms["a"].share == pytest.approx(1)


def test_findings_come_worst_first() -> None:
    model = Net()
    model.spare = nn.Linear(2, 2)
    with GradientAudit(model) as audit:
        audit.combine(weighted(model(IDS) / 0, {**WEIGHTS, "sum": 0.0})).backward()
    rank = {"error": 0, "warning": 1, "info": 2}
    order = [rank[item.severity] for item in audit.report.findings]
    assert order == sorted(order)
    assert set(order) == {0, 1, 2}
