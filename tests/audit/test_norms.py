"""Statistics of tensors and live norms against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glasstune.audit import norms
from glasstune.audit.norms import Gatherer, live_norms, summary, tensor_stats


@pytest.mark.parametrize("bad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stats(dtype: torch.dtype, bad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "CHUNK", 7)
    monkeypatch.setattr(norms, "BLOCK", 3)
    torch.manual_seed(0)
    x = torch.randn(5, 9).to(dtype).T
    x[0, 0] = 0
    if bad:
        x[1, 1], x[2, 2], x[3, 3] = float("nan"), float("inf"), float("-inf")
    found = summary(tensor_stats(x).tolist(), x.numel())
    finite = x[x.isfinite()].double()
    assert found.norm == pytest.approx(float(finite.norm()), rel=1e-6)
    assert found.max_abs == float(finite.abs().max())
    assert found.zero_fraction == pytest.approx(1 / 45)
    assert (found.nan, found.inf) == ((1, 2) if bad else (0, 0))
    assert found.finite is not bad
    # What a GPU takes: rows of one size together, in a second form of the same numbers.
    pair = torch.stack([x.reshape(-1), x.reshape(-1) * 2])
    rows = norms._masked(pair)
    assert rows.shape == (2, 5)
    for row, one in zip(rows, pair, strict=True):
        assert row.tolist() == pytest.approx(tensor_stats(one).tolist(), rel=1e-6)


@pytest.mark.gpu
def test_many_on_a_gpu_are_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(norms, "CHUNK", 100)
    torch.manual_seed(0)
    shapes = [(3, 4), (12,), (7, 20), (2, 6), (0,), (5, 5), (1,)]
    tensors = [torch.randn(shape, device="cuda") for shape in shapes]
    tensors[3][0, 0] = float("nan")
    tensors.append(torch.randn(3, 4, device="cuda").bfloat16())
    for tensor, row in zip(tensors, norms.many_stats(tensors), strict=True):
        assert row.tolist() == pytest.approx(tensor_stats(tensor.cpu()).tolist(), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20])
def test_stats_of_extreme_values(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "BLOCK", 16)
    x = torch.linspace(-1, 1, 101) * scale
    found = summary(tensor_stats(x).tolist(), 101)
    assert found.norm == pytest.approx(float(x.double().norm()), rel=1e-6)
    assert not found.zero


def test_gatherer_keeps_keys_and_order() -> None:
    box = Gatherer()
    box.put("a", torch.tensor([1.0, 2.0]))
    box.put(("b", 1), torch.tensor(3, dtype=torch.int64))
    box.put("a", torch.tensor([[4.0], [5.0]]))
    assert box.gather() == {"a": [4.0, 5.0], ("b", 1): [3.0]}
    assert Gatherer().gather() == {}


def test_live_norms() -> None:
    def parameter(*values: float, dtype=torch.float32) -> nn.Parameter:
        made = nn.Parameter(torch.zeros(len(values), dtype=dtype))
        made.grad = torch.tensor(values, dtype=dtype)
        return made

    none = nn.Parameter(torch.zeros(2))
    empty = parameter()
    rows = [
        parameter(3.0, -4.0),
        none,
        parameter(1e20, 1e20),
        parameter(1e-30),
        parameter(0.0, 0.0),
        parameter(float("nan"), 1.0),
        parameter(float("-inf"), 1.0),
        empty,
        parameter(3.0, 4.0, dtype=torch.bfloat16),
    ]
    found = live_norms(rows)
    assert found.shape == (9, 2)
    assert found[0].tolist() == [5, 4]
    assert found[1].tolist() == [-1, -1]
    assert found[2, 1] == torch.tensor(1e20)  # its 2-norm is Inf in float32
    assert found[3, 1] == torch.tensor(1e-30)  # its 2-norm is 0 in float32
    assert found[4].tolist() == [0, 0]
    assert found[5, 1].isnan()
    assert found[6, 1].isinf()
    assert found[7].tolist() == [0, 0]
    assert found[8].tolist() == [5, 4]
    usual = [0, 2, 3, 4, 5, 6]  # dense float32 with entries: the short road
    short = live_norms([rows[at] for at in usual])
    assert torch.equal(short.nan_to_num(-7), found[usual].nan_to_num(-7))


def test_live_norms_without_any_gradient() -> None:
    assert live_norms([nn.Parameter(torch.ones(2))]).tolist() == [[-1, -1]]
    assert live_norms([]).shape == (0, 2)


def test_stats_of_float8() -> None:
    x = torch.tensor([3.0, -4.0, 0.0]).to(torch.float8_e4m3fn)
    assert tensor_stats(x).tolist() == [25.0, 4.0, 1.0, 0.0, 0.0]
