"""The first-step gate: what is dead is named, what is healthy passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glasstune.audit.gate import FirstStepGate, host_path


class LoraLinear(nn.Module):
    """The shape of PEFT's layer, so that this room needs no PEFT."""

    def __init__(self, zero_b: bool = True, zero_a: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})
        self.off = False
        if zero_b:
            nn.init.zeros_(self.lora_B["default"].weight)
        if zero_a:
            nn.init.zeros_(self.lora_A["default"].weight)

    def forward(self, x):
        y = self.base(x)
        return y if self.off else y + self.lora_B["default"](self.lora_A["default"](x))


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.one = LoraLinear(**options)
        self.two = LoraLinear(**options)
        self.expert = LoraLinear(**options)
        self.use_expert = True

    def forward(self, x):
        x = self.two(torch.relu(self.one(x)))
        return self.expert(x) if self.use_expert else x


def watch(model, steps=2, rate=0.1, decay=0.0, sabotage=None, parameters=None, terms=None, **gate):
    """Runs real AdamW updates under the gate; returns all findings."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(parameters or model.parameters(), lr=rate, weight_decay=decay)
    hook = FirstStepGate(model, **gate)
    found = []
    for step in range(1, steps + 1):
        hook.before_update(step)
        loss = model(torch.randn(8, 6)).square().sum()
        hook.before_backward(step, terms or {"next_token": (1.0, loss)}, None)
        loss.backward()
        if sabotage is not None:
            sabotage(model)
        hook.after_backward(step, model, optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.extend(hook.after_update(step, model, rate))
    return hook, found


def dead(found):
    return {item.where for item in found if item.severity == "error"}


def test_g03_zero_a_gradient_at_step_0_is_healthy() -> None:
    hook, found = watch(Model())
    assert found == []
    assert hook.done


def test_g03_both_zero_never_learns() -> None:
    _, found = watch(Model(zero_a=True))
    assert len(dead(found)) == 6
    assert "neither can ever move" in found[0].message


def test_warm_start_with_b_not_zero_is_healthy() -> None:
    assert watch(Model(zero_b=False))[1] == []


def test_g02_a_tensor_without_gradient_is_named_at_the_first_step() -> None:
    def detach(model):
        model.two.lora_B["default"].weight.grad = None

    hook, found = watch(Model(), steps=1, sabotage=detach)
    assert dead(found) == {"two.lora_B.default.weight"}
    assert hook.done


def test_skipped_adapter_inside_a_called_layer_is_dead() -> None:
    model = Model()
    model.two.off = True
    _, found = watch(model, steps=1)
    assert dead(found) == {"two.lora_A.default.weight", "two.lora_B.default.weight"}


def test_an_expert_without_tokens_is_waited_for_and_named() -> None:
    model = Model()
    model.use_expert = False
    _, found = watch(model)
    assert dead(found) == set()
    assert {item.where for item in found} == {
        "expert.lora_A.default.weight",
        "expert.lora_B.default.weight",
    }
    assert {item.code for item in found} == {"gate_not_called"}


@pytest.mark.parametrize("runs", [(False, True, True), (True, False, True)])
def test_an_expert_that_runs_in_some_updates_is_judged_by_those(runs) -> None:
    """Its A has a zero gradient in its own first update, whichever that is."""
    model, found = Model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    hook = FirstStepGate(model)
    for step, model.use_expert in enumerate(runs, 1):
        hook.before_update(step)
        loss = model(torch.randn(8, 6)).square().sum()
        hook.before_backward(step, {"next_token": (1.0, loss)}, None)
        loss.backward()
        hook.after_backward(step, model, optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.extend(hook.after_update(step, model, 0.1))
    assert dead(found) == set()
    assert hook.done


def test_a_late_expert_that_is_dead_is_still_found() -> None:
    model = Model()
    model.expert.off = True
    model.use_expert = False

    def arrive(model):
        model.use_expert = True

    _, found = watch(model, steps=4, sabotage=arrive)
    assert dead(found) == {"expert.lora_A.default.weight", "expert.lora_B.default.weight"}


def test_rows_of_tokens_that_have_not_come_are_waited_for() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 6).requires_grad_(False)
            self.trainable_tokens_delta = nn.ParameterDict({"default": torch.zeros(2, 6)})

        def forward(self, x):
            delta = torch.zeros(8, 6).index_copy(
                0, torch.tensor([6, 7]), self.trainable_tokens_delta["default"]
            )
            return (self.table.weight + delta)[torch.randint(0, self.seen, (8,))]

    model = Rows()
    model.seen = 6
    hook, found = watch(model, steps=3)
    assert [item.code for item in found] == ["gate_no_tokens"]
    assert not hook.done
    model.seen = 8
    assert watch(model, steps=3)[1] == []


def test_weight_decay_does_not_hide_a_dead_tensor() -> None:
    """AdamW moves a tensor whose gradient is zero; the gate must still call it dead."""

    def zero(model):
        model.one.lora_A["default"].weight.grad.zero_()

    model = Model(zero_b=False)
    before = model.one.lora_A["default"].weight.detach().clone()
    _, found = watch(model, steps=1, decay=0.1, sabotage=zero)
    assert not torch.equal(before, model.one.lora_A["default"].weight)
    assert dead(found) == {"one.lora_A.default.weight"}


def test_not_in_the_optimiser() -> None:
    model = Model()
    some = [value for name, value in model.named_parameters() if "two.lora_B" not in name]
    _, found = watch(model, steps=1, parameters=some)
    assert dead(found) == {"two.lora_B.default.weight"}
    assert "no optimiser group" in found[0].message


def test_e05_a_first_learning_rate_of_zero_stops_nobody() -> None:
    hook, found = watch(Model(), steps=2, rate=0.0)
    assert found == []
    assert not hook.done  # still waiting for updates that move


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient(bad) -> None:
    def spoil(model):
        model.one.lora_B["default"].weight.grad[0, 0] = bad

    _, found = watch(Model(), steps=1, sabotage=spoil)
    assert "one.lora_B.default.weight" in dead(found)


def test_kl_alone_is_healthy_with_a_zero_gradient() -> None:
    def zero(model):
        for value in model.parameters():
            if value.grad is not None:
                value.grad.zero_()

    terms = {"kl_to_base": (1.0, torch.zeros(()))}
    assert watch(Model(), sabotage=zero, terms=terms)[1] == []


def test_kl_first_and_the_rest_later_is_healthy() -> None:
    """`next_token` with a weight that starts at 0: the first update moves nothing."""
    model, found = Model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    hook = FirstStepGate(model)
    for step in (1, 2, 3):
        hook.before_update(step)
        weight = 0.1 * (step - 1)
        loss = weight * model(torch.randn(8, 6)).square().sum()
        hook.before_backward(step, {"next_token": (weight, loss), "kl_to_base": (1.0, loss)}, None)
        loss.backward()
        hook.after_backward(step, model, optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.extend(hook.after_update(step, model, 0.1))
    assert found == []
    assert hook.done


def test_warn_and_allow() -> None:
    def detach(model):
        model.two.lora_B["default"].weight.grad = None

    _, warned = watch(Model(), steps=1, sabotage=detach, mode="warn")
    assert [item.severity for item in warned] == ["warning"]
    _, allowed = watch(Model(), steps=1, sabotage=detach, allow=["two.*"])
    assert allowed == []


def test_host_of_an_embedding_adapter() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_embedding_A = nn.ParameterDict({"default": torch.zeros(2, 3)})

    model = nn.Sequential(Embedding())
    assert host_path(model, "0.lora_embedding_A.default") == "0"
    assert host_path(model, "0.weight") == "0"
