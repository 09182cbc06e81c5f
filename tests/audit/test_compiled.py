"""Regions of torch.compile: unknown, never reached; the compiled code is left alone."""

from __future__ import annotations

import pytest
import torch
from audited import IDS, WEIGHTS, Net, audit_step, weighted
from torch import nn
from torch.utils.checkpoint import checkpoint

from glasstune.audit.gradient_audit import GradientAudit
from glasstune.audit.reach import walk

pytestmark = [
    # torch's own, for any compiled function with an input that is no leaf.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # torch 2.11's own, as its compiler is imported.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


class Block(nn.Module):
    """A module of its own: torch runs the frames of nn.Linear as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.inner(x))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Partly(Net):
    """The middle blocks are one compiled region, in which the second weight is detached."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.middle = nn.Module()
        self.middle.first, self.middle.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def run(x):
            m = self.middle
            x = torch.tanh(m.first(x))
            return torch.nn.functional.linear(x, m.second.weight.detach(), m.second.bias)

        self.run = torch.compile(run, backend=backend)

    def forward(self, ids):
        return self.head(self.run(self.layers[0](self.embed(ids))))


def test_inside_a_compiled_region_nothing_is_called_reached() -> None:
    model = Partly("aot_eager")
    audit = audit_step(model)
    report = audit.report
    inside = [row for row in report.parameters if row.name.startswith("middle")]
    assert all(row.terms["sum"].reached in ("unknown", False) for row in inside)
    assert report["middle.first.weight"].terms["sum"].reached == "unknown"
    assert report["middle.second.weight"].status == "none"
    assert report["middle.second.weight"].terms["sum"].reached is not True
    assert report["head.weight"].terms["sum"].reached is True
    # Before the region: the way leads through it.
    assert report["embed.weight"].terms["sum"].reached == "unknown"
    assert report["embed.weight"].status == "ok"
    assert report.sum_check < 1e-6
    assert "compiled_region" in [item.code for item in report.findings]
    plain = Partly("eager")
    plain.load_state_dict(model.state_dict())
    truth = audit_step(plain)
    torch.testing.assert_close(
        audit.gradient("spread", "middle.first.weight"),
        truth.gradient("spread", "middle.first.weight"),
    )


def test_a_compiled_region_beside_reentrant_checkpointing_stays_unknown() -> None:
    """A real backward a term tells what a checkpoint hides, not what a compiled region does."""

    class Both(Partly):
        def forward(self, ids):
            x = self.run(self.embed(ids))
            x = checkpoint(lambda x: torch.tanh(self.layers[0](x)), x, use_reentrant=True)
            return self.head(x)

    report = audit_step(Both("aot_eager")).report
    assert report.record.engine == "backward"
    assert report["layers.0.weight"].terms["sum"].reached is True
    assert report["middle.first.weight"].terms["sum"].reached == "unknown"
    assert report["middle.first.weight"].terms["sum"].norm > 0
    assert report["middle.second.weight"].terms["sum"].reached is False
    assert report.sum_check < 1e-6


def test_the_eager_backend_leaves_an_ordinary_graph() -> None:
    report = audit_step(Partly("eager")).report
    assert report["middle.first.weight"].terms["sum"].reached is True
    assert report["middle.second.weight"].terms["sum"].reached is False
    assert report["middle.second.weight"].status == "none"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["wrapped", "in place", "forward", "child"])
def test_a_compiled_module_gives_no_wrong_reasons(backend: str, how: str) -> None:
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(6, 6)
            self.layers[1] = Block()

    model: nn.Module = Spare()
    prefix = ""
    if how == "wrapped":
        model, prefix = torch.compile(model, backend=backend), "_orig_mod."
    elif how == "in place":
        model.compile(backend=backend)
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend=backend)
    else:
        model.layers[1].compile(backend=backend)
    for _ in range(2):  # the second time it is compiled already
        model.zero_grad()
        report = audit_step(model).report
        assert report.sum_check < 1e-6
        row = report[f"{prefix}spare.weight"]
        assert row.status == "none"
        expected = "module_not_called" if how == "child" else "inside_compiled_region"
        assert row.reason.code == expected
        for name in ("embed.weight", "layers.1.inner.weight", "head.bias"):
            assert report[prefix + name].status == "ok"
        if backend == "aot_eager":
            assert report[f"{prefix}layers.1.inner.weight"].terms["sum"].reached == "unknown"


def test_compiled_from_outside_is_not_taken_for_uncalled() -> None:
    """A compiled function that calls the model: hooks stand aside, or are not seen."""
    model = Net()
    model.spare = nn.Linear(2, 2)
    run = torch.compile(lambda ids: model(ids), backend="aot_eager", fullgraph=True)
    expected = run(IDS).detach()
    for _ in range(2):
        report = audit_step(model, lambda _: run(IDS)).report
        assert report["spare.weight"].reason.code == "inside_compiled_region"
        assert report["head.weight"].status == "ok"
        assert report.sum_check < 1e-6
        assert torch.equal(run(IDS), expected)


def test_auditing_does_not_compile_again() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = torch.compile(Net(), backend=counter)
    model(IDS)
    frames = counter.frame_count
    audit_step(model)
    model(IDS)
    assert counter.frame_count == frames


def test_buffers_given_away_are_reported_and_training_goes_on(monkeypatch) -> None:
    """Inductor's regions may refuse a second pass: the terms cannot be split, the step can run."""
    from glasstune.audit import engine

    def refuses(*args, **kwargs):
        raise RuntimeError(
            "This backward function was compiled with non-empty donated buffers which requires "
            "create_graph=False and retain_graph=False."
        )

    monkeypatch.setattr(torch.autograd, "grad", refuses)
    assert engine.torch.autograd.grad is refuses
    model = Net()
    with GradientAudit(model) as audit:
        audit.combine(weighted(model(IDS), WEIGHTS)).backward()
    report = audit.report
    assert report.record.engine == "unknown"
    assert report["head.weight"].status == "ok"
    assert report["head.weight"].terms["sum"].norm is None
    assert report.sum_check is None
    (finding,) = [item for item in report.findings if item.code == "terms_not_split"]
    assert "donated_buffer" in finding.message
    assert str(report)


def test_walk() -> None:
    model = Net()
    output = model(IDS)
    reach = walk([output[0].sum(), torch.ones(())])
    assert all(reach.reaches(parameter) is True for parameter in model.parameters())
    assert reach.reaches(torch.ones(2, requires_grad=True)) is False
    leaf = torch.ones((), requires_grad=True)
    assert walk([leaf]).reaches(leaf) is True
