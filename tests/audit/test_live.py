"""The audit inside a training, driven by hand: what it writes, when, and what it leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glasstune.audit.live import LiveAudit, norms_row
from glasstune.audit.norms import live_norms


class Adapted(nn.Module):
    """A frozen layer with a low-rank product, and a second one that may be cut off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])
        self.extra = nn.Linear(5, 5)
        self.cut = False
        self.layers.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x + (self.extra(x).detach() if self.cut else self.extra(x))


X = torch.linspace(-1.0, 2.0, 20).reshape(4, 5)


def sums(output: Tensor) -> dict[str, Tensor]:
    return {"square": output.square().sum(), "third": output.pow(3).sum()}


WEIGHTS = {"square": 1.0, "third": 0.25}
MADE: list[LiveAudit] = []


@pytest.fixture(autouse=True)
def files_are_closed() -> Iterator[None]:
    yield
    while MADE:
        MADE.pop().close()


class Training:
    """The loop's calls, with a term's sum divided by the count of the update."""

    def __init__(self, folder: Path, weights: dict[str, float] = WEIGHTS, **options: Any) -> None:
        self.model = Adapted()
        self.weights = weights
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.audit = LiveAudit(self.model, self.optimizer, folder, **options)
        MADE.append(self.audit)

    def forward(self, step: int, parts: int = 1) -> None:
        self.audit.take_counts(step, dict.fromkeys(self.weights, float(len(X))))
        for x in X.chunk(parts):
            found = sums(self.model(x))
            terms = {name: (w / len(X), found[name]) for name, w in self.weights.items()}
            self.audit.before_backward(step, terms, None)  # type: ignore[arg-type]
            torch.stack([scale * value for scale, value in terms.values()]).sum().backward()

    def update(self, step: int, parts: int = 1, move: bool = True) -> list[Any]:
        self.audit.before_update(step)
        self.forward(step, parts)
        self.audit.after_backward(step, self.model, self.optimizer)
        if move:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return list(self.audit.after_update(step, self.model, 0.1))

    def hooks(self) -> int:
        modules = sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules()
        )
        return modules + sum(len(p._backward_hooks or ()) for p in self.model.parameters())


def rows(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    path = folder / "audit.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in found if event in (None, row["event"])]


def truth(weights: dict[str, float]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Gradients of each mean by plain autograd, and of the weighted sum."""
    model = Adapted()
    found = sums(model(X))
    names = [name for name, _ in model.named_parameters()]
    values = list(model.parameters())
    each = [
        dict(
            zip(
                names,
                torch.autograd.grad(found[n] / len(X), values, retain_graph=True),
                strict=True,
            )
        )
        for n in weights
    ]
    total = {
        name: sum(w * g[name] for w, g in zip(weights.values(), each, strict=True))
        for name in names
    }
    return each, total


def test_norms_are_those_of_plain_autograd(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.update(1)
    (row,) = rows(tmp_path, "norms")
    _, total = truth(WEIGHTS)
    squares = {name: float(value.double().square().sum()) for name, value in total.items()}
    assert row["norm"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-6)
    for layer in ("layers.0", "layers.1", "extra"):
        expected = math.sqrt(sum(s for name, s in squares.items() if name.startswith(layer)))
        assert row["layers"][layer] == pytest.approx(expected, rel=1e-6)
    assert (row["none"], row["zero"], row["nonfinite"]) == (0, 0, 0)


def test_none_zero_and_non_finite_are_counted_apart() -> None:
    values = [nn.Parameter(torch.zeros(3)) for _ in range(4)]
    values[1].grad = torch.zeros(3)
    values[2].grad = torch.tensor([1.0, float("inf"), 2.0])
    values[3].grad = torch.tensor([3.0, 0.0, 4.0])
    row = norms_row(["a.0.x", "a.0.y", "a.1.x", "a.2.x"], live_norms(values))
    assert (row["none"], row["zero"], row["nonfinite"]) == (1, 1, 1)
    assert row["layers"] == {"a.0": 0.0, "a.1": math.inf, "a.2": 5.0}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_gram_is_of_the_sum_over_micro_batches(tmp_path: Path, parts: int) -> None:
    """Also the numbers that follow from it; G of the sum, not the sum of the parts' G."""
    training = Training(tmp_path)
    training.update(1, parts)
    (row,) = rows(tmp_path, "audit")
    each, total = truth(WEIGHTS)
    for layer in row["layers"]:
        mine = [name for name in total if name.startswith(layer["layer"])]
        expected = [
            [sum(float((a[n].double() * b[n].double()).sum()) for n in mine) for b in each]
            for a in each
        ]
        assert torch.tensor(layer["gram"]).allclose(torch.tensor(expected), rtol=1e-5)
    gram = torch.tensor(row["gram"], dtype=torch.float64)
    w = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    expected_shares = w * (gram @ w) / (w @ gram @ w)
    shares = torch.tensor([term["share"] for term in row["terms"]], dtype=torch.float64)
    assert torch.allclose(shares, expected_shares, rtol=1e-5)
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-6)
    assert row["sum_check"] < 1e-6
    output = sums(Adapted()(X).detach())
    for term in row["terms"]:
        assert term["weight"] == WEIGHTS[term["name"]]
        assert term["count"] == len(X)
        assert term["sum"] == pytest.approx(float(output[term["name"]]), rel=1e-6)
        assert term["value"] == pytest.approx(float(output[term["name"]]) / len(X), rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_one_term_costs_no_backward_and_tells_the_same(
    tmp_path: Path, parts: int, monkeypatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward of its own")

    monkeypatch.setattr("glasstune.audit.collect.by_grad", refuse)
    training = Training(tmp_path, {"third": 0.25})
    training.update(1, parts)
    (row,) = rows(tmp_path, "audit")
    (each,), _ = truth({"third": 0.25})
    assert row["engine"] == "single"
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in each.values()))
    assert row["terms"][0]["norm"] == pytest.approx(norm, rel=1e-6)
    assert row["terms"][0]["share"] == 1.0
    for parameter in row["parameters"]:
        at = parameter["terms"]["third"]
        assert at["reached"] is True
        assert at["norm"] == pytest.approx(float(each[parameter["name"]].norm()), rel=1e-5)
    assert row["gram"] == [[pytest.approx(norm**2, rel=1e-5)]]


@pytest.mark.parametrize(
    ("every", "structure", "audits", "norms"),
    [
        (3, True, [1, 3, 6], [2, 4, 6, 7]),
        (1, False, [1, 2, 3, 4, 5, 6, 7], [2, 4, 6, 7]),
        (0, True, [1], [2, 4, 6, 7]),
        (0, False, [], []),
    ],
)
def test_which_updates_have_a_row(
    tmp_path: Path, every: int, structure: bool, audits: list[int], norms: list[int]
) -> None:
    training = Training(tmp_path, every=every, structure=structure, log_every=2, total=7)
    for step in range(1, 8):
        training.update(step)
    assert [row["step"] for row in rows(tmp_path, "audit")] == audits
    assert [row["step"] for row in rows(tmp_path, "norms")] == norms
    assert training.hooks() == 0
    if not audits:
        assert not (tmp_path / "audit.jsonl").exists()


def test_without_audits_by_term_the_structure_is_still_told(tmp_path: Path) -> None:
    training = Training(tmp_path, every=0)
    training.update(1)
    (row,) = rows(tmp_path, "audit")
    assert row["engine"] == "none"
    for parameter in row["parameters"]:
        assert {name: at["reached"] for name, at in parameter["terms"].items()} == {
            "square": True,
            "third": True,
        }
        assert all(at["norm"] is None for at in parameter["terms"].values())


def test_a_tensor_that_is_not_reached_is_told_once_with_its_reason(tmp_path: Path) -> None:
    training = Training(tmp_path, every=1)
    training.model.cut = True
    found = training.update(1)
    print([(item.code, item.severity, item.message) for item in found])
    assert "extra.weight" in found[0].message
    why = training.audit.explain(1, ["layers.0.weight", "extra.weight", "extra.bias"])
    assert set(why) == {"extra.weight", "extra.bias"}
    assert training.update(2) == []
    assert rows(tmp_path, "norms")[-1]["none"] == 2
    assert training.audit.explain(1, ["extra.weight"]) == {}  # of another update


def test_an_update_that_trained_nothing_leaves_no_trace(tmp_path: Path) -> None:
    training = Training(tmp_path, every=1)
    training.audit.before_update(1)
    assert training.hooks() > 0
    training.update(1)
    training.audit.before_update(2)
    training.audit.close()
    assert training.hooks() == 0
    assert [row["step"] for row in rows(tmp_path)] == [1, 1]


def test_a_bad_update_is_looked_into_and_kept(tmp_path: Path) -> None:
    training = Training(tmp_path, every=0, structure=False)
    with torch.no_grad():
        training.model.layers[1].weight[0, 0] = float("inf")
    before = [value.detach().clone() for value in training.model.parameters()]
    seen = training.audit.examine(7, lambda: training.forward(7, 2), rows=["a.json:3"], error="bad")
    assert "first NaN or Inf of the forward is in the output of layers.1" in seen.text
    assert "layers.0 before it is finite" in seen.text
    assert "layers.1.weight" in seen.text
    (row,) = rows(tmp_path)
    assert (row["event"], row["step"], row["rows"], row["error"]) == (
        "failure", 7, ["a.json:3"], "bad",
    )  # fmt: skip
    assert len(row["parameters"]) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))
    assert training.hooks() == 0


def test_a_replay_that_raises_leaves_no_hooks(tmp_path: Path) -> None:
    training = Training(tmp_path)
    with pytest.raises(ZeroDivisionError):
        training.audit.examine(1, lambda: 1 / 0, rows=[], error="bad")
    assert training.hooks() == 0


def test_opposite_infinities_are_no_crash(tmp_path: Path) -> None:
    """Inf - Inf in the Gram matrix's sums."""
    training = Training(tmp_path, {"up": 1.0, "down": 1.0})

    def forward(step: int) -> None:
        training.audit.take_counts(step, {"up": 1.0, "down": 1.0})
        output = training.model(X).sum()
        up, down = output * 1e38 * 10, -output * 1e38 * 10
        terms = {"up": (1.0, up), "down": (1.0, down)}
        training.audit.before_backward(step, terms, None)  # type: ignore[arg-type]
        (up + down).backward()

    seen = training.audit.examine(1, lambda: forward(1), rows=[], error="bad")
    assert set(seen.terms) == {"up", "down"}
