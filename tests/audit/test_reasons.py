"""The decision list: a test for each way in which a gradient is lost, and for the healthy ones."""

from __future__ import annotations

import inspect

import pytest
import torch
from audited import IDS, WEIGHTS, Net, audit_step, weighted
from torch import nn
from torch.utils.checkpoint import checkpoint

from glasstune.audit.gradient_audit import GradientAudit
from glasstune.core.errors import InputError


def reason(report, name: str):
    row = report[name]
    return row.status, row.reason.code, row.reason.module


def line_of(function, text: str) -> str:
    """`file.py:12` of the line of a function that holds a text."""
    lines, start = inspect.getsourcelines(function)
    offset = next(index for index, line in enumerate(lines) if text in line)
    return f"{inspect.getsourcefile(function)}:{start + offset}"


def others_are_ok(report, *lost: str) -> None:
    for row in report.parameters:
        if not row.name.startswith(lost):
            assert row.status == "ok", row


def test_a_healthy_model_has_no_reasons() -> None:
    report = audit_step(Net()).report
    assert {row.status for row in report.parameters} == {"ok"}
    assert [f for f in report.findings if f.severity != "info"] == []


def test_frozen_by_the_user() -> None:
    model = Net()
    model.embed.requires_grad_(False)
    report = audit_step(model).report
    assert reason(report, "embed.weight") == ("frozen", "frozen", "embed")
    assert report["embed.weight"].value.norm == pytest.approx(model.embed.weight.norm().item())
    others_are_ok(report, "embed")
    assert [f for f in report.findings if f.severity == "error"] == []


def test_a_packed_weight() -> None:
    model = Net()
    model.packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    report = audit_step(model).report
    assert reason(report, "packed")[:2] == ("frozen", "packed")
    assert report["packed"].value is None


def test_not_a_leaf() -> None:
    """A learner that keeps its updated weights in place of parameters."""
    model = Net()
    root = model.head.weight
    del model.head.weight
    model.head.__dict__.pop("weight", None)
    model.head._parameters["weight"] = root * 1.0
    report = audit_step(model).report
    assert reason(report, "head.weight") == ("none", "not_a_leaf", "head")
    assert "MulBackward" in report["head.weight"].reason.text
    assert report["head.weight"].terms["sum"].reached is True
    assert report["head.weight"].terms["sum"].norm > 0
    assert root.grad is not None


def test_the_loss_has_no_graph_under_no_grad() -> None:
    model = Net()
    audit = GradientAudit(model)

    def step() -> None:
        with audit:
            with torch.no_grad():
                output = model(IDS)
            audit.terms({"sum": (1.0, output.sum())})

    with pytest.raises(InputError) as refused:
        step()
    assert refused.value.code == "loss_without_graph"
    assert "'sum'" in refused.value.message
    assert "no_grad" in refused.value.message
    row = audit.report["head.weight"]
    assert (row.status, row.reason.code) == ("none", "loss_without_graph")
    assert "no_grad" in row.reason.text


def test_the_loss_has_no_graph_and_no_terms_were_given() -> None:
    model = Net()
    audit = GradientAudit(model)

    def step() -> None:
        with audit:
            with torch.inference_mode():
                output = model(IDS)
            output.sum().backward()

    with pytest.raises(RuntimeError, match="does not require grad"):
        step()
    assert audit.report["head.weight"].reason.code == "loss_without_graph"
    assert "inference_mode" in audit.report["head.weight"].reason.text


class Reentrant(Net):
    """Frozen embedding, blocks in reentrant checkpoints, a trained head outside."""

    def __init__(self, needs_input_grad: bool = False) -> None:
        super().__init__()
        self.embed.requires_grad_(False)
        self.needs_input_grad = needs_input_grad

    def block(self, x, layer):
        return torch.tanh(layer(x))

    def forward(self, ids):
        x = self.embed(ids)
        if self.needs_input_grad:
            x.requires_grad_(True)
        for layer in self.layers:
            x = checkpoint(self.block, x, layer, use_reentrant=True)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_g02_reentrant_checkpointing_without_input_gradients() -> None:
    model = Reentrant()
    report = audit_step(model).report
    for index in range(3):
        assert reason(report, f"layers.{index}.weight") == (
            "none", "reentrant_without_input_gradient", f"layers.{index}",
        )  # fmt: skip
        assert report[f"layers.{index}.weight"].reason.line == line_of(Reentrant.block, "layer(x)")
        assert report[f"layers.{index}.weight"].terms["sum"].reached is False
    others_are_ok(report, "layers", "embed")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_g01_reentrant_checkpointing_leaves_no_graph_at_all() -> None:
    model = Reentrant()
    model.head.requires_grad_(False)
    audit = GradientAudit(model)
    with pytest.raises(InputError) as refused, audit:
        audit.terms(weighted(model(IDS), WEIGHTS))
    assert "enable_input_require_grads" in refused.value.message
    assert audit.report["layers.0.weight"].reason.code == "loss_without_graph"


def test_reentrant_checkpointing_that_works() -> None:
    model = Reentrant(needs_input_grad=True)
    audit = audit_step(model)
    others_are_ok(audit.report, "embed")
    assert audit.report.record.engine == "backward"
    plain = Net()
    plain.embed.requires_grad_(False)
    truth = audit_step(plain)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert audit.report[name].terms["spread"].reached is True
            torch.testing.assert_close(
                audit.gradient("spread", name), truth.gradient("spread", name)
            )
    assert audit.report.sum_check < 1e-6


@pytest.mark.parametrize("with_terms", [True, False])
def test_lost_inside_a_reentrant_region(with_terms: bool) -> None:
    class Loses(Reentrant):
        def block(self, x, layer):
            return x + (layer(x).detach() if layer is self.layers[1] else layer(x))

    model = Loses(needs_input_grad=True)
    with GradientAudit(model) as audit:
        output = model(IDS)
        loss = output.square().sum()
        if with_terms:
            audit.terms({"square": (1.0, loss)})
        loss.backward()
    assert reason(audit.report, "layers.1.weight") == (
        "none", "lost_in_reentrant_checkpoint", "layers.1",
    )  # fmt: skip
    others_are_ok(audit.report, "layers.1", "embed")


def test_inside_reentrant_checkpointing_it_is_unknown_until_a_backward() -> None:
    model = Reentrant(needs_input_grad=True)
    with GradientAudit(model) as audit:
        model(IDS).sum()
    assert audit.report["layers.1.weight"].reason.code == "no_backward"
    from glasstune.audit.reach import walk

    reach = walk([model(IDS).sum()])
    assert reach.reaches(model.layers[1].weight) == "unknown"
    assert reach.reaches(model.head.weight) is True


@pytest.mark.parametrize("to_none", [True, False])
def test_consumed_after_it_was_reached(to_none: bool) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters())
    with GradientAudit(model, optimizer) as audit:
        audit.combine(weighted(model(IDS), WEIGHTS)).backward()
        norm = model.head.weight.grad.norm().item()
        optimizer.zero_grad(set_to_none=to_none)
    row = audit.report["head.weight"]
    assert (row.status, row.reason.code) == ("none" if to_none else "zero", "consumed")
    assert row.increment.norm == pytest.approx(norm)
    assert (row.grad_after is None) is to_none


def test_zero_grad_before_the_backward_is_healthy() -> None:
    model = Net()
    model(IDS).sum().backward()
    optimizer = torch.optim.SGD(model.parameters())
    with GradientAudit(model, optimizer) as audit:
        optimizer.zero_grad()
        audit.combine(weighted(model(IDS), WEIGHTS)).backward()
    assert audit.report["head.weight"].status == "ok"
    assert audit.report["head.weight"].grad_before is None


def test_no_backward() -> None:
    model = Net()
    with GradientAudit(model) as audit:
        audit.terms(weighted(model(IDS), WEIGHTS))
    row = audit.report["head.weight"]
    assert (row.status, row.reason.code) == ("none", "no_backward")
    assert row.terms["sum"].reached is True
    assert audit.report.sum_check is None


def test_a_stale_gradient_is_no_gradient_of_this_step() -> None:
    class Skips(Net):
        skip = False

        def forward(self, ids):
            x = self.embed(ids)
            for layer in self.layers[: 2 if self.skip else 3]:
                x = torch.tanh(layer(x))
            return self.head(x)

    model = Skips()
    model(IDS).sum().backward()
    model.skip = True
    report = audit_step(model).report
    assert reason(report, "layers.2.weight") == ("none", "module_not_called", "layers.2")
    assert "earlier gradient" in report["layers.2.weight"].reason.text
    assert report["layers.2.weight"].grad_after.norm > 0


def test_a_module_that_is_never_called() -> None:
    model = Net()
    model.spare = nn.Sequential(nn.Linear(2, 2))
    report = audit_step(model).report
    assert reason(report, "spare.0.weight") == ("none", "module_not_called", "spare.0")
    others_are_ok(report, "spare")
    (finding,) = [f for f in report.findings if f.code == "module_not_called"]
    assert finding.severity == "warning"


class Experts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, ids):
        x = self.embed(ids)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (ids % 2) == index
            if rows.any():
                out[rows] = expert(x[rows])
        for layer in self.layers:
            out = torch.tanh(layer(out))
        return self.head(out)


def test_an_expert_without_tokens_is_healthy() -> None:
    report = audit_step(Experts()).report
    assert reason(report, "experts.2.weight") == ("none", "expert_without_tokens", "experts.2")
    assert report["experts.2.weight"].reason.healthy
    others_are_ok(report, "experts.2")
    assert [f.severity for f in report.findings if f.code == "expert_without_tokens"] == ["info"]


class Mode(Net):
    mode = torch.no_grad

    def forward(self, ids):
        x = self.embed(ids)
        for index, layer in enumerate(self.layers):
            if index == 1:
                with self.mode():
                    y = layer(x.detach())
                x = x + y.clone()
            else:
                x = torch.tanh(layer(x))
        return self.head(x)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_called_only_with_gradients_off(mode: str) -> None:
    model = Mode()
    model.mode = getattr(torch, mode)
    report = audit_step(model).report
    assert reason(report, "layers.1.weight") == ("none", mode, "layers.1")
    assert report["layers.1.weight"].reason.line == line_of(Mode.forward, "layer(x.detach())")
    others_are_ok(report, "layers.1")


class Cut(Net):
    """Loses the gradient between layers 1 and 2 in one of several ways."""

    how = "detach"

    def cut(self, x):
        if self.how == "detach":
            return x.detach()
        if self.how == "scaled":
            return x.detach() * 0.5 + 1
        if self.how == "item":
            return torch.tensor([[float(v.item()) for v in row] for row in x.detach().flatten(0, 1)]
                                ).view_as(x)  # fmt: skip
        if self.how == "integer":
            return self.embed(x.abs().mul(3).long().sum(-1) % 11).detach()
        return self.embed(x.argmax(-1)).detach()

    def forward(self, ids):
        x = self.embed(ids) * 1.0
        x = self.layers[1](torch.tanh(self.layers[0](x)))
        return self.head(torch.tanh(self.layers[2](self.cut(x))))


@pytest.mark.parametrize("how", ["detach", "scaled", "item"])
def test_the_road_is_cut(how: str) -> None:
    model = Cut()
    model.how = how
    report = audit_step(model).report
    for name in ("layers.0.weight", "layers.1.bias", "embed.weight"):
        assert reason(report, name) == ("none", "detached", "layers.2")
        assert report[name].reason.line == line_of(Cut.forward, "self.layers[2]")
        assert "layers.1" in report[name].reason.text
    assert ("without its gradient" in report["layers.0.weight"].reason.text) is (how == "detach")
    others_are_ok(report, "layers.0", "layers.1", "embed")
    (finding,) = [f for f in report.findings if f.severity == "error"]
    assert finding.code == "detached"
    assert "5 parameters" in finding.message


@pytest.mark.parametrize("how", ["integer", "argmax"])
def test_the_road_is_cut_by_integers(how: str) -> None:
    model = Cut()
    model.how = how
    model.embed.requires_grad_(False)
    report = audit_step(model).report
    assert report["layers.0.weight"].reason.code == "detached"
    assert report["layers.0.weight"].reason.module in ("embed", "layers.2")
    assert "layers.1" in report["layers.0.weight"].reason.text


class Side(Net):
    """A branch whose output nobody uses, called before and after the main road began."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.side, self.first = nn.Linear(6, 6), first

    def forward(self, ids):
        x = self.embed(ids)
        if self.first:
            self.side(x.detach())
        for layer in self.layers:
            x = torch.tanh(layer(x.detach() if layer is self.layers[0] and self.first else x))
        if not self.first:
            self.side(x)
        return self.head(x)


@pytest.mark.parametrize("first", [True, False])
def test_a_branch_that_leads_to_no_loss(first: bool) -> None:
    report = audit_step(Side(first)).report
    assert reason(report, "side.weight") == ("none", "leads_to_no_loss", "side")
    call = "self.side(x.detach())" if first else "self.side(x)"
    assert report["side.weight"].reason.line == line_of(Side.forward, call)


def test_the_loss_drops_the_models_output() -> None:
    model = Net()
    other = nn.Linear(4, 1)
    whole = nn.ModuleDict({"net": model, "other": other})
    with GradientAudit(whole) as audit:
        loss = other(model(IDS).detach()).sum()
        audit.combine({"l": (1.0, loss)}).backward()
    row = audit.report["net.head.weight"]
    assert (row.reason.code, row.reason.module) == ("detached", "other")
    assert audit.report["other.weight"].status == "ok"


def test_a_weight_that_its_own_module_detaches() -> None:
    class Detaches(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.detach(), self.bias)

    model = Net()
    model.layers[1] = Detaches(6, 6)
    report = audit_step(model).report
    assert reason(report, "layers.1.weight") == ("none", "not_in_output", "layers.1")
    others_are_ok(report, "layers.1.weight")


def test_a_parameter_replaced_after_the_forward() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters())
    with GradientAudit(model, optimizer) as audit:
        output = model(IDS)
        model.head.weight = nn.Parameter(torch.zeros(4, 6))
        audit.combine(weighted(output, WEIGHTS)).backward()
    assert reason(audit.report, "head.weight") == ("none", "replaced", "head")
    assert "optimizer_strangers" in [f.code for f in audit.report.findings]
    others_are_ok(audit.report, "head.weight")


def test_a_parameter_replaced_before_the_forward_is_watched() -> None:
    model = Net()
    with GradientAudit(model) as audit:
        model.head.weight = nn.Parameter(torch.ones(4, 6))
        audit.combine(weighted(model(IDS), WEIGHTS)).backward()
    assert audit.report["head.weight"].status == "ok"
    assert audit.report["head.weight"].terms["sum"].norm > 0
    assert audit.report.sum_check < 1e-6


def test_a_functional_call_with_other_tensors() -> None:
    model = Net()
    swapped = {"head.weight": torch.ones(4, 6, requires_grad=True)}
    audit = audit_step(model, lambda m: torch.func.functional_call(m, swapped, (IDS,)))
    assert reason(audit.report, "head.weight") == ("none", "replaced", "head")


def test_unfrozen_too_late() -> None:
    model = Net()
    model.head.weight.requires_grad_(False)
    with GradientAudit(model) as audit:
        output = model(IDS)
        model.head.weight.requires_grad_(True)
        audit.combine(weighted(output, WEIGHTS)).backward()
    assert reason(audit.report, "head.weight") == ("none", "frozen_at_call", "head")


def test_a_custom_backward_that_gives_nothing() -> None:
    class Stingy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x * weight.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, ids):
            return Stingy.apply(super().forward(ids), self.scale)

    report = audit_step(Model()).report
    assert reason(report, "scale")[:2] == ("none", "reached_without_gradient")
    others_are_ok(report, "scale")


def test_not_in_the_optimiser() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.layers.parameters())
    report = audit_step(model, optimizer=optimizer).report
    assert reason(report, "head.weight")[:2] == ("not_in_optimizer", "not_in_optimizer")
    assert report["head.weight"].in_optimizer is False
    assert report["layers.0.weight"].status == "ok"
    assert audit_step(Net()).report["head.weight"].in_optimizer is None


def test_tied_weights_are_one_row_and_are_found_by_either_module() -> None:
    model = Net(width=6)
    model.tied = nn.Linear(6, 11, bias=False)
    model.tied.weight = model.embed.weight
    report = audit_step(model).report
    assert [row.name for row in report.parameters].count("embed.weight") == 1
    assert report["embed.weight"].status == "ok"


def test_mha_uses_a_module_that_it_never_calls() -> None:
    """`out_proj` is used without being called: it is the detach that must be named."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].detach())

    model, x = Attention(), torch.randn(2, 5, 8)
    with GradientAudit(model) as audit:
        audit.combine({"l": (1.0, model(x).square().sum())}).backward()
    assert reason(audit.report, "attention.out_proj.weight") == ("none", "detached", "head")
    assert reason(audit.report, "attention.in_proj_weight") == ("none", "detached", "head")


def test_a_term_that_reaches_nothing_is_named() -> None:
    model = Net()
    free = torch.ones((), requires_grad=True)
    with GradientAudit(model) as audit:
        terms = {"main": (1.0, model(IDS).sum()), "lost": (1.0, free * 2)}
        audit.combine(terms).backward()
    (finding,) = [f for f in audit.report.findings if f.code == "term_reaches_nothing"]
    assert finding.where == "lost"
    assert finding.severity == "error"


def test_terms_reach_different_parameters() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Linear(6, 1)

        def forward(self, ids):
            x = self.embed(ids)
            return self.head(torch.tanh(self.layers[0](x))), self.value(x.detach())

    model = Two()
    with GradientAudit(model) as audit:
        logits, value = model(IDS)
        audit.combine({"a": (1.0, logits.sum()), "v": (1.0, value.square().sum())}).backward()
    at = audit.report["value.weight"].terms
    assert (at["a"].reached, at["a"].norm, at["v"].reached) == (False, 0.0, True)
    assert at["v"].share == pytest.approx(1)
    assert audit.report["head.weight"].terms["v"].reached is False
    assert audit.gradient("v", "head.weight") is None


def test_reasons_hold_over_micro_batches() -> None:
    """An expert that got tokens in one of two micro-batches has its gradient."""
    model = Experts()
    with GradientAudit(model) as audit:
        for ids in (torch.tensor([[2, 4]]), torch.tensor([[1, 3]])):
            audit.combine(weighted(model(ids), WEIGHTS)).backward()
    others_are_ok(audit.report, "experts.2")
    assert audit.report["experts.2.weight"].reason.code == "expert_without_tokens"


def test_without_terms_the_reasons_are_there_too() -> None:
    model = Cut()
    with GradientAudit(model) as audit:
        for _ in range(2):
            model(IDS).sum().backward()
    assert reason(audit.report, "layers.0.weight") == ("none", "detached", "layers.2")
    others_are_ok(audit.report, "layers.0", "layers.1", "embed")


def test_a_model_that_was_not_run() -> None:
    model = Net()
    other = Net()
    with GradientAudit(model) as audit:
        other(IDS).sum().backward()
    assert audit.report["head.weight"].reason.code in ("no_backward", "calls_not_seen")


def test_torch_func_inside_an_audit() -> None:
    """Tensors of a transformation must not be kept; the ordinary step beside it is audited."""
    model = Net()
    held = {name: value.detach() for name, value in model.named_parameters()}

    def inner(values):
        return torch.func.functional_call(model, values, (IDS,)).sum()

    with GradientAudit(model) as audit:
        torch.func.grad(inner)(held)
        audit.combine(weighted(model(IDS), WEIGHTS)).backward()
    others_are_ok(audit.report)
    assert audit.report.sum_check < 1e-6


def test_a_dead_activation_is_a_zero_gradient() -> None:
    model = Net()
    model.layers[1].register_forward_hook(lambda module, args, output: torch.relu(output - 1e3))
    report = audit_step(model).report
    assert reason(report, "layers.0.weight")[:2] == ("zero", "zero_gradient")
    severities = {item.severity for item in report.findings if item.code == "zero_gradient"}
    assert severities == {"warning"}


def test_weights_that_only_pass_through_are_not_held() -> None:
    """Offloading puts a frozen weight in for one call: the audit must not keep it alive."""
    import weakref

    model = Net()
    model.embed.requires_grad_(False)
    passing = []

    def load(module, args):
        module.weight = nn.Parameter(torch.ones(11, 6), requires_grad=False)
        passing.append(weakref.ref(module.weight))

    resting = model.embed.weight

    def unload(module, args, output):
        module.weight = resting

    model.embed.register_forward_pre_hook(load)
    model.embed.register_forward_hook(unload)
    with GradientAudit(model) as audit:
        audit.combine(weighted(model(IDS), WEIGHTS)).backward()
        assert passing[0]() is None
    assert audit.report["embed.weight"].status == "frozen"


def test_a_module_that_ran_before_the_road_ended_is_not_the_cut() -> None:
    """A probe inside a block gets no gradient, but the block hands it on; it is lost after that."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.probe = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            y = self.main(x)
            return y + self.probe(y.detach())

    class Probed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, ids):
            return self.head(self.layers[2](self.block(self.embed(ids)).detach() * 2))

    report = audit_step(Probed()).report
    assert reason(report, "block.main.weight") == ("none", "detached", "layers.2")
    assert reason(report, "block.probe.weight") == ("none", "detached", "layers.2")


def test_a_module_that_leads_nowhere_is_not_the_cut() -> None:
    """Positions are looked up after the lost branch, in a table that is not trained."""

    class Positions(Net):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(6, 6)
            self.positions = nn.Embedding(3, 6).requires_grad_(False)

        def forward(self, ids):
            x = self.embed(ids)
            self.side(x)
            x = x + self.positions(torch.arange(3))
            return self.head(torch.tanh(self.layers[0](x)))

    report = audit_step(Positions()).report
    assert reason(report, "side.weight") == ("none", "leads_to_no_loss", "side")


@pytest.mark.parametrize("with_terms", [True, False])
def test_a_cut_in_one_micro_batch_is_remembered(with_terms: bool) -> None:
    class Sometimes(Net):
        lost = True

        def forward(self, ids):
            x = self.embed(ids)
            if self.lost:
                x = x + self.layers[1](x).detach()
            return self.head(torch.tanh(self.layers[0](x)))

    model = Sometimes()
    with GradientAudit(model) as audit:
        for lost in (True, False):
            model.lost = lost
            output = model(IDS)
            if with_terms:
                audit.combine(weighted(output, WEIGHTS)).backward()
            else:
                output.sum().backward()
    row = audit.report["layers.1.weight"]
    assert row.reason.code in ("detached", "leads_to_no_loss")
    assert "layers.1 carries its gradient" in row.reason.text


def test_calls_of_past_micro_batches_are_forgotten() -> None:
    model = Net()
    with GradientAudit(model) as audit:
        for _ in range(6):
            model(IDS).sum().backward()
        assert len(audit._session.log.events) <= 6


def test_unfrozen_inside_and_used_without_a_call() -> None:
    model = Net()
    model.scale = nn.Parameter(torch.ones(4), requires_grad=False)
    with GradientAudit(model) as audit:
        output = model(IDS)
        model.scale.requires_grad_(True)
        audit.combine(weighted(output * model.scale, WEIGHTS)).backward()
    row = audit.report["scale"]
    assert row.status == "ok"
    assert row.increment.norm == pytest.approx(model.scale.grad.norm().item())
    assert audit.report.sum_check < 1e-6
