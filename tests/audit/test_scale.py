"""A 32-layer model with 448 adapter tensors and 3 terms: bounded memory, bounded time."""

from __future__ import annotations

import time
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from glasstune.audit import norms
from glasstune.audit.gradient_audit import GradientAudit

WIDTH, RANK, LAYERS = 48, 24, 32
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, WIDTH, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            self.add_module(name, Lora())

    def forward(self, x):
        for name in NAMES:
            x = x + 0.1 * torch.tanh(self.get_submodule(name)(x))
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensor storages that were made under it and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._seen and size:
                    self._seen.add(key)
                    weakref.finalize(storage, self._gone, key, size)
                    self.live += size
                    self.peak = max(self.peak, self.live)
        return result


def test_448_adapters_and_three_terms() -> None:
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 448
    copy = sum(p.numel() * 4 for p in trained)
    x = torch.randn(2, WIDTH)

    def step(audit: GradientAudit | None) -> None:
        y = model(x)
        terms = {"a": (1.0, y.square().mean()), "b": (0.5, y.sum()), "c": (2.0, y.abs().mean())}
        if audit is not None:
            audit.terms(terms)
        sum(weight * loss for weight, loss in terms.values()).backward()

    def peak(keep) -> tuple[int, int, GradientAudit | None]:
        model.zero_grad()
        with LiveBytes() as plain:
            step(None)
            held = plain.live
        model.zero_grad()
        with LiveBytes() as seen:
            with GradientAudit(model, keep=keep) as audit:
                step(audit)
            left = seen.live - held
        return seen.peak - plain.peak, left, audit

    began = time.perf_counter()
    extra, left, audit = peak("gradients")
    # One copy a term, one for the self-check, and what one parameter needs for a moment.
    assert extra < 4.3 * copy, extra / copy
    assert left < 3.1 * copy, left / copy
    assert extra > 2.9 * copy  # the measure sees them
    extra, left, _ = peak(())
    assert extra < 4.3 * copy, extra / copy
    assert left < 0.1 * copy, left / copy
    assert time.perf_counter() - began < 60
    report = audit.report
    assert len(report.layers) == LAYERS
    assert report.sum_check < 1e-6
    assert len(report.text().splitlines()) < 60
    assert {row.status for row in report.parameters if row.requires_grad} == {"ok"}


@pytest.mark.parametrize("detached", [5, 31])
def test_224_reasons_are_one_finding(detached: int) -> None:
    model = Model()
    model.layers[detached].register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    with GradientAudit(model) as audit:
        audit.combine({"a": (1.0, model(torch.ones(2, WIDTH)).sum())}).backward()
    lost = [row for row in audit.report.parameters if row.status == "none"]
    assert len(lost) == detached * 14
    assert {row.reason.module for row in lost} == {f"layers.{detached}"}
    errors = [finding for finding in audit.report.findings if finding.severity == "error"]
    assert len(errors) == 1
    assert f"{detached * 14} parameters" in errors[0].message


def test_a_gpu_gives_the_same_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none, the road that a GPU's tensors take is at least taken on the CPU."""
    other = "cuda" if torch.cuda.is_available() else "cpu"

    def report(device: str):
        model, x = Model().to(device), torch.ones(2, WIDTH, device=device)
        torch.manual_seed(0)
        with GradientAudit(model) as audit:
            y = model(x)
            terms = {"a": (1.0, y.square().mean()), "b": (torch.tensor(0.5), y.sum())}
            audit.combine(terms).backward()
        return audit

    here = report("cpu")
    monkeypatch.setattr(norms, "_quick", lambda part: None)
    there = report(other)
    assert there.report.sum_check < 1e-5
    torch.testing.assert_close(there.gram("layers.3"), here.gram("layers.3"), rtol=1e-3, atol=1e-6)
    for ours, theirs in zip(here.report.parameters, there.report.parameters, strict=True):
        assert theirs.status == ours.status
        if ours.grad_after is not None:
            assert theirs.grad_after.norm == pytest.approx(ours.grad_after.norm, rel=1e-3)
        assert theirs.value.norm == pytest.approx(ours.value.norm, rel=1e-6)
