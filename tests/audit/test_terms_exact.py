"""Per-term gradients, shares, cosines and the self-check against separate autograd runs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from audited import IDS, WEIGHTS, Net, audit_step, losses, weighted
from torch import nn

from glasstune.audit.gradient_audit import GradientAudit
from glasstune.core.gradients import cancellation, cosines, shares


def truth(model: nn.Module, name: str, ids=IDS) -> dict[str, torch.Tensor]:
    """float64 gradients of one loss, from a copy of the model and a backward of its own."""
    double = copy.deepcopy(model).double()
    double.zero_grad()
    losses(double(ids))[name].backward()
    return {key: value.grad for key, value in double.named_parameters()}


def test_gradients_of_each_term() -> None:
    model = Net()
    audit = audit_step(model)
    for name in WEIGHTS:
        for key, expected in truth(model, name).items():
            torch.testing.assert_close(
                audit.gradient(name, key).double(), expected, rtol=1e-5, atol=1e-7
            )
    assert audit.report.sum_check < 1e-6
    assert audit.report.record.engine == "grad"


def test_norm_share_cosine_cancellation() -> None:
    model = Net()
    report = audit_step(model).report
    flat = torch.stack(
        [torch.cat([g.flatten() for g in truth(model, name).values()]) for name in WEIGHTS]
    )
    w = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    step = w @ flat
    for index, term in enumerate(report.terms):
        assert term.norm == pytest.approx(float(flat[index].norm()), rel=1e-5)
        share = float(w[index] * flat[index] @ step / step.square().sum())
        assert term.share == pytest.approx(share, abs=1e-5)
        assert term.reaches == 9
    assert sum(term.share for term in report.terms) == pytest.approx(1, abs=1e-12)
    unit = flat / flat.norm(dim=1, keepdim=True)
    expected = unit @ unit.T
    assert torch.tensor(report.cosines()).double().allclose(expected, atol=1e-5)
    alone = float((w * flat.norm(dim=1)).sum())
    assert report.record.cancellation == pytest.approx(1 - float(step.norm()) / alone, abs=1e-5)
    assert {(c.a, c.b) for c in report.record.conflicts} == {
        (a, b)
        for i, a in enumerate(WEIGHTS)
        for j, b in enumerate(WEIGHTS)
        if i < j and expected[i, j] < 0
    }


def test_gram_by_layer_and_parameter() -> None:
    model = Net()
    audit = audit_step(model)
    found = {name: truth(model, name) for name in WEIGHTS}

    def gram(keys):
        rows = torch.stack(
            [torch.cat([found[name][key].flatten() for key in keys]) for name in WEIGHTS]
        )
        return rows @ rows.T

    layer = ["layers.1.weight", "layers.1.bias"]
    torch.testing.assert_close(audit.gram("layers.1"), gram(layer), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(audit.gram("head.bias"), gram(["head.bias"]), rtol=1e-5, atol=1e-8)
    whole = gram(list(found["sum"]))
    torch.testing.assert_close(audit.gram(), whole, rtol=1e-5, atol=1e-8)
    assert [row.layer for row in audit.report.layers] == [
        "embed", "layers.0", "layers.1", "layers.2", "head",
    ]  # fmt: skip
    for row in audit.report.layers:
        assert sum(row.shares) == pytest.approx(1)


def test_hand_worked_shares() -> None:
    """g0 = (3, 0), g1 = (-1, 2), w = (1, 2): the step is (1, 4), its square 17."""
    gram = [[9.0, -3.0], [-3.0, 5.0]]
    assert shares(gram, [1, 2]) == [pytest.approx(3 / 17), pytest.approx(14 / 17)]
    assert cosines(gram)[0][1] == pytest.approx(-1 / math.sqrt(5))
    expected = 1 - math.sqrt(17) / (3 + 2 * math.sqrt(5))
    assert cancellation(gram, [1, 2]) == pytest.approx(expected)


def test_shares_of_a_zero_total() -> None:
    assert shares([[1.0, -1.0], [-1.0, 1.0]], [1, 1]) == [None, None]
    assert cancellation([[1.0, -1.0], [-1.0, 1.0]], [1, 1]) == 1.0
    assert shares([[0.0]], [1]) == [None]
    assert cancellation([[0.0]], [1]) is None
    assert shares([[math.nan]], [1]) == [None]
    assert cosines([[math.inf, 1.0], [1.0, 1.0]])[0][1] is None


def test_terms_that_cancel_have_no_share_but_a_reason() -> None:
    model = nn.Linear(3, 1, bias=False)
    x = torch.ones(2, 3)
    with GradientAudit(model) as audit:
        y = model(x).sum()
        audit.combine({"up": (1.0, y), "down": (1.0, -y)}).backward()
    row = audit.report["weight"]
    assert (row.status, row.reason.code) == ("zero", "terms_cancel")
    assert row.terms["up"].norm == pytest.approx(2 * math.sqrt(3))
    assert row.terms["up"].share is None
    assert audit.report.record.cancellation == 1.0


def test_accumulation_sums_over_micro_batches() -> None:
    model, other = Net(), torch.tensor([[3, 3, 8]])
    with GradientAudit(model) as audit:
        for ids in (IDS, other):
            audit.combine(weighted(model(ids), WEIGHTS)).backward()
    for name in WEIGHTS:
        first, second = truth(model, name), truth(model, name, other)
        for key in first:
            torch.testing.assert_close(
                audit.gradient(name, key).double(), first[key] + second[key], rtol=1e-5, atol=1e-7
            )
    assert audit.report.sum_check < 1e-6
    row = audit.report["head.weight"]
    assert row.increment.norm == pytest.approx(float(model.head.weight.grad.norm()), rel=1e-6)
    assert audit.report.terms[0].count == 2


def test_several_forwards_one_backward() -> None:
    model = Net()
    with GradientAudit(model) as audit:
        total = sum(audit.combine(weighted(model(ids), WEIGHTS)) for ids in (IDS, IDS + 1))
        total.backward()
    assert audit.report.sum_check < 1e-6
    assert all(row.status == "ok" for row in audit.report.parameters)


def test_a_gradient_from_before_is_kept_apart() -> None:
    model = Net()
    model(IDS).sum().backward()
    old = model.head.weight.grad.clone()
    audit = audit_step(model)
    row = audit.report["head.weight"]
    assert row.grad_before.norm == pytest.approx(float(old.norm()), rel=1e-6)
    assert row.increment.norm == pytest.approx(
        float((model.head.weight.grad - old).norm()), rel=1e-5
    )
    assert row.grad_after.norm == pytest.approx(float(model.head.weight.grad.norm()), rel=1e-6)
    assert audit.report.sum_check < 1e-6


def test_without_terms_before_increment_after() -> None:
    model = Net()
    model(IDS).sum().backward()
    old = model.head.weight.grad.clone()
    with GradientAudit(model) as audit:
        for _ in range(2):
            model(IDS).square().sum().backward()
    row = audit.report["head.weight"]
    new = model.head.weight.grad - old
    assert row.grad_before.norm == pytest.approx(float(old.norm()), rel=1e-6)
    assert row.increment.norm == pytest.approx(float(new.norm()), rel=1e-5)
    assert (row.status, row.terms, audit.report.sum_check) == ("ok", {}, None)


@pytest.mark.parametrize("factor", [0.25, 65536.0])
def test_a_scaled_loss_is_recognised(factor: float) -> None:
    model = Net()
    with GradientAudit(model) as audit:
        (audit.combine(weighted(model(IDS), WEIGHTS)) * factor).backward()
    assert audit.report.record.scale == pytest.approx(factor, rel=1e-6)
    assert audit.report.sum_check < 1e-5
    assert "loss_scaled" in [finding.code for finding in audit.report.findings]


def test_a_forgotten_term_is_a_mismatch() -> None:
    model = Net()
    with GradientAudit(model) as audit:
        terms = weighted(model(IDS), WEIGHTS)
        extra = model.head.weight.square().sum()
        (audit.combine(terms) + extra).backward()
    assert audit.report.sum_check > 0.05
    assert "sum_mismatch" in [finding.code for finding in audit.report.findings]


def test_terms_run_backward_one_by_one() -> None:
    model = Net()
    with GradientAudit(model) as audit:
        terms = weighted(model(IDS), WEIGHTS)
        audit.terms(terms)
        for weight, loss in terms.values():
            (weight * loss).backward(retain_graph=True)
    assert audit.report.sum_check < 1e-6


def test_clipping_and_a_step_inside_do_not_disturb_the_check() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientAudit(model, optimizer) as audit:
        audit.combine(weighted(model(IDS), WEIGHTS)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    assert audit.report.sum_check < 1e-6
    row = audit.report["head.weight"]
    assert row.grad_after.norm < row.increment.norm / 10


def test_weights_may_be_tensors_and_learned() -> None:
    """A weight that is a parameter of the model gets l_i, not Σ w_i g_i: the check still holds."""
    model = Net()
    model.mix = nn.Parameter(torch.tensor([0.5, 2.0]))
    outside = torch.tensor(0.3, requires_grad=True)
    with GradientAudit(model) as audit:
        found = losses(model(IDS))
        audit.combine(
            {
                "square": (model.mix[0], found["square"]),
                "sum": (model.mix[1], found["sum"]),
                "spread": (outside, found["spread"]),
            }
        ).backward()
    assert [term.weight for term in audit.report.terms] == pytest.approx([0.5, 2.0, 0.3])
    assert audit.report.sum_check < 1e-6
    values = torch.stack([found["square"], found["sum"]]).detach()
    torch.testing.assert_close(model.mix.grad, values)
    assert outside.grad == found["spread"].detach()
    assert audit.report["mix"].status == "ok"
    assert audit.report["mix"].terms["sum"].reached is False


def test_weight_zero_is_zero_and_not_none() -> None:
    model = Net()
    audit = audit_step(model, weights={"square": 0.0})
    row = audit.report["head.weight"]
    assert (row.status, row.reason.code, row.reason.healthy) == ("zero", "weight_zero", True)
    assert row.grad_after.zero_fraction == 1.0
    assert row.terms["square"].norm > 0
    assert audit.report.sum_check == 0.0


def test_counts_are_recorded() -> None:
    model = Net()
    with GradientAudit(model) as audit:
        loss = model(IDS).square().sum()
        audit.terms({"a": (1 / 24, loss)}, counts={"a": 24})
        (loss / 24).backward()
    (term,) = audit.report.terms
    assert (term.weight, term.count) == (pytest.approx(1), 24)
    assert term.value == pytest.approx(loss.item() / 24)


def test_shared_gradients_accumulate_apart() -> None:
    """Autograd gives x + y one tensor for both: adding in place would count it twice."""
    model = nn.Module()
    model.x, model.y = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with GradientAudit(model) as audit:
        for _ in range(3):
            audit.combine({"l": (1.0, (model.x + model.y).sum())}).backward()
    assert audit.gradient("l", "x").tolist() == [3, 3, 3]
    assert audit.gradient("l", "y").tolist() == [3, 3, 3]


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    x = torch.randn(5, 4).to(dtype)
    with GradientAudit(model) as audit:
        y = model(x)
        audit.combine({"a": (1.0, y.abs().sum()), "b": (0.5, (y.abs() ** 2).sum())}).backward()
    assert audit.report.sum_check < {torch.bfloat16: 2e-2}.get(dtype, 1e-6)
    row = audit.report["weight"]
    grad = model.weight.grad
    norm = (torch.view_as_real(grad) if grad.is_complex() else grad).double().norm()
    assert row.grad_after.norm == pytest.approx(float(norm), rel=1e-6)


def test_sparse_gradients() -> None:
    model = nn.Embedding(7, 3, sparse=True)
    with GradientAudit(model) as audit:
        y = model(torch.tensor([1, 1, 5]))
        audit.combine({"a": (1.0, y.sum()), "b": (2.0, y.square().sum())}).backward()
    row = audit.report["weight"]
    assert row.grad_after.zero_fraction == pytest.approx(5 / 7)
    assert audit.report.sum_check < 1e-6


def test_match_limits_what_is_audited() -> None:
    audit = audit_step(Net(), match="layers.*.weight")
    assert [row.name for row in audit.report.parameters] == [
        f"layers.{index}.weight" for index in range(3)
    ]
    assert audit.report.sum_check < 1e-6


def test_keep_nothing_keeps_gram_only() -> None:
    model = Net()
    audit = audit_step(model, keep=())
    torch.testing.assert_close(audit.gram("head"), audit_step(Net()).gram("head"))
    assert all(not watched.gradients for watched in audit._session.watched.values())


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("with_terms", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_what_is_left_alone_is_read_at_the_end(
    micro_batches: int, with_terms: bool, held: bool
) -> None:
    """Fewer passes over the gradients, the same record: also where `.grad` was there before."""

    def record(left_alone: bool) -> dict:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        if held:
            net(torch.ones(1, 4)).sum().backward()
        with GradientAudit(net, left_alone=left_alone) as audit:
            for _ in range(micro_batches):
                out = net(torch.randn(3, 4))
                loss, other = out.square().mean(), out.abs().mean()
                if with_terms:
                    audit.terms({"a": (1.0, loss), "b": (0.5, other)})
                (loss + 0.5 * other).backward()
        return audit.report.to_dict()

    eager, late = record(False), record(True)
    for one, other in zip(eager["parameters"], late["parameters"], strict=True):
        for column in ("grad_before", "increment", "grad_after"):
            assert (one[column] is None) == (other[column] is None)
            if one[column] is not None:
                assert other[column]["norm"] == pytest.approx(one[column]["norm"], rel=1e-5)
                assert other[column]["max_abs"] == pytest.approx(one[column]["max_abs"], rel=1e-5)
    assert late["sum_check"] == pytest.approx(eager["sum_check"] or 0, abs=1e-6) or not with_terms
