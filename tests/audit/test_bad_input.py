"""What the caller can get wrong: one clear error that names the term."""

from __future__ import annotations

import numpy
import pytest
import torch
from audited import IDS, WEIGHTS, Net, audit_step, weighted
from torch import nn

import glasstune
from glasstune.audit.gradient_audit import GradientAudit
from glasstune.core.errors import InputError


def refused(give) -> InputError:
    """The error of what `give(audit, output)` does inside an audit."""
    model = Net()
    with GradientAudit(model) as audit:
        output = model(IDS)
        with pytest.raises(InputError) as caught:
            give(audit, output)
    assert caught.value.exit_code == 2
    assert caught.value.fix
    return caught.value


def fails() -> torch.Tensor:
    return torch.ones(3)[7]


@pytest.mark.parametrize(
    ("code", "content"),
    [
        ("loss_not_scalar", lambda y: (1.0, y)),
        ("loss_not_scalar", lambda y: (1.0, y[:0].flatten())),
        ("loss_without_graph", lambda y: (1.0, y.sum().detach())),
        ("loss_without_graph", lambda y: (1.0, torch.tensor(3.0))),
        ("loss_without_graph", lambda y: (1.0, y.argmax())),
        ("loss_not_tensor", lambda y: (1.0, y.sum().item())),
        ("loss_not_tensor", lambda y: (1.0, None)),
        ("loss_function_raised", lambda y: (1.0, fails)),
        ("term_weight", lambda y: ("1.0", y.sum())),
        ("term_weight", lambda y: (None, y.sum())),
        ("term_weight", lambda y: (torch.ones(2), y.sum())),
        ("term_weight", lambda y: (True, y.sum())),
        ("term_not_pair", lambda y: y.sum()),
        ("term_not_pair", lambda y: (y.sum(),)),
    ],
)
def test_a_bad_term_is_named(code: str, content) -> None:
    error = refused(lambda audit, y: audit.terms({"good": (1.0, y.sum()), "mine": content(y)}))
    assert error.code == code
    assert error.where == "mine"
    assert "'mine'" in error.message


def test_a_function_that_raises_names_its_line() -> None:
    error = refused(lambda audit, y: audit.combine({"mine": (1.0, fails)}))
    assert "IndexError" in error.message
    assert "test_bad_input.py:" in error.message
    assert isinstance(error.__cause__, IndexError)


def test_a_function_may_be_a_loss() -> None:
    model = Net()
    with GradientAudit(model) as audit:
        output = model(IDS)
        audit.combine({"mine": (numpy.float32(2), lambda: output.sum())}).backward()
    assert audit.report.terms[0].weight == 2
    assert audit.report.sum_check < 1e-6


def test_no_terms() -> None:
    assert refused(lambda audit, y: audit.terms({})).code == "no_terms"
    assert refused(lambda audit, y: audit.combine({})).code == "no_terms"


@pytest.mark.parametrize("name", ["", 3, None])
def test_a_name_that_is_none(name) -> None:
    assert refused(lambda audit, y: audit.terms({name: (1.0, y.sum())})).code == "term_name"


def test_a_name_twice_in_one_call() -> None:
    error = refused(lambda a, y: a.terms([("a", (1.0, y.sum())), ("a", (1.0, y.mean()))]))
    assert (error.code, error.where) == ("term_twice", "a")


def test_a_name_twice_in_two_calls() -> None:
    def give(audit, y):
        audit.terms({"a": (1.0, y.sum())})
        audit.terms({"a": (1.0, y.mean())})

    assert refused(give).code == "terms_twice"


def test_the_same_loss_twice() -> None:
    def give(audit, y):
        loss = y.sum()
        audit.terms({"a": (1.0, loss)})
        audit.model(IDS)
        audit.terms({"a": (1.0, loss)})

    assert refused(give).code == "terms_twice"


def test_a_weight_that_changes_inside_one_audit() -> None:
    def give(audit, y):
        audit.combine({"a": (1.0, y.sum())}).backward()
        audit.terms({"a": (2.0, audit.model(IDS).sum())})

    assert refused(give).code == "weight_changed"


def test_terms_after_the_backward() -> None:
    def give(audit, y):
        loss = y.square().sum()
        loss.backward()
        audit.terms({"a": (1.0, loss)})

    error = refused(give)
    assert (error.code, error.where) == ("backward_before_terms", "a")


def test_counts_of_a_term_that_is_not_there() -> None:
    error = refused(lambda a, y: a.terms({"a": (1.0, y.sum())}, counts={"b": 2}))
    assert (error.code, error.where) == ("unknown_term", "b")


def test_outside_the_with() -> None:
    audit = GradientAudit(Net())
    with pytest.raises(InputError) as caught:
        audit.terms({"a": (1.0, torch.ones((), requires_grad=True))})
    assert caught.value.code == "audit_closed"
    with pytest.raises(InputError) as caught:
        _ = audit.report
    assert caught.value.code == "audit_open"


def test_models_and_options_that_make_no_sense() -> None:
    with pytest.raises(InputError) as caught:
        GradientAudit(nn.Tanh())
    assert caught.value.code == "no_parameters"
    with pytest.raises(InputError) as caught:
        GradientAudit(Net(), match="layer.*")
    assert caught.value.code == "no_match"
    assert "layers." in caught.value.fix
    with pytest.raises(InputError) as caught:
        GradientAudit(Net(), keep="everything")
    assert caught.value.code == "unknown_keep"


def test_names_that_do_not_exist() -> None:
    audit = audit_step(Net())
    for call, code in (
        (lambda: audit.gradient("sun", "head.weight"), "unknown_term"),
        (lambda: audit.gradient("sum", "head.wait"), "unknown_parameter"),
        (lambda: audit.gram("layer.1"), "unknown_layer"),
        (lambda: audit.report["head"], "unknown_parameter"),
        (lambda: audit.report.cosines("layers.9"), "unknown_layer"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.code == code
    with pytest.raises(InputError) as caught:
        audit.gradient("sum", "head.wait")
    assert "head.weight" in caught.value.fix
    with pytest.raises(InputError) as caught:
        audit_step(Net(), keep=()).gradient("sum", "head.weight")
    assert caught.value.code == "gradients_not_kept"
    with GradientAudit(Net()) as silent:
        pass
    with pytest.raises(InputError) as caught:
        silent.gram()
    assert caught.value.code == "no_terms"


def test_a_model_with_nothing_trained_is_reported() -> None:
    model = Net().requires_grad_(False)
    with GradientAudit(model) as audit:
        model(IDS)
    (finding,) = audit.report.findings
    assert finding.code == "nothing_trained"


def test_it_is_exported_and_the_package_stays_light() -> None:
    assert glasstune.GradientAudit is GradientAudit


def test_an_empty_parameter() -> None:
    model = Net()
    model.layers[0].extra = nn.Parameter(torch.zeros(0, 3))
    report = audit_step(model).report
    assert report["layers.0.extra"].value.norm == 0
    assert report["layers.0.extra"].status == "none"
    with GradientAudit(model) as audit:
        audit.combine(weighted(model(IDS) + model.layers[0].extra.sum(), WEIGHTS)).backward()
    assert audit.report["layers.0.extra"].grad_after.norm == 0
