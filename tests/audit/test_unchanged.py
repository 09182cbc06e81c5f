"""An audit changes nothing of the training and leaves nothing behind, also after an exception."""

from __future__ import annotations

import copy
import random

import numpy
import pytest
import torch
from audited import IDS, WEIGHTS, Net, audit_step, losses, weighted
from torch import nn
from torch.utils.checkpoint import checkpoint

from glasstune.audit.gradient_audit import _OPEN, GradientAudit
from glasstune.core.errors import InputError


class Noisy(Net):
    """Dropout, batch norm and a buffer that is rebound, all inside a checkpoint."""

    def __init__(self, reentrant: bool, preserve: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))
        self.reentrant, self.preserve = reentrant, preserve

    def block(self, x):
        self.calls = self.calls + 1
        x = self.drop(torch.tanh(self.layers[0](x)))
        if not self.preserve:
            x = x * (1 + random.random() + numpy.random.rand())
        return self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def forward(self, ids):
        x = self.embed(ids)
        x = checkpoint(
            self.block, x, use_reentrant=self.reentrant, preserve_rng_state=self.preserve
        )
        return self.head(self.drop(x))


def train(model: nn.Module, audited: bool, steps: int = 3, accumulate: int = 2):
    """A few AdamW updates from one seed; returns all that training leaves."""
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grads = []
    for _ in range(steps):
        optimizer.zero_grad()

        def micro(audit=None):
            for _ in range(accumulate):
                terms = weighted(model(IDS), WEIGHTS)
                total = terms["square"][0] * terms["square"][1]
                total = total + terms["sum"][0] * terms["sum"][1]
                total = total + terms["spread"][0] * terms["spread"][1]
                if audit is not None:
                    audit.terms(terms)
                total.backward()

        if audited:
            with GradientAudit(model, optimizer) as audit:
                micro(audit)
            assert audit.report.terms
        else:
            micro()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        optimizer.step()
    drawn = (torch.rand(3).tolist(), random.random(), numpy.random.rand())
    return grads, {key: value.clone() for key, value in model.state_dict().items()}, drawn


@pytest.mark.parametrize(("reentrant", "preserve"), [(False, True), (False, False), (True, True)])
def test_training_is_the_same_bit_for_bit(reentrant: bool, preserve: bool) -> None:
    plain = train(Noisy(reentrant, preserve), audited=False)
    seen = train(Noisy(reentrant, preserve), audited=True)
    assert plain[2] == seen[2]
    for ours, theirs in zip(plain[0], seen[0], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert plain[1].keys() == seen[1].keys()
    for key in plain[1]:
        assert torch.equal(plain[1][key], seen[1][key]), key


def test_combine_is_the_plain_weighted_sum() -> None:
    model = Net()
    found = losses(model(IDS))
    with GradientAudit(model) as audit:
        found = losses(model(IDS))
        total = audit.combine({name: (WEIGHTS[name], found[name]) for name in WEIGHTS})
    expected = 1.0 * found["square"] + 0.25 * found["sum"] + 2.0 * found["spread"]
    assert torch.equal(total, expected)


def hooks_of(model: nn.Module) -> list[int]:
    counted = [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]
    return counted + [len(p._backward_hooks or ()) for p in model.parameters()]


def test_everything_is_unhooked_and_again() -> None:
    model = Net()
    before = hooks_of(model)
    for _ in range(2):
        audit = audit_step(model)
        assert hooks_of(model) == before
        assert audit.report.sum_check < 1e-6
    assert not set(model.modules()) & set(_OPEN)


def test_one_audit_may_be_used_again() -> None:
    model = Net()
    audit = GradientAudit(model)
    for _ in range(2):
        model.zero_grad()
        with audit:
            audit.combine(weighted(model(IDS), WEIGHTS)).backward()
        assert audit.report.sum_check < 1e-6
        assert audit.report["head.weight"].grad_before is None


def test_an_exception_passes_and_leaves_a_report() -> None:
    model = Net()
    before = hooks_of(model)
    audit = GradientAudit(model)

    def step() -> None:
        with audit:
            model(IDS)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert hooks_of(model) == before
    assert audit.report["head.weight"].reason.code == "no_backward"
    assert audit_step(model).report.sum_check < 1e-6


def test_an_exception_inside_a_forward() -> None:
    class Breaks(Net):
        def forward(self, ids):
            if not self.training:
                raise ZeroDivisionError
            return super().forward(ids)

    model = Breaks()
    with GradientAudit(model) as audit:
        model.eval()
        with pytest.raises(ZeroDivisionError):
            model(IDS)
        model.train()
        audit.combine(weighted(model(IDS), WEIGHTS)).backward()
    assert all(row.status == "ok" for row in audit.report.parameters)


@pytest.mark.parametrize("part", ["model", "head", "outer"])
def test_nested_use_is_refused(part: str) -> None:
    model = Net()
    inner = {"model": model, "head": model.head, "outer": nn.Sequential(model)}[part]
    with GradientAudit(model) as audit:
        with pytest.raises(InputError) as refused, GradientAudit(inner):
            pass
        assert refused.value.code == "audit_nested"
        audit.combine(weighted(model(IDS), WEIGHTS)).backward()
    assert audit.report.sum_check < 1e-6
    with GradientAudit(inner):
        pass


def test_two_models_may_be_audited_together() -> None:
    one, two = Net(), Net()
    with GradientAudit(one) as first, GradientAudit(two) as second:
        first.combine(weighted(one(IDS), WEIGHTS)).backward()
        second.combine(weighted(two(IDS), WEIGHTS)).backward()
    assert first.report.sum_check < 1e-6
    assert second.report.sum_check < 1e-6


class Checkpointed(Net):
    reentrant = False

    def forward(self, ids):
        x = self.embed(ids)
        x = checkpoint(lambda x: self.layers[0](x), x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_accumulate_hooks_run_once(reentrant: bool) -> None:
    """An optimiser that steps in a post-accumulate hook must not step in the audit's backward."""
    model = Checkpointed()
    model.reentrant = reentrant
    stepped = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: stepped.append(name))
    objects = {}
    model.zero_grad()
    model.head.weight.grad = objects["head"] = torch.ones_like(model.head.weight)
    with GradientAudit(model) as audit:
        terms = weighted(model(IDS), WEIGHTS)
        audit.terms(terms)
        assert stepped == []
        assert model.head.weight.grad is objects["head"]
        assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
        assert model.layers[0].weight.grad is None
        sum(weight * loss for weight, loss in terms.values()).backward()
    assert sorted(stepped) == sorted(
        ["embed.weight", "layers.0.weight", "layers.0.bias", "head.weight", "head.bias"]
    )
    assert audit.report.record.engine == ("backward" if reentrant else "grad")
    assert len(model.head.weight._post_accumulate_grad_hooks) == 1


def test_gradients_of_other_leaves_stay_as_they_were() -> None:
    """Per-term backward passes write to every leaf: an input, a tensor of the optimiser alone."""
    model = Checkpointed()
    model.reentrant = True
    prompt = nn.Parameter(torch.ones(6))
    optimizer = torch.optim.SGD([*model.parameters(), prompt])
    with GradientAudit(model, optimizer) as audit:
        found = losses(model.head(model.embed(IDS) * prompt) + model(IDS))
        audit.terms({"a": (1.0, found["square"]), "b": (1.0, found["sum"])})
        assert prompt.grad is None
        (found["square"] + found["sum"]).backward()
    expected = copy.deepcopy(prompt)
    expected.grad = None
    fresh = Checkpointed()
    found = losses(fresh.head(fresh.embed(IDS) * expected) + fresh(IDS))
    (found["square"] + found["sum"]).backward()
    assert torch.equal(prompt.grad, expected.grad)


def test_a_leaf_hidden_inside_reentrant_checkpointing_stays_as_it_was() -> None:
    """A closure brings it in, so no graph shows it; the optimiser tells."""
    prompt = nn.Parameter(torch.ones(6))

    def forward(model):
        x = model.embed(IDS)
        x = checkpoint(lambda x: model.layers[0](x) * prompt, x, use_reentrant=True)
        return losses(model.head(x))

    model = Net()
    optimizer = torch.optim.SGD([*model.parameters(), prompt])
    with GradientAudit(model, optimizer) as audit:
        found = forward(model)
        audit.terms({"a": (1.0, found["square"]), "b": (1.0, found["sum"])})
        assert prompt.grad is None
        (found["square"] + found["sum"]).backward()
    seen, prompt.grad = prompt.grad, None
    found = forward(Net())
    (found["square"] + found["sum"]).backward()
    assert torch.equal(prompt.grad, seen)


def test_a_hook_that_masks_a_gradient_holds_for_its_terms() -> None:
    model = Net()
    model.embed.weight.register_hook(lambda g: g * (torch.arange(11) > 3)[:, None])
    audit = audit_step(model)
    assert audit.report.sum_check < 1e-6
    assert not audit.gradient("sum", "embed.weight")[:4].any()


def test_the_graph_is_let_go() -> None:
    import gc
    import weakref

    model = Net()
    audit = GradientAudit(model)
    with audit:
        output = model(IDS)
        alive = weakref.ref(output)
        audit.combine(weighted(output, WEIGHTS))
        del output
    gc.collect()
    assert alive() is None
