"""A float8 base under `speed_up`: groups, switches and whole models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiling import QUIET_COMPILER
from families import family_model
from peft import LoraConfig, get_peft_model
from speeding import adapted, distance, fill, gradients, wide_enough, widened
from torch import nn

from glasstune.fast.speed_up import plain, slow_down, speed_up
from glasstune.kernels.fp8 import Fp8Linear
from glasstune.models.fp8 import convert_to_fp8

pytestmark = QUIET_COMPILER
TARGETS = ["q", "k", "v"]


class Layer(nn.Module):
    """Three layers with one input: nothing between them rounds again."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        for name, width in (("q", 64), ("k", 32), ("v", 32)):
            weight = torch.randn(width, 48, generator=draw) * 0.1
            setattr(self, name, Fp8Linear.from_weight(weight, torch.randn(width, generator=draw)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Layer(), LoraConfig(target_modules=TARGETS, r=4, **options))
    fill(model)
    return model


def example() -> torch.Tensor:
    return torch.randn(6, 48, generator=torch.Generator().manual_seed(1))


def run(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns outputs under bfloat16 autocast, and the gradients of x and the adapters."""
    x = example().bfloat16().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    return y.detach(), list(torch.autograd.grad((y.float() * weights).sum(), [x, *trained]))


def furthest(model: Any) -> float:
    """Returns how far the sped-up model is from PEFT's own forward on the same float8 layers."""
    got_y, got = run(model)
    with plain(model):
        want_y, want = run(model)
    pairs = [(got_y, want_y), *zip(got, want, strict=True)]
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


BF16 = 2.0**-7
"""Some roundings to bfloat16; the base's products are rounded alike on both sides."""


def speeded(**options: Any) -> tuple[Any, Any]:
    model = layer(**options)
    report = speed_up(model, compile=False, example={"x": example()})
    return model, report


def test_three_layers_are_one_product_with_lora_inside() -> None:
    model, report = speeded()
    assert furthest(model) < BF16
    assert [(group.way, len(group.layers), group.kind) for group in report.groups] == [
        ("wide", 3, "fp8")
    ]


def test_without_loras_columns_that_fails(monkeypatch) -> None:
    from glasstune.fast import fp8_home

    monkeypatch.setattr(fp8_home, "write_low", lambda *_: None)
    model, _ = speeded()
    assert furthest(model) > 10 * BF16


def step(model: Any) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        model(example()).float().pow(2).mean().backward()
    optimizer.step()


def through_data(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.7)


def rescale(model: Any) -> None:
    for name in TARGETS:
        getattr(model.base_model.model, name).scaling["default"] *= 0.25


def other_rank(model: Any) -> None:
    model.add_adapter("more", LoraConfig(target_modules=TARGETS, r=12))
    fill(model)
    model.set_adapter("more")


def load(model: Any) -> None:
    model.load_state_dict(
        {k: v * 0.5 if "lora_" in k else v for k, v in model.state_dict().items()}
    )


def move(model: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("change", [step, through_data, rescale, other_rank, load, move])
def test_changes_are_seen(change) -> None:
    model, report = speeded()
    before = run(model)[0]
    change(model)
    assert furthest(model) < BF16
    if change is not move:
        assert float((run(model)[0] - before).abs().max()) > 0.01
    assert {group.way for group in report.groups} == {"wide"}


def test_switching_off_and_dropout_share_the_bases_product() -> None:
    model, report = speeded(lora_dropout=0.4)
    model.train()
    with model.disable_adapter():
        assert furthest(model) < BF16
    torch.manual_seed(3)
    got = run(model)[0]
    assert {group.way for group in report.groups} == {"grouped"}
    torch.manual_seed(3)
    with plain(model):
        want = run(model)[0]
    assert float((got - want).norm() / want.norm()) < BF16
    model.eval()
    assert furthest(model) < BF16
    assert {group.way for group in report.groups} == {"wide"}


def test_a_step_between_forward_and_backward_is_an_error() -> None:
    model, _ = speeded()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(example())
    step(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(example())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()


def test_undo_copies_and_state_dicts() -> None:
    model, report = speeded()
    before, weights = run(model)[0], layer().state_dict()
    twin = copy.deepcopy(model)
    state = model.state_dict()
    assert all(value.is_contiguous() for value in state.values())
    for name, value in weights.items():
        if "lora_" not in name and "turned" not in name:
            assert torch.equal(state[name], value), name
    assert torch.equal(run(model)[0], before)
    report.undo()
    assert float((run(twin)[0] - run(model)[0]).abs().max()) == 0
    assert float((run(model)[0] - before).norm() / before.norm()) < BF16
    slow_down(model)


def test_a_merge_into_float8_bytes_fails_loudly() -> None:
    model = layer()
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        model.merge_and_unload()


@pytest.mark.parametrize("family", ["llama", "qwen2", "bloom", "gpt2", "gemma2", "phi3"])
def test_whole_models_are_no_further_from_fp32_than_peft_is(family) -> None:
    model = family_model(family, **wide_enough(family)).to(torch.bfloat16)
    convert_to_fp8(model, None)
    model = adapted(model)
    truth = gradients(widened(model).float())
    with torch.autocast("cpu", torch.bfloat16):
        eager = gradients(model)
        report = speed_up(model, compile=False)
        fast = gradients(model)
    assert any(group.kind == "fp8" and group.way == "wide" for group in report.groups)
    assert distance(fast, truth) < 1.3 * distance(eager, truth) + 0.01


@pytest.mark.slow(reason="the compiler takes 15 s")
def test_compiled_blocks_compute_the_same() -> None:
    model = family_model("llama", hidden_size=64).to(torch.bfloat16)
    convert_to_fp8(model, None)
    model = adapted(model)
    truth = gradients(widened(model).float())
    with torch.autocast("cpu", torch.bfloat16):
        report = speed_up(model, compile=False)
        want = gradients(model)
        report.undo()
        speed_up(model, compile=True)
        got = gradients(model)
    # A last bit of bfloat16 moves a float8 number to its neighbour: both are as far from the truth.
    assert distance(got, truth) < 1.3 * distance(want, truth) + 0.01


def test_a_layer_of_zeros_takes_nothing_from_the_others() -> None:
    model = Layer()
    model.k = Fp8Linear.from_weight(torch.zeros(32, 48))
    torch.manual_seed(0)
    adapted_layer = get_peft_model(model, LoraConfig(target_modules=TARGETS, r=4))
    fill(adapted_layer)
    speed_up(adapted_layer, compile=False, example={"x": example()})
    assert furthest(adapted_layer) < BF16


def test_loaded_weights_are_seen() -> None:
    model = layer()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    speed_up(model, compile=False, example={"x": example()})
    before = run(model)[0]
    model.load_state_dict(state)
    assert furthest(model) < BF16
    assert torch.equal(run(model)[0], before)
    model.load_state_dict({k: v * 4 if k.endswith("scale") else v for k, v in state.items()})
    assert furthest(model) < BF16
    assert float((run(model)[0] - before).norm() / before.norm()) > 1


class Clipped(Layer):
    """Writes into what its layers give, as olmo does; a bias would be added into new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.q.bias = self.k.bias = self.v.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x[None]  # with a batch, so that outputs are reshaped, as a model's are
        parts = [layer(rows).clamp_(-99, 99) for layer in (self.q, self.k, self.v)]
        return torch.cat(parts, -1)[0]


def test_a_model_may_write_into_outputs() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Clipped(), LoraConfig(target_modules=TARGETS, r=4))
    fill(model)
    speed_up(model, compile=False, example={"x": example()})
    assert furthest(model) < BF16


def test_a_state_dict_in_inference_mode_leaves_training_alone() -> None:
    model, _ = speeded()
    with torch.inference_mode():
        model.state_dict()
    assert furthest(model) < BF16
