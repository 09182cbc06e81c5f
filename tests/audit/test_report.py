"""The report: the contract's record, text for small and large models, a data frame."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch
from audited import IDS, WEIGHTS, Net, audit_step, weighted
from torch import nn

from glasstune.audit.gradient_audit import GradientAudit
from glasstune.audit.report import AuditReport
from glasstune.core.errors import InputError

GRADIENT = {"norm", "max_abs", "zero_fraction", "nan", "inf"}


def test_the_record_has_the_contracts_names() -> None:
    model = Net()
    model.embed.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters())
    record = audit_step(model, optimizer=optimizer, step=7).report.to_dict()
    record = json.loads(json.dumps(record, allow_nan=False))
    assert record["step"] == 7
    assert {"terms", "parameters", "layers", "conflicts", "sum_check", "findings"} <= set(record)
    for term in record["terms"]:
        assert {"name", "weight", "sum", "count", "value"} <= set(term)
    names = {"name", "shape", "dtype", "requires_grad", "in_optimizer", "grad_before"}
    names |= {"grad_after", "status", "reason", "terms"}
    for row in record["parameters"]:
        assert names <= set(row)
        assert set(row["terms"]) == set(WEIGHTS)
        for found in row["terms"].values():
            assert {"reached", "norm", "share"} <= set(found)
    frozen, *others = record["parameters"]
    assert frozen["grad_after"] is None
    assert set(frozen["reason"]) == {"code", "text", "module", "line"}
    assert others[0]["grad_before"] is None
    assert set(others[0]["grad_after"]) == GRADIENT
    assert others[0]["reason"] is None
    assert others[0]["in_optimizer"] is True
    assert all({"layer", "gram"} <= set(layer) for layer in record["layers"])
    assert all(set(pair) == {"a", "b", "cosine"} for pair in record["conflicts"])
    for finding in record["findings"]:
        assert set(finding) == {"code", "severity", "where", "message", "fix"}


def test_text_of_a_small_model_lists_every_parameter() -> None:
    model = Net()
    model.spare = nn.Linear(2, 2)
    text = str(audit_step(model).report)
    for name, _ in model.named_parameters():
        assert f"\n{name} " in text
    line = next(line for line in text.splitlines() if line.startswith("head.weight"))
    assert line.split()[1:3] == ["4x6", "float32"]
    assert line.split()[4:6] == ["True", "None"]
    assert "not reached" in text
    assert "self-check" in text
    assert "spare.weight and 1 more: none (module_not_called)" in text
    for name in WEIGHTS:
        assert f"\n{name} " in text


class Big(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(32)])
        self.frozen = nn.ParameterList([nn.Parameter(torch.ones(2), False) for _ in range(50)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_text_of_a_large_model_is_one_line_a_layer() -> None:
    model = Big()
    report = audit_step(model, lambda m: m(torch.ones(2, 4)) * 1e-3).report
    text = report.text()
    assert len(text.splitlines()) < 70
    assert "\nlayers.31 " in text
    assert "layers.31.weight" not in text
    assert len(report.text(full=True).splitlines()) > 114
    matched = report.text(match="layers.3?.bias")
    assert "layers.31.bias" in matched
    assert "layers.30.weight" not in matched
    with pytest.raises(InputError) as caught:
        report.text(match="nothing*")
    assert caught.value.code == "no_match"


def test_values_print_the_tensors() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.25, -3.0]]))
    model.weight.grad = torch.tensor([[10.0, 20.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with GradientAudit(model, optimizer, keep=("gradients", "values")) as audit:
        audit.combine({"a": (1.0, model(torch.tensor([[1.0, 2.0]])).sum())}).backward()
        optimizer.step()
    text = audit.report.text(values=True)
    assert "value: tensor([[ 0.2500, -3.0000]])" in text
    assert "grad before backward: tensor([[10., 20.]])" in text
    assert "grad after backward: tensor([[11., 22.]])" in text
    assert "requires_grad: True" in text
    with pytest.raises(InputError) as caught:
        audit_step(Net()).report.text(values=True)
    assert caught.value.code == "values_not_kept"


def test_text_without_terms_and_without_backward() -> None:
    with GradientAudit(Net()) as audit:
        audit.model(IDS)
    text = str(audit.report)
    assert "no_backward" in text
    assert "self-check" not in text


def test_to_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = audit_step(Net()).report.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    row = frame.set_index("name").loc["head.weight"]
    assert row["shape"] == (4, 6)
    assert row["sum.reached"] is True or row["sum.reached"] == True  # noqa: E712 - numpy's bool
    assert row["grad_after.norm"] > 0
    assert pandas.isna(row["grad_before.norm"])


def test_to_frame_without_pandas_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    report = audit_step(Net()).report
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError) as caught:
        report.to_frame()
    assert caught.value.code == "missing_package"


def test_to_html_takes_a_renderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = audit_step(Net()).report
    monkeypatch.setattr(AuditReport, "html", None)
    with pytest.raises(InputError) as caught:
        report.to_html(tmp_path / "a.html")
    assert caught.value.code == "not_built"
    monkeypatch.setattr(AuditReport, "html", staticmethod(lambda record: str(len(record))))
    report.to_html(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text() == str(len(report.to_dict()))


def test_rows_and_cosines_by_name() -> None:
    report = audit_step(Net()).report
    assert report["head.bias"].layer == "head"
    assert report.cosines("head")[0][0] == pytest.approx(1)
    assert "9 parameters" in repr(report)


def test_unknown_is_printed_as_unknown() -> None:
    model = Net()
    with GradientAudit(model) as audit:
        audit.combine(weighted(model(IDS), WEIGHTS)).backward()
    row = audit.report["head.weight"]
    row.terms["sum"].reached = "unknown"
    assert "unknown (" in audit.report.text()
