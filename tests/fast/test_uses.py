"""Generation, checkpointing, audits, second backwards: what people do with a model goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import SPECS
from speeding import IDS, furthest, gradients, tiny
from torch import nn

from glasstune.audit.gradient_audit import GradientAudit
from glasstune.core.choices import Choices
from glasstune.fast.groups import shared_inputs
from glasstune.fast.speed_up import plain, speed_up


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_generation_with_a_cache(family, bits) -> None:
    model = tiny(family, bits)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    ids = IDS[:, :6]
    speed_up(model)
    got = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    with plain(model):
        right = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(got, right)


def test_one_token_of_a_4_bit_model_takes_bitsandbytes_own_road() -> None:
    model = tiny("llama", 4)
    report = speed_up(model)
    with torch.no_grad():
        got = model(input_ids=IDS[:1, :1], use_cache=False).logits
        with plain(model):
            assert torch.equal(got, model(input_ids=IDS[:1, :1], use_cache=False).logits)
    assert report.groups[0].source is not None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2", "qwen2"])
def test_checkpointing(family, reentrant) -> None:
    model = tiny(family)
    right = gradients(model)
    report = speed_up(model)
    enable = getattr(model, "activation_checkpointing_enable", None)
    options = {"use_reentrant": reentrant}
    if enable is not None:
        enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert furthest(gradients(model), right) < 1e-5
    assert all(group.x is None and group.outs is None for group in report.groups)


@pytest.mark.parametrize("family", SPECS)
def test_nothing_is_held_after_a_step(family) -> None:
    """Also where members of one group are called far apart, and where one is not called."""
    model = tiny(family)
    report = speed_up(model)
    gradients(model)
    assert all(group.x is None and group.outs is None for group in report.groups)


def test_a_second_backward_and_two_forwards() -> None:
    model = tiny("llama")
    speed_up(model)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    one = loss(IDS)
    first = torch.autograd.grad(one, wanted, retain_graph=True)
    two = loss(IDS + 40)  # writes the adapter into M again
    second = torch.autograd.grad(one, wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    both = torch.autograd.grad(two + loss(IDS), wanted)
    with plain(model):
        right = torch.autograd.grad(loss(IDS + 40) + loss(IDS), wanted)
    for mine, theirs in zip(both, right, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


def test_a_step_between_forward_and_backward_is_an_error_as_in_torch() -> None:
    model = tiny("llama")
    speed_up(model)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_audit_on_the_plain_model() -> None:
    models = [tiny("llama"), tiny("llama")]
    speed_up(models[0])
    reports = []
    for model in models:
        with plain(model), GradientAudit(model) as audit:
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
            audit.terms({"next_token": (1.0, loss)})
            loss.backward()
        reports.append(audit.report.to_dict())
        model.zero_grad()
    fast, right = reports
    assert [p["status"] for p in fast["parameters"]] == [p["status"] for p in right["parameters"]]
    assert [p["name"] for p in fast["parameters"]] == [p["name"] for p in right["parameters"]]
    assert gradients(models[0]).keys() == gradients(models[1]).keys()


def test_live_norms_of_a_fast_step() -> None:
    """Hooks on adapter tensors see the gradients that autograd leaves."""
    model = tiny("llama")
    speed_up(model)
    seen: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: seen.__setitem__(name, grad.clone()))
    found = gradients(model)
    assert seen.keys() == found.keys() - {"loss"}
    assert all(torch.equal(seen[name], found[name]) for name in seen)


def test_inference_mode_first() -> None:
    model = tiny("llama")
    speed_up(model)
    model.double()  # so that the weights move into M within the call below
    with torch.inference_mode():
        model(input_ids=IDS, use_cache=False)
    fast = gradients(model)
    with plain(model):
        assert furthest(fast, gradients(model)) < 1e-12


def test_empty_and_odd_batches() -> None:
    model = tiny("qwen2")
    speed_up(model)
    for ids in (IDS[:1, :1], IDS[:1, :7], IDS[:, 3:10]):
        with torch.no_grad():
            got = model(input_ids=ids, use_cache=False).logits
            with plain(model):
                right = model(input_ids=ids, use_cache=False).logits
        assert (got - right).abs().max() < 2e-4


class Odd(nn.Module):
    """No token embeddings, a tensor changed between members, a member called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 6)
        self.three, self.four = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.one(x)).clone()
        a = self.two(h)
        b = self.three(h)
        c = self.four(self.one(h))
        return a.sum(-1) + b.sum(-1) * c.sum(-1)


def odd() -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["one", "two", "three", "four"]), Odd()
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def test_a_model_that_is_no_transformer() -> None:
    model, x = odd(), torch.randn(3, 8)
    right = model(x)
    report = speed_up(model)
    assert all("no token embeddings" in module.reason for module in report.record.modules)
    torch.testing.assert_close(model(x), right)
    report.undo()
    report = speed_up(model, example={"x": x})
    groups = [group.paths for group in report.groups]
    assert ["two", "three"] in groups
    assert ["one"] in groups
    torch.testing.assert_close(model(x), right)
    model(x).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_a_probe_that_fails_is_said() -> None:
    model = tiny("llama")
    report = speed_up(model, example={"nothing": 1})
    assert all(len(group.paths) == 1 for group in report.groups)
    assert "failed" in report.record.modules[0].reason
    right = gradients(model)
    report.undo()
    assert furthest(right, gradients(model)) < 1e-5


def test_groups_by_identity() -> None:
    a, b = torch.ones(1), torch.ones(1)
    calls = [("q", a), ("k", a), ("x", b), ("v", a), ("twice", b), ("twice", a), ("odd", None)]
    paths = ["q", "k", "v", "x", "twice", "odd", "never"]
    assert shared_inputs(calls, paths) == [["q", "k", "v"], ["x"], ["twice"], ["odd"], ["never"]]


def test_an_input_changed_between_members_is_not_taken_for_the_same() -> None:
    model = tiny("llama")
    speed_up(model)
    attention = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        attention.q_proj(x)
        x.mul_(2)
        got = attention.k_proj(x)
        with plain(model):
            right = attention.k_proj(x)
    assert (got - right).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore")  # torch's compiler, of its own parts
def test_an_attention_that_makes_every_score_is_replaced_and_given_back(monkeypatch):
    """On a GPU alone; here the kernel's own check is told that it is one."""
    from glasstune.fast import compile
    from glasstune.models.families import flex
    from glasstune.models.families.install import attention_installed, install_attention

    monkeypatch.setattr(flex, "why_not", lambda *_: None)
    monkeypatch.setattr(compile, "_missing_compiler", lambda _: None)
    model, choices = tiny("bloom"), Choices()
    report = speed_up(model, compile=True, choices=choices)
    assert attention_installed(model)
    assert "ALiBi" in choices.get("model.attention").value
    report.undo()
    assert not attention_installed(model)
    # Who had it before keeps it.
    install_attention(model)
    choices = Choices()
    report = speed_up(model, compile=True, choices=choices)
    assert choices.get("model.attention") is None
    report.undo()
    assert attention_installed(model)
    assert not attention_installed(tiny("llama"))
